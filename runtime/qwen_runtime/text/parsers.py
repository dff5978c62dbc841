"""Reasoning and tool calls out of a Qwen answer, finished or while it streams.

<think> reasoning </think> content <tool_call> {"name": ..., "arguments": {...}} </tool_call>
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from qwen_runtime.errors import RequestError

__all__ = [
    "ChatEvent",
    "ChatParser",
    "ContentDelta",
    "ParsedChat",
    "ReasoningDelta",
    "ToolCall",
    "parse_chat",
]

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_OUTSIDE_STRING = re.compile(r'["<]')
_INSIDE_STRING = re.compile(r'["\\\x00-\x1f]')


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The next piece of the answer proper."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The next piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call of a tool."""

    index: int
    """0 for the first call of an answer."""
    name: str
    """Name of the function."""
    arguments: str
    """JSON text of an object."""


ChatEvent = ContentDelta | ReasoningDelta | ToolCall


@dataclass(frozen=True, slots=True)
class ParsedChat:
    """A finished answer, taken apart."""

    content: str
    """The text without reasoning and tool calls."""
    reasoning: str
    """What stood between the thinking tags; empty if there were none."""
    tool_calls: tuple[ToolCall, ...]
    """The calls in order."""


def parse_chat(
    text: str, *, reasoning: bool = True, tools: bool = True, starts_in_reasoning: bool = False
) -> ParsedChat:
    """Take a finished answer apart; arguments as in ``ChatParser``."""
    parser = ChatParser(reasoning=reasoning, tools=tools, starts_in_reasoning=starts_in_reasoning)
    events = [*parser.push(text), *parser.finish()]
    return ParsedChat(
        content="".join(event.text for event in events if isinstance(event, ContentDelta)),
        reasoning="".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        tool_calls=tuple(event for event in events if isinstance(event, ToolCall)),
    )


class ChatParser:
    """Turns the text of an answer into events as it arrives.

    However the text is cut into pieces, the joined deltas and the calls are the same.

    Reasoning is a thinking block at the very beginning; an unfinished one is reasoning to the
    end. Line breaks around it belong to neither part, as in Qwen's templates. A tool call is a
    JSON object with a "name" and an object of "arguments" (left out: ``{}``) between its tags;
    anything else between tags stays content. White space that touches a call is content only
    where it parts two pieces of content.

    Args:
        reasoning: Look for a thinking block.
        tools: Look for tool calls.
        starts_in_reasoning: The prompt ended with the opening tag, so the answer begins inside.

    Raises:
        RequestError: If the answer shall start in reasoning that is not looked for.
    """

    def __init__(
        self, *, reasoning: bool = True, tools: bool = True, starts_in_reasoning: bool = False
    ) -> None:
        if starts_in_reasoning and not reasoning:
            raise RequestError(
                "starts_in_reasoning needs reasoning to be looked for, got reasoning=False; "
                "pass reasoning=True",
                param="starts_in_reasoning",
            )
        self._tools = tools
        self._text = ""  # what has arrived and is not decided
        self._events: list[ChatEvent] = []
        self._num_calls = 0
        self._space = ""  # white space that may turn out to touch a call
        self._space_touches_call = False
        self._any_content = False
        self._skip_line_breaks = starts_in_reasoning
        self._reset_call()
        if starts_in_reasoning:
            self._state = self._in_reasoning
        else:
            self._state = self._at_start if reasoning else self._in_content

    def push(self, text: str) -> list[ChatEvent]:
        """Append text and return what it decided, in order."""
        self._text += text
        return self._run(final=False)

    def finish(self) -> list[ChatEvent]:
        """End the answer and return what was still undecided."""
        events = self._run(final=True)
        if self._space and not self._space_touches_call:
            events.append(ContentDelta(self._space))
        self._space = ""
        return events

    def _run(self, *, final: bool) -> list[ChatEvent]:
        while self._state(final):
            pass
        return self._take_events()

    def _take_events(self) -> list[ChatEvent]:
        events, self._events = self._events, []
        return events

    # Each state consumes what it can of the text; True means another state may go on.

    def _at_start(self, final: bool) -> bool:
        text = self._text.lstrip()
        if text.startswith(_THINK):
            self._text = text[len(_THINK) :]
            self._skip_line_breaks = True
            self._state = self._in_reasoning
            return True
        if _THINK.startswith(text) and not final:
            return False
        self._state = self._in_content
        return True

    def _in_reasoning(self, final: bool) -> bool:
        self._drop_line_breaks()
        end = self._text.find(_END_THINK)
        if end >= 0:
            self._emit_reasoning(self._text[:end].rstrip("\n"))
            self._text = self._text[end + len(_END_THINK) :]
            self._skip_line_breaks = True
            self._state = self._in_content
            return True
        held = 0 if final else _overlap(self._text, _END_THINK)
        certain = len(self._text[: len(self._text) - held].rstrip("\n"))
        self._emit_reasoning(self._text[:certain])
        self._text = self._text[certain:]
        return False

    def _in_content(self, final: bool) -> bool:
        self._drop_line_breaks()
        start = self._text.find(_CALL) if self._tools else -1
        if start >= 0:
            self._emit_content(self._text[:start])
            self._text = self._text[start:]
            self._reset_call()
            self._state = self._in_call
            return True
        held = _overlap(self._text, _CALL) if self._tools and not final else 0
        certain = len(self._text) - held
        self._emit_content(self._text[:certain])
        self._text = self._text[certain:]
        return False

    def _in_call(self, final: bool) -> bool:
        end = self._find_call_end()
        if end is None and not final:
            return False
        call = None if end is None or end < 0 else self._parse_call(self._text[len(_CALL) : end])
        if call is None or end is None:
            # The opening tag is content after all; the rest may still hold a call.
            self._emit_content(_CALL)
            self._text = self._text[len(_CALL) :]
        else:
            self._events.append(call)
            self._num_calls += 1
            self._space_touches_call = True
            self._text = self._text[end + len(_END_CALL) :]
        self._state = self._in_content
        return True

    def _reset_call(self) -> None:
        self._scanned = len(_CALL)
        self._inside_string = False

    def _find_call_end(self) -> int | None:
        """Go on looking for the closing tag outside of JSON strings.

        Returns:
            Its offset, -1 if this can't become a call, or None if more text has to decide.
        """
        while True:
            pattern = _INSIDE_STRING if self._inside_string else _OUTSIDE_STRING
            found = pattern.search(self._text, self._scanned)
            if found is None:
                self._scanned = len(self._text)
                return None
            place, character = found.start(), found.group()
            width = 1
            if character == '"':
                self._inside_string = not self._inside_string
            elif character == "\\":
                width = 2
                if place + width > len(self._text):
                    self._scanned = place
                    return None
            elif character == "<":
                rest = self._text[place : place + len(_END_CALL)]
                if rest == _END_CALL:
                    return place
                self._scanned = place
                return None if _END_CALL.startswith(rest) else -1
            else:
                return -1  # a line break in a string
            self._scanned = place + width

    def _parse_call(self, body: str) -> ToolCall | None:
        try:
            call = json.loads(body, parse_constant=_refuse_constant)
            if not isinstance(call, dict):
                return None
            name, arguments = call.get("name"), call.get("arguments", {})
            if not isinstance(name, str) or not name or not isinstance(arguments, dict):
                return None
            name.encode()
            return ToolCall(index=self._num_calls, name=name, arguments=_to_json(arguments))
        except (ValueError, RecursionError):  # malformed, out of range, or absurdly deep
            return None

    def _drop_line_breaks(self) -> None:
        if self._skip_line_breaks:
            self._text = self._text.lstrip("\n")
            self._skip_line_breaks = not self._text

    def _emit_reasoning(self, text: str) -> None:
        if text:
            self._events.append(ReasoningDelta(text))

    def _emit_content(self, text: str) -> None:
        """Emit content but for its trailing white space, which a call may follow."""
        text = self._space + text
        certain = text.rstrip()
        self._space = text[len(certain) :]
        if not certain:
            return
        if self._space_touches_call and not self._any_content:
            certain = certain.lstrip()
        self._events.append(ContentDelta(certain))
        self._any_content = True
        self._space_touches_call = False


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a tag."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0


def _to_json(arguments: dict[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair can only be sent as an escape
        return json.dumps(arguments, allow_nan=False)
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
