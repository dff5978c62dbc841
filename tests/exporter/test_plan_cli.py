"""`qwen-export plan` as users call it, and against a hub on this machine's loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from click.testing import CliRunner, Result

from qwen_export.cli import main

MODELS = Path(__file__).parents[1] / "data" / "golden" / "models"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_MODELS = ("qwen2_sharded", "qwen2_untied")

# Plans each model and prints what came of it.
CLIENT = """
import json, sys
from qwen_export.errors import ExportError
from qwen_export.planning import PlanOptions, plan
for model in sys.argv[1:]:
    try:
        made = plan(model, PlanOptions(("fp32",), ("bf16",)))
        result = {"refusal": made.refusal, "parameters": made.num_parameters,
                  "revision": made.revision,
                  "disk": made.precisions[0].disk.weights if made.precisions else None}
    except ExportError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))
"""


@dataclass
class FakeHub:
    """The endpoints that small files and headers come from; counts the bytes of weights it gave."""

    root: Path
    url: str = ""
    weight_requests: list[str] = field(default_factory=list)

    def answer(self, path: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        file = self.root / "/".join(parts[:2]) / "/".join(parts[4:])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = file.read_bytes()
        headers = {"ETag": f'"{len(data)}-{file.name}"', "X-Repo-Commit": COMMIT}
        if file.suffix == ".safetensors":
            self.weight_requests.append(f"{file.name} {wanted}")
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            return 206, headers, data[int(first) : int(last) + 1]
        return 200, headers, data

    def _api(self, repo: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if repo == "acme/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        folder = self.root / repo
        if not folder.is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        value: Any = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        if rest[:1] == ["tree"]:
            value = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                for n, p in zip(names, files, strict=True)
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """Serves golden models, one of another kind and one without safetensors."""
    fake = FakeHub(tmp_path_factory.mktemp("hub"))
    for name in HUB_MODELS:
        shutil.copytree(MODELS / name, fake.root / "acme" / name)
    llama = Path(shutil.copytree(MODELS / "qwen2_untied", fake.root / "acme/llama"))
    (llama / "config.json").write_text('{"model_type": "llama"}')
    pickled = Path(shutil.copytree(MODELS / "qwen2_untied", fake.root / "acme/pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")

    class Handler(BaseHTTPRequestHandler):
        timeout = 20

        def do_GET(self) -> None:
            self.reply(with_body=True)

        def do_HEAD(self) -> None:
            self.reply(with_body=False)

        def reply(self, *, with_body: bool) -> None:
            status, headers, body = fake.answer(self.path, self.headers.get("Range"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield fake
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def plan_in_subprocess(
    hub: FakeHub, home: Path, *models: str, **environment: str
) -> list[dict[str, Any]]:
    # huggingface_hub reads its environment when imported, so the client is a process of its own.
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables.update(HF_ENDPOINT=hub.url, HF_HOME=str(home), NO_PROXY="127.0.0.1", **environment)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *models],
        env=variables,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_model_is_planned_from_its_headers_as_its_folder_is(
    hub: FakeHub, tmp_path: Path
) -> None:
    folders = [str(MODELS / name) for name in HUB_MODELS]
    remote = plan_in_subprocess(hub, tmp_path, *(f"acme/{name}" for name in HUB_MODELS), *folders)
    for hub_plan, folder_plan in zip(remote[:2], remote[2:], strict=True):
        assert hub_plan == folder_plan | {"revision": COMMIT}
        assert hub_plan["disk"] > 0
    # Headers alone: nothing was asked for without a range, and nothing kept.
    assert len(hub.weight_requests) == 4
    assert not [line for line in hub.weight_requests if line.endswith("None")]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_hub_models_that_cannot_be_planned_or_built_get_one_sentence(
    hub: FakeHub, tmp_path: Path
) -> None:
    gated, missing, pickled, llama = plan_in_subprocess(
        hub, tmp_path, "acme/gated", "acme/missing", "acme/pickled", "acme/llama"
    )
    assert gated["error"].startswith("CheckpointError: acme/gated is gated: accept its terms")
    assert "acme/missing is neither a folder here nor a model on the hub" in missing["error"]
    assert "acme/pickled holds only pytorch_model.bin" in pickled["error"]
    assert "model_type 'llama' is not supported" in llama["refusal"]
    assert llama["refusal"].startswith("acme/llama/config.json")
    assert llama["parameters"] > 0


def test_offline_an_unknown_hub_model_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    (result,) = plan_in_subprocess(hub, tmp_path, "acme/never_seen", HF_HUB_OFFLINE="1")
    assert "the hub is out of reach and the cache does not hold it" in result["error"]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, args)])


def test_the_tables_show_every_part_of_a_plan() -> None:
    result = run("--batch", "2", "--context", "512")
    assert result.exit_code == 0, result.output
    for text in (
        "\nParameters\n",
        "7,085,312",
        "repetition_penalty 1.05",
        "Bundle on disk and build, MB",
        "GPU bf16",
        "Decode of one row on this CPU",
    ):
        assert text in result.stdout


@pytest.mark.parametrize("columns", ["20", "80", "120"])
def test_tables_are_as_wide_as_columns_says_and_never_cut(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    result = run("--context", "2048")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    # The first line is the model's folder, whatever its length.
    assert max(map(len, lines[1:])) <= max(80, int(columns))
    assert "…" not in result.stdout
    (heads,) = (line.split() for line in lines if line.startswith("format where"))
    assert heads[-2:] == ["process", "total"]


def test_json_has_the_same_plan_for_machines() -> None:
    result = run("--precision", "int8", "--compute-dtype", "fp32", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (entry,) = document["precisions"]
    disk, (use, _) = entry["disk"], entry["memory"]
    sizes = ("weights", "graphs", "text", "reports")
    assert disk["total"] == sum(disk[name] for name in sizes)
    parts = ("weights", "mapped", "kv_cache", "kept_prompts", "activations", "outgrown", "process")
    assert use["total"] == sum(use[name] for name in parts)
    assert document["bandwidth"] > 0


def test_a_model_that_cannot_be_built_is_shown_with_exit_status_1(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODELS / "qwen2_untied", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    result = run(folder)
    assert result.exit_code == 1
    assert "cannot be built:" in result.stdout
    assert "hidden_act 'gelu' is not supported" in " ".join(result.stdout.split())
    assert "Parameters" in result.stdout


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("nowhere",), 1, "Error: nowhere does not exist, and is not a hub id"),
        (("--precision", "fp8"), 2, "'fp8' is not one of"),
        (("--context", "0"), 2, "0 is not in the range"),
        (("--context", "4096"), 1, "Error: --context must be at most 2048"),
        (("--precision", "fp32", "--block-size", "32"), 2, "--block-size, --quantizer and --keep"),
        (("--quantizer", "gptq"), 2, "--quantizer gptq and --calibration FILE must be given"),
        (("--batch", "2", "--batch", "2"), 2, "--batch 2 must be given once"),
        (("--compute-dtype", "bf16", "--threads", "1"), 2, "--threads is for the CPU"),
        (("--revision", "main"), 1, "revision 'main' is for hub ids"),
    ],
)
def test_bad_input_is_one_sentence(args: tuple[str, ...], status: int, message: str) -> None:
    result = run(*args)
    assert result.exit_code == status, result.output
    assert message in result.stderr
