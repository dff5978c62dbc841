"""What a machine can build and run, and what to do about the rest.

    examine() ── Machine ── capabilities(), faults() ── report_text()

Needs no extra of qwen-export: what is missing is what it is asked for.
"""

from __future__ import annotations

from qwen_export.doctor.bundle_fit import BundleFacts, bundle_capabilities, read_bundle
from qwen_export.doctor.examination import examine
from qwen_export.doctor.machine import Machine
from qwen_export.doctor.page import report_text
from qwen_export.doctor.verdict import Capability, Fault, capabilities, faults

__all__ = [
    "BundleFacts",
    "Capability",
    "Fault",
    "Machine",
    "bundle_capabilities",
    "capabilities",
    "examine",
    "faults",
    "read_bundle",
    "report_text",
]
