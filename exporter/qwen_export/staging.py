"""An output folder that is either complete or not there.

Everything is written to a hidden sibling folder, which takes the output's place by renaming. A
build that dies leaves only the hidden folder; the next build removes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from qwen_export.errors import OutputError

__all__ = ["install", "require_absent", "staging_folder"]

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# Process ids are used again (in a container each build may be number 1), so that the id alone
# does not tell this process's folders from those of one that died.
_PROCESS = secrets.token_hex(4)
_BUILDS = count(1)


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
    build = f"{os.getpid()}-{_PROCESS}-{next(_BUILDS)}"
    folder = output.parent / f".{output.name}.building-{build}"
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


def install(
    staged: Path,
    output: Path,
    *,
    overwrite: bool,
    refuse: Callable[..., None] | None = None,
) -> None:
    """Make ``staged`` become ``output`` in one step.

    Args:
        staged: A complete folder on the same file system.
        output: Its final place.
        overwrite: Replace a bundle or an empty folder that is there; it is deleted.
        refuse: Says what may be replaced, as `require_absent` does for bundles, where something
            else is written.

    Raises:
        OutputError: If ``output`` exists and may not be replaced; both stay as they are.
    """
    for file in staged.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    refuse = refuse or require_absent
    # Asked again: a build takes minutes, in which something may have appeared there.
    refuse(output, overwrite=overwrite)
    if not overwrite or not output.exists():
        _move(staged, output, refuse)
        return
    _exchange(staged, output)
    if staged.is_symlink():
        # The output was a link to a bundle elsewhere; what it led to stays.
        staged.unlink()
    else:
        # The new output stands; what cannot be deleted of the old one is no failure of it.
        shutil.rmtree(staged, ignore_errors=True)


def _move(staged: Path, output: Path, refuse: Callable[..., None]) -> None:
    """Rename a folder to a name that must be free: atomically on Linux."""
    error = _renameat2(staged, output, _RENAME_NOREPLACE)
    if error == 0:
        return
    if error == errno.EEXIST:
        refuse(output, overwrite=False)
    # A system or file system without the flag; rename replaces no more than an empty folder.
    try:
        staged.rename(output)
    except OSError as cause:
        if cause.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            refuse(output, overwrite=False)
        raise


def _exchange(left: Path, right: Path) -> None:
    """Swap two folders: atomically on Linux, else by two renames."""
    if _renameat2(left, right, _RENAME_EXCHANGE) == 0:
        return
    aside = left.with_name(left.name + ".old")
    right.rename(aside)
    left.rename(right)
    aside.rename(left)


def _renameat2(left: Path, right: Path, flags: int) -> int:
    """Linux's rename with flags; gives 0 or the errno."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return errno.ENOSYS
    code = renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), flags)
    return 0 if code == 0 else ctypes.get_errno()


def _remove_leftovers(output: Path) -> None:
    """Remove hidden folders of builds that no longer run."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.building-(\d+)-([0-9a-f]+)-\d+")
    for entry in output.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _runs(int(match[1]), match[2]):
            shutil.rmtree(entry, ignore_errors=True)


def _runs(pid: int, process: str) -> bool:
    if pid == os.getpid():
        return process == _PROCESS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
