"""Graphs rewritten for one engine's own operators, over the bundle's weights file."""

from qwen_export.lowering.folder import lower_bundle
from qwen_export.lowering.options import LoweringOptions

__all__ = ["LoweringOptions", "lower_bundle"]
