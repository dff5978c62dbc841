"""open_checkpoint against a hub on this machine's loopback."""

from __future__ import annotations

import hashlib
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

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Opens each (model, revision) and prints what came of it.
CLIENT = """
import json, sys
from qwen_export.checkpoint import open_checkpoint
from qwen_export.errors import ExportError
for model, revision in json.loads(sys.argv[1]):
    try:
        checkpoint = open_checkpoint(model, revision=revision)
        files = sorted(p.relative_to(checkpoint.path).as_posix()
                       for p in checkpoint.path.rglob("*") if p.is_file())
        result = {"files": files, "sum": float(checkpoint.read("model.norm.weight").sum()),
                  "revision": checkpoint.revision}
    except ExportError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))
"""


@dataclass
class FakeHub:
    """The few endpoints that a snapshot download uses, serving folders below a root."""

    root: Path
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(f"{method} {path}")
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:])
        repo, action, rest = "/".join(parts[:2]), parts[2:3], parts[3:]
        file = self.root / repo / "/".join(rest[1:])
        if action != ["resolve"] or not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = file.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, data

    def api(self, repo: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if repo == "acme/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if repo == "acme/broken":
            return 418, {}, b"{}"
        folder = self.root / repo
        if not folder.is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if rest[1:2] and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        value: Any
        if rest[:1] == ["tree"]:
            value = [
                {
                    "type": "file",
                    "path": name,
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for name, p in zip(names, files, strict=True)
            ]
        else:
            value = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def fetched(self, repo: str) -> set[str]:
        prefix = f"GET /{repo}/resolve/{COMMIT}/"
        return {line.removeprefix(prefix) for line in self.requests if line.startswith(prefix)}


@pytest.fixture(scope="module")
def hub(
    tmp_path_factory: pytest.TempPathFactory, golden_models: Path, embedded_model: Path
) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    fake = FakeHub(root)
    for name in ("qwen2_untied", "qwen2_sharded"):
        shutil.copytree(golden_models / name, root / "acme" / name)
    single = root / "acme/qwen2_untied"
    for extra in ("README.md", "onnx.bin", "training_args.bin", "other.safetensors"):
        (single / extra).write_bytes(b"not needed")
    templates = single / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("tools")
    shutil.copy(embedded_model / "tokenizer.json", single)
    pickled = Path(shutil.copytree(golden_models / "qwen2_tied", root / "acme/pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    llama = Path(shutil.copytree(golden_models / "qwen2_tied", root / "acme/llama"))
    (llama / "config.json").write_text('{"model_type": "llama"}')

    class Handler(BaseHTTPRequestHandler):
        timeout = 20

        def do_GET(self) -> None:
            self.reply("GET")

        def do_HEAD(self) -> None:
            self.reply("HEAD")

        def reply(self, method: str) -> None:
            status, headers, body = fake.answer(method, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if method == "GET":
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


def open_in_subprocess(
    hub: FakeHub, home: Path, models: list[tuple[str, str | None]], **environment: str
) -> list[dict[str, Any]]:
    # huggingface_hub reads its environment when imported, so the client is a process of its own.
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables.update(HF_ENDPOINT=hub.url, HF_HOME=str(home), NO_PROXY="127.0.0.1", **environment)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(models)],
        env=variables,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_models_are_fetched_with_the_needed_files_only(hub: FakeHub, tmp_path: Path) -> None:
    models = [("acme/qwen2_untied", None), ("acme/qwen2_sharded", "main")]
    single, sharded = open_in_subprocess(hub, tmp_path, models)
    expected = [
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert single["files"] == expected
    assert hub.fetched("acme/qwen2_untied") == set(expected)
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert shards < set(sharded["files"])
    assert single["revision"] == sharded["revision"] == COMMIT
    assert single["sum"] != 0
    assert sharded["sum"] != 0


def test_cached_model_opens_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    models = [("acme/qwen2_sharded", None), ("acme/never_seen", None)]
    first = open_in_subprocess(hub, tmp_path, models[:1])
    hub.requests.clear()
    second, unknown = open_in_subprocess(hub, tmp_path, models, HF_HUB_OFFLINE="1")
    assert second == first[0]
    assert "the hub is out of reach and the cache does not hold it" in unknown["error"]
    assert hub.requests == []


def test_hub_failures_name_the_model_and_what_to_do(hub: FakeHub, tmp_path: Path) -> None:
    cases = {
        ("acme/missing", None): "CheckpointError: acme/missing is neither a folder here nor a",
        ("acme/gated", None): "CheckpointError: acme/gated is gated: accept its terms",
        ("acme/qwen2_untied", "v9"): "CheckpointError: acme/qwen2_untied has no revision 'v9'",
        ("acme/broken", None): "CheckpointError: acme/broken cannot be fetched",
        ("acme/pickled", None): "CheckpointError: acme/pickled holds only pytorch_model.bin",
        ("acme/llama", None): "model_type 'llama' is not supported",
    }
    results = open_in_subprocess(hub, tmp_path, list(cases))
    for result, message in zip(results, cases.values(), strict=True):
        assert message in result.get("error", str(result))
    assert hub.fetched("acme/llama") == {"config.json", "generation_config.json"}
    assert "pytorch_model.bin" not in hub.fetched("acme/pickled")
