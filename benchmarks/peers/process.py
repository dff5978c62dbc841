"""A contender's process, spoken to in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from types import TracebackType
from typing import Any

__all__ = ["Process", "ProcessError"]


class ProcessError(Exception):
    """A contender that ended by itself."""


class Process:
    """A running `worker.py`; ends when left as a context.

    Args:
        command: Starts it.
        name: Of the contender, for errors.

    Raises:
        ProcessError: If it could not load its model.
    """

    def __init__(self, command: list[str], name: str) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        try:
            self.loaded = self._answer()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            ProcessError: If the process ended; the message ends with its last line.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: reading its answer says why
            print(json.dumps({verb: arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().splitlines() or ["it said nothing"])[-1]
            raise ProcessError(f"{self._name} ended with status {status}: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        self._process.kill()  # it holds nothing that needs to be saved
        self._process.communicate()
        self._errors.close()
