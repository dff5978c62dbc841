"""``python -m qwen_export`` is ``qwen-export``."""

from qwen_export.cli import main

main()
