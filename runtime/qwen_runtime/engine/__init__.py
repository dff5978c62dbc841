"""The loop: requests in, steps over cache slots, tokens out."""

from __future__ import annotations

from qwen_runtime.engine.driver import EngineDriver
from qwen_runtime.engine.engine import Engine, Request
from qwen_runtime.engine.models import Model
from qwen_runtime.engine.prefix import KEPT_SLOTS, PrefixCache
from qwen_runtime.engine.scheduler import Scheduler
from qwen_runtime.engine.slots import SlotManager

__all__ = [
    "KEPT_SLOTS",
    "Engine",
    "EngineDriver",
    "Model",
    "PrefixCache",
    "Request",
    "Scheduler",
    "SlotManager",
]
