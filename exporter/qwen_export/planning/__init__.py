"""Planning: what a checkpoint is and what its bundle will cost, from its headers alone."""

from __future__ import annotations

from qwen_export.planning.planner import Plan, PlanOptions, PrecisionPlan, plan

__all__ = ["Plan", "PlanOptions", "PrecisionPlan", "plan"]
