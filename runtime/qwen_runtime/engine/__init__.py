"""The loop: requests in, steps over cache slots, tokens out."""

from __future__ import annotations

from qwen_runtime.engine.driver import EngineDriver
from qwen_runtime.engine.engine import Engine
from qwen_runtime.engine.limits import EngineLimits
from qwen_runtime.engine.models import Model
from qwen_runtime.engine.prefix import KEPT_SLOTS, PrefixCache
from qwen_runtime.engine.request import Request
from qwen_runtime.engine.scheduler import Scheduler
from qwen_runtime.engine.slots import SlotManager
from qwen_runtime.engine.stats import EngineStats

__all__ = [
    "KEPT_SLOTS",
    "Engine",
    "EngineDriver",
    "EngineLimits",
    "EngineStats",
    "Model",
    "PrefixCache",
    "Request",
    "Scheduler",
    "SlotManager",
]
