"""An engine in a bundle's folder: opened, checked, and whether it can run here.

Needs no TensorRT. engine.json, the document in it, is `qwen_runtime.engine_description`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.engine_description import ENGINE_FILE, EngineDescription, PlanEntry
from qwen_runtime.errors import BundleError

__all__ = ["ENGINES_FOLDER", "EngineFolder", "engine_names", "refusal"]

ENGINES_FOLDER = "engines"
_RTX_SMS = (75, 80, 86, 89, 120, 121)
"""What TensorRT-RTX 1.7 builds for."""
_FIRST_BF16_SM = 80


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """An engine of a bundle, opened.

    Attributes:
        path: ``BUNDLE/engines/<name>``.
        description: Its engine.json.
    """

    path: Path
    description: EngineDescription

    @classmethod
    def open(cls, bundle: Bundle, name: str) -> EngineFolder:
        """Open an engine of a bundle; check presence and sizes, and that it is this bundle's.

        Hashes are left to `check_hashes`.

        Args:
            bundle: The bundle it lies in.
            name: Its folder's name: "tensorrt-rtx".

        Raises:
            BundleError: If there is no such engine, it is damaged, or it was built from other
                graphs or weights than this bundle's.
        """
        names = engine_names(bundle.path)
        if name not in names:
            raise BundleError(
                f"{bundle.path} has no engine {name!r} (it has: {', '.join(names) or 'none'}); "
                f"build one with `qwen-export engine {shlex.quote(str(bundle.path))} --target "
                f"{name}`",
                path=bundle.path / ENGINES_FOLDER / name,
            )
        engine = cls.read(bundle.path / ENGINES_FOLDER / name)
        engine._check_inputs(bundle)
        return engine

    @classmethod
    def read(cls, path: Path) -> EngineFolder:
        """Read an engine's folder, wherever it lies; check presence and sizes of its files.

        Raises:
            BundleError: If a file is missing, damaged, or has another size.
        """
        engine = cls(path, EngineDescription.read(path))
        engine._check_sizes()
        return engine

    @property
    def rebuild_command(self) -> str:
        """The command that builds this engine again, in its place."""
        return _command(self.path.parent.parent, self.description.options)

    def plan_file(self, plan: PlanEntry) -> Path:
        """Path of one of its plans."""
        return self.path / plan.file

    def check_hashes(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Read every plan and compare its sha256.

        Args:
            progress: Called with the number of bytes read since the last call.

        Raises:
            BundleError: Naming the first file that differs.
        """
        for plan in self.description.plans:
            path = self.plan_file(plan)
            found = sha256_of(path, progress)
            if found != plan.sha256:
                raise self._damaged(path, f"sha256 must be {plan.sha256}, got {found}")

    def _check_sizes(self) -> None:
        for plan in self.description.plans:
            path = self.plan_file(plan)
            if not path.is_file():
                raise self._damaged(path, "the file is missing")
            size = path.stat().st_size
            if size != plan.num_bytes:
                raise self._damaged(path, f"size must be {plan.num_bytes} bytes, got {size}")

    def _check_inputs(self, bundle: Bundle) -> None:
        for name, sha256 in self.description.inputs.items():
            entry = bundle.manifest.files.get(name)
            if entry is None or entry.sha256 != sha256:
                raise BundleError(
                    f"{self.path}: the engine must be built from this bundle's {name}, but was "
                    f"built from another; build it again: {self.rebuild_command}",
                    path=self.path,
                )

    def _damaged(self, path: Path, what: str) -> BundleError:
        return BundleError(
            f"{path}: {what}; the engine is damaged: copy it again, or build it again: "
            f"{self.rebuild_command}",
            path=path,
        )


def engine_names(bundle: Path) -> tuple[str, ...]:
    """Names of the engines in a bundle's folder, sorted; unfinished ones are hidden and left out."""
    folder = bundle / ENGINES_FOLDER
    if not folder.is_dir():
        return ()
    names = (entry.name for entry in folder.iterdir() if (entry / ENGINE_FILE).is_file())
    return tuple(sorted(name for name in names if not name.startswith(".")))


def refusal(engine: EngineFolder, version: str, sm: int) -> str | None:
    """Why an engine cannot run here, with the command that builds one that does.

    Args:
        engine: The engine.
        version: The installed release of its flavour, "1.7.1.116".
        sm: The GPU's compute capability: 89 for 8.9.

    Returns:
        One sentence, or None where nothing speaks against it.
    """
    found = engine.description
    if version != found.version:
        return (
            f"{engine.path} must run on the release of {found.flavour} that built it, "
            f"{found.version}, got {version}; build it again: {engine.rebuild_command}"
        )
    if sm not in found.sms:
        return (
            f"{engine.path} was built for SM {', '.join(map(str, found.sms))}, but this GPU has "
            f"SM {sm}; {_for_other_gpus(engine, sm)}"
        )
    return None


def _for_other_gpus(engine: EngineFolder, sm: int) -> str:
    found = engine.description
    if found.flavour == "tensorrt":
        return f"build it again on this machine: {engine.rebuild_command}"
    if sm not in _RTX_SMS:
        return (
            f"TensorRT-RTX builds for SM {', '.join(map(str, _RTX_SMS))} only: choose another "
            "GPU, or backend='onnxruntime'"
        )
    options = _replaced(found.options, "--sms", ",".join(map(str, sorted({*found.sms, sm}))))
    if sm < _FIRST_BF16_SM:
        options = _replaced(options, "--compute-dtype", "fp16")
    bundle = engine.path.parent.parent
    return f"build it again: {_command(bundle, options)}"


def _replaced(options: tuple[str, ...], name: str, value: str) -> tuple[str, ...]:
    """The options with another value of one of them, which need not be there."""
    if name not in options:
        return (*options, name, value)
    index = options.index(name)
    return (*options[: index + 1], value, *options[index + 2 :])


def _command(bundle: Path, options: tuple[str, ...]) -> str:
    return shlex.join(["qwen-export", "engine", str(bundle), *options, "--overwrite"])
