"""`qwen-run chat` in a process of its own: what Ctrl-C does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(embedded_bundle: Path) -> None:
    command = [sys.executable, "-m", "qwen_runtime", "chat", str(embedded_bundle), "--greedy"]
    # An end token that never comes: the answer would fill the context.
    endless = [*command, "--eos-token-id", "0", "--max-new-tokens", "1900"]
    chat = subprocess.Popen(
        endless, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write(b"Tell me a story.\n")
    chat.stdin.flush()
    first = os.read(chat.stdout.fileno(), 1)
    chat.send_signal(signal.SIGINT)
    out, err = chat.communicate(b"/quit\n", timeout=60)
    assert first
    assert out.endswith(b"\n")
    assert b"[stopped]" in err
    assert chat.returncode == 0
