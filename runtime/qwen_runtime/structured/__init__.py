"""Structured output: answers that keep to a JSON schema, a pattern, choices or tools."""

from qwen_runtime.structured.grammar import Grammar, GrammarCompiler
from qwen_runtime.structured.processor import (
    StructuredOutputLogitsProcessor,
    structured_output_processor,
)
from qwen_runtime.structured.response_format import ResponseFormat, parse_response_format
from qwen_runtime.structured.tool_calls import tool_call_format

__all__ = [
    "Grammar",
    "GrammarCompiler",
    "ResponseFormat",
    "StructuredOutputLogitsProcessor",
    "parse_response_format",
    "structured_output_processor",
    "tool_call_format",
]
