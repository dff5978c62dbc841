"""An output folder that is either complete or not there.

Everything is written to a hidden sibling folder, which takes the output's place by renaming. A
build that dies leaves only the hidden folder; the next build removes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_export.errors import OutputError

__all__ = ["install", "require_absent", "staging_folder"]

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def require_absent(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be replaced.

    Raises:
        OutputError: If ``output`` exists and ``overwrite`` is false, or it is not a bundle's
            folder, which is never deleted.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OutputError(
            f"{output} exists; choose another --output or pass --overwrite to replace it",
            path=output,
        )
    empty = output.is_dir() and not any(output.iterdir())
    if not empty and not (output / "manifest.json").is_file():
        raise OutputError(
            f"{output} exists and is not a bundle (it has no manifest.json), so --overwrite "
            "does not replace it; choose another --output",
            path=output,
        )


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A fresh hidden folder beside ``output``, removed at the end whatever happens.

    Raises:
        OutputError: If it cannot be created, or the disk fills up while it is written.
    """
    folder = output.parent / f".{output.name}.building-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        folder.mkdir()
    except OSError as error:
        raise OutputError(f"{folder} must be writable: {error.strerror}", path=folder) from error
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        free = shutil.disk_usage(output.parent).free
        raise OutputError(
            f"{output}: could not be written: {error.strerror} ({free / 1e6:.0f} MB free); free "
            "some space or choose another --output. Nothing was changed.",
            path=output,
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(staged: Path, output: Path) -> None:
    """Make ``staged`` become ``output`` in one step, replacing what is there."""
    for file in staged.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if not output.exists():
        staged.rename(output)
        return
    _exchange(staged, output)
    if staged.is_symlink():
        # The output was a link to a bundle elsewhere; what it led to stays.
        staged.unlink()
    else:
        shutil.rmtree(staged)


def _exchange(left: Path, right: Path) -> None:
    """Swap two folders: atomically on Linux, else by two renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        code = renameat2(
            _AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE
        )
        if code == 0:
            return
    aside = left.with_name(left.name + ".old")
    right.rename(aside)
    left.rename(right)
    aside.rename(left)


def _remove_leftovers(output: Path) -> None:
    """Remove hidden folders of builds that no longer run."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.building-(\d+)")
    for entry in output.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
