"""Text in and out: tokenizer, chat template, detokenizer, stop strings, streams, parsers."""

from qwen_runtime.text.chat_template import ChatTemplate
from qwen_runtime.text.detokenizer import IncrementalDetokenizer
from qwen_runtime.text.parsers import (
    ChatEvent,
    ChatParser,
    ContentDelta,
    ParsedChat,
    ReasoningDelta,
    ToolCall,
    parse_chat,
)
from qwen_runtime.text.stop import StopMatch, StopStringCursor, StopStringMatcher
from qwen_runtime.text.stop_text import StoppingDetokenizer, trim_stop_string
from qwen_runtime.text.streamers import TextIteratorStreamer, TextStreamer
from qwen_runtime.text.tokenizer import Tokenizer
from qwen_runtime.text.tool_schema import tool_schema

__all__ = [
    "ChatEvent",
    "ChatParser",
    "ChatTemplate",
    "ContentDelta",
    "IncrementalDetokenizer",
    "ParsedChat",
    "ReasoningDelta",
    "StopMatch",
    "StopStringCursor",
    "StopStringMatcher",
    "StoppingDetokenizer",
    "TextIteratorStreamer",
    "TextStreamer",
    "Tokenizer",
    "ToolCall",
    "parse_chat",
    "tool_schema",
    "trim_stop_string",
]
