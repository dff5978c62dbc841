"""Proof that a bundle answers like its checkpoint: prompts, cases, reference, report."""

from __future__ import annotations

from qwen_export.parity.ladder import verify
from qwen_export.parity.places import Place, open_place
from qwen_export.parity.report import ParityReport

__all__ = ["ParityReport", "Place", "open_place", "verify"]
