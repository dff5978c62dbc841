"""``python -m qwen_runtime`` is ``qwen-run``."""

from qwen_runtime.cli import main

main()
