"""Response formats compiled for one tokenizer, through ``llguidance``."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from qwen_runtime.errors import RequestError
from qwen_runtime.structured.response_format import ResponseFormat, parse_response_format
from qwen_runtime.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["JSON_OPTIONS", "Grammar", "GrammarCompiler", "lark_string"]

JSON_OPTIONS: Final[Mapping[str, object]] = {
    "coerce_one_of": False,
    "lenient": False,
    # One space, or a line break and its indentation. More would let a model fill an answer with
    # white space, which grammars without this limit are known for.
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\x20|\n[\x20\x09]{0,32})?",
}
"""How JSON is written, and that nothing in a schema is skipped."""

_ESCAPED = re.compile(r"[\x7f-\x9f]")


class Grammar:
    """A compiled format, shared by any number of requests.

    Args:
        matcher: At the start of the grammar; never advanced.
        vocab_size: Scores per token of the model.
        response_format: What was compiled.
    """

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, response_format: ResponseFormat
    ) -> None:
        self._matcher = matcher
        self.vocab_size = vocab_size
        self.response_format = response_format

    def matcher(self) -> LLMatcher:
        """A matcher of one's own at the start of the grammar."""
        return self._matcher.deep_copy()


class GrammarCompiler:
    """Compiles formats for one model's vocabulary and keeps the last ones.

    May be used by several threads.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: Scores per token of the model; ids beyond the tokenizer are never allowed.
        cache_size: Compiled grammars to keep, >= 1.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, cache_size: int = 64) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._cache_size = cache_size
        self._cache: OrderedDict[ResponseFormat, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def compile(
        self, response_format: object, *, param: str = "response_format"
    ) -> Grammar | None:
        """Compile a format, or find it compiled.

        Args:
            response_format: See `parse_response_format`.
            param: Argument to name in an error.

        Returns:
            The grammar; None where the answer is free text.

        Raises:
            RequestError: If the format is wrong or cannot be kept to, the tokenizer lacks bytes,
                or ``llguidance`` is not installed.
        """
        parsed = parse_response_format(response_format)
        if parsed is None:
            return None
        with self._lock:
            grammar = self._cache.get(parsed)
            if grammar is None:
                grammar = self._compile(parsed, param)
                self._cache[parsed] = grammar
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(parsed)
            return grammar

    def _compile(self, response_format: ResponseFormat, param: str) -> Grammar:
        llguidance = _import(param)
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(llguidance, self._tokenizer, self._vocab_size, param)
        try:
            text = _LOWER[response_format.kind](llguidance.LLMatcher, response_format.source)
        except ValueError as error:  # JSON that its reader does not take
            raise _refused(str(error), param) from error
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            text, self._vocabulary
        )
        # A warning tells of something in the format that would not be kept to.
        if failed or messages:
            raise _refused(messages[0], param)
        matcher = llguidance.LLMatcher(self._vocabulary, text, log_level=0)
        # What the first mask costs once, its copies need not pay again.
        matcher.compute_bitmask()
        if matcher.is_error():
            # "NoExtension..." is its name for a grammar without a first token.
            fault = matcher.get_error()
            raise _refused("nothing matches it" if fault.startswith("NoExt") else fault, param)
        return Grammar(matcher, self._vocab_size, response_format)


def _import(param: str) -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            f"{param} needs the llguidance package, which is not installed; "
            "run pip install 'qwen-export[grammar]'",
            param=param,
        ) from error
    return llguidance


class _Vocabulary:
    """A tokenizer as ``llguidance`` wants it.

    The end of a grammar is an id of its own behind the vocabulary: which tokens end a request is
    the request's affair.
    """

    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        known = tokenizer.vocabulary_bytes()
        self.tokens = [known.get(i, b"") for i in range(vocab_size)] + [b"<end of grammar>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [
            *(i for i in sorted(tokenizer.special_ids) if i < vocab_size),
            vocab_size,
        ]
        self._specials = tokenizer.special_ids
        self._byte_ids = {known[i]: i for i in sorted(known, reverse=True) if len(known[i]) == 1}
        special = [tokenizer.decode([i]) for i in sorted(tokenizer.special_ids)]
        self._special = re.compile("|".join(re.escape(t) for t in special if t) or r"(?!)")
        self._encode = tokenizer.encode

    def __call__(self, raw: bytes) -> list[int]:
        """Tokens of forced text, as the model would write it."""
        text = raw.decode("utf-8", "ignore")
        ids: list[int] = []
        start = 0
        # Text that reads like a special token must not become one, so it is cut.
        for found in self._special.finditer(text):
            ids += self._encode(text[start : found.start() + 1])
            start = found.start() + 1
        ids += self._encode(text[start:])
        if b"".join(self.tokens[i] for i in ids) == raw and self._specials.isdisjoint(ids):
            return ids
        # A normalizer changed the text, or a special token is a single character.
        return [self._byte_ids[raw[i : i + 1]] for i in range(len(raw))]


def _vocabulary(
    llguidance: ModuleType, tokenizer: Tokenizer, vocab_size: int, param: str
) -> LLTokenizer:
    if not tokenizer.has_every_byte:
        raise RequestError(
            f"{param} needs a tokenizer with a token for each of the 256 bytes, to spell any text; "
            "this bundle's has not",
            param=param,
        )
    wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
    created: LLTokenizer = llguidance.LLTokenizer(wrapped, n_vocab=vocab_size + 1)
    return created


def _lower_choice(_: Any, source: str) -> str:
    choices = " | ".join(lark_string(choice) for choice in json.loads(source))
    return _lower_lark(_, f"start: {choices}")


def _lower_lark(_: Any, source: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": source}]})


_LOWER: Final[Mapping[str, Callable[[Any, str], str]]] = {
    "json_schema": lambda matcher, source: matcher.grammar_from_json_schema(
        source, overrides=dict(JSON_OPTIONS)
    ),
    "regex": lambda matcher, source: matcher.grammar_from_regex(source),
    "choice": _lower_choice,
    "tool_calls": _lower_lark,
}


def lark_string(text: str) -> str:
    """Text as a string of a Lark grammar."""
    quoted = json.dumps(text, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found.group()):04x}", quoted)


def _refused(message: str, param: str) -> RequestError:
    # Parse errors draw the place; their last line says what is wrong.
    stated = re.findall(r"^error: (.+)$", message, re.MULTILINE)
    lines = [line for line in message.splitlines() if line.strip()]
    reason = stated[-1] if stated else lines[0] if lines else "no reason was given"
    return RequestError(
        f"{param} cannot be kept to: {reason.strip()}; simplify the format", param=param
    )
