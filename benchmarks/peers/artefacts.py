"""Models for every contender, made from one random checkpoint and kept in a folder between runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from random_checkpoint import write_checkpoint

__all__ = ["SHAPE", "ArtefactError", "Workshop"]

SHAPE = "Qwen2.5-0.5B"
_HERE = Path(__file__).parent
_BUILDER_OPTIONS = {
    # int8 activations (the CPU's fast kernels), logits of the last token alone.
    "int4": ("accuracy_level=4", "block_size=32", "prune_lm_head=true", "hf_token=false"),
    "int4-128": ("accuracy_level=4", "block_size=128", "prune_lm_head=true", "hf_token=false"),
    "fp32": ("prune_lm_head=true", "hf_token=false"),
}
"""By precision, and block size where it is not the builder's own."""


class ArtefactError(Exception):
    """A model that could not be made."""


class Workshop:
    """Makes models by name, each once.

    Args:
        folder: Where they lie; what is there is taken as it is.
        python: Interpreter of the peers' environment.
        layers: Layers of the checkpoint; None for the published number.
    """

    def __init__(self, folder: Path, python: Path, layers: int | None) -> None:
        self._folder = folder
        self._python = python
        self._layers = layers
        self._makers: dict[str, Callable[[Path], None]] = {
            "checkpoint": self._checkpoint,
            **{f"ours-{p}": partial(self._bundle, p) for p in ("fp32", "int8", "int4")},
            "bf16.gguf": self._gguf,
            **{f"{t.lower()}.gguf": partial(self._quantized, t) for t in ("Q8_0", "Q4_0")},
            **{f"genai-{p}": partial(self._genai, p) for p in _BUILDER_OPTIONS},
        }

    @property
    def names(self) -> list[str]:
        """Of all models it can make."""
        return list(self._makers)

    def remove(self, name: str) -> None:
        """Forget a model, so that it is made anew."""
        path = self._folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def get(self, name: str) -> Path:
        """The path of a model, made if it is not there.

        Raises:
            ArtefactError: If a tool failed; the message ends with what it said last.
        """
        path = self._folder / name
        if not path.exists():
            print(f"Making {name} ...", file=sys.stderr)
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._folder / f"unfinished-{name}"
            self.remove(unfinished.name)
            self._makers[name](unfinished)
            unfinished.rename(path)
        return path

    def describe(self, name: str) -> str:
        """What a reader of the table must know: what it was told, types of weights."""
        if name.startswith("ours-"):
            manifest = json.loads((self._folder / name / "manifest.json").read_text())
            groups = (manifest.get("quantization") or {}).get("groups", ())
            return ", ".join(f"{g['role']} {g['format']} {_block(g)}".strip() for g in groups)
        if name.startswith("genai-"):
            precision = name.removeprefix("genai-")
            return f"output tensor {precision[:4]}, " + " ".join(_BUILDER_OPTIONS[precision][:-1])
        if name.endswith(".gguf"):
            found = json.loads((self._folder / f"{name}.json").read_text())
            return f"output tensor {found['output']}"
        return ""

    def megabytes(self, name: str) -> float:
        """Size on disk."""
        path = self._folder / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files) / 1e6

    def _checkpoint(self, output: Path) -> None:
        write_checkpoint(SHAPE, output, seed=0, dtype="bf16", layers=self._layers)

    def _bundle(self, precision: str, output: Path) -> None:
        command = [Path(sys.executable).with_name("qwen-export"), "build", self.get("checkpoint")]
        _call([*command, "--output", output, "--precision", precision, "--no-verify"])

    def _gguf(self, output: Path) -> None:
        self._gguf_tool("bf16.gguf", "write", self.get("checkpoint"), output)

    def _quantized(self, ftype: str, output: Path) -> None:
        source = self.get("bf16.gguf")
        self._gguf_tool(f"{ftype.lower()}.gguf", "quantize", source, output, ftype)

    def _gguf_tool(self, name: str, *arguments: str | Path) -> None:
        said = _call([self._python, _HERE / "gguf_file.py", *arguments])
        (self._folder / f"{name}.json").write_text(said.splitlines()[-1])

    def _genai(self, precision: str, output: Path) -> None:
        """The model builder runs in our environment: it needs torch and transformers."""
        site = _call([self._python, "-c", _FIND_BUILDER]).strip()
        source = self._folder / "with-tokenizer"
        self._add_tokenizer(source)
        command = [sys.executable, Path(site) / "onnxruntime_genai" / "models" / "builder.py"]
        command += ["--model_name", SHAPE, "--input", source, "--output", output]
        command += ["--precision", precision.partition("-")[0], "--execution_provider", "cpu"]
        command += ["--cache_dir", self._folder / "builder-cache"]
        _call([*command, "--extra_options", *_BUILDER_OPTIONS[precision]])

    def _add_tokenizer(self, output: Path) -> None:
        """The checkpoint again, as links, with a tokenizer of one word: the builder wants one."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        output.mkdir(exist_ok=True)
        for file in self.get("checkpoint").iterdir():
            link = output / file.name
            if not link.exists():
                link.symlink_to(file.resolve())
        words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(output)


def _block(group: dict[str, Any]) -> str:
    return f"block {group['block_size']}" if group["block_size"] else ""


_FIND_BUILDER = "import sysconfig; print(sysconfig.get_path('platlib'))"


def _call(command: list[Any]) -> str:
    """Run a tool without a network; its standard output."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).splitlines()[-3:])
        raise ArtefactError(f"{' '.join(map(str, command[1:4]))}: {last}")
    return done.stdout
