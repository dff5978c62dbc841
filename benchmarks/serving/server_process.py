"""A server in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["ServerError", "ServerProcess"]

_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


class ServerError(Exception):
    """A server that did not start, or did not end as it should."""


class ServerProcess:
    """A server that runs while a ``with`` block lasts.

    Args:
        command: Starts it on 127.0.0.1 and has it log its address.
        start_s: Seconds it may take until ``/health`` answers with 200.
    """

    def __init__(self, command: Sequence[str | Path], *, start_s: float = 120) -> None:
        self._command = [str(part) for part in command]
        self._start_s = start_s
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.port = 0
        """Where it listens."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        try:
            self._wait_until_ready(time.monotonic() + self._start_s)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    @property
    def log(self) -> str:
        """What it has said."""
        self._log.seek(0)
        return self._log.read()

    def memory_mb(self, name: str = "VmRSS") -> float:
        """A figure of its memory, from ``/proc/PID/status``."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1000
        raise ServerError(f"{name} is no figure of /proc/PID/status")

    def cpu_s(self) -> float:
        """Seconds of CPU time it has used."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, timeout_s: float = 60) -> int:
        """Ask it to end, and give its exit status.

        Raises:
            ServerError: If it does not.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"the server ran on for {timeout_s:g} s after SIGTERM") from error

    def _wait_until_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended at once: {self.log[-500:]}")
            found = _ADDRESS.search(self.log)
            if found is not None:
                self.port = int(found.group(1))
                if self._is_healthy():
                    return
            time.sleep(0.05)
        raise ServerError(f"the server was not ready after {self._start_s:g} s: {self.log[-500:]}")

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as page:
                return bool(page.status == 200)
        except (OSError, urllib.error.URLError):
            return False
