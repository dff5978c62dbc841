"""What may be a prompt, and what every wrong argument says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import LLM, BackendError, CapacityError, GenerationConfig, RequestError
from qwen_runtime.text import TextStreamer

USER = {"role": "user", "content": "Hello"}


def generate(llm: LLM, *args: Any, **kwargs: Any) -> Any:
    return llm.generate(*args, **{"max_new_tokens": 2, "do_sample": False, **kwargs})


def test_text_ids_and_messages_are_told_apart(text_llm: LLM) -> None:
    tokenizer = text_llm.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("Hello")
    rendered = text_llm._inputs.render([USER])

    outputs = [generate(text_llm, prompt) for prompt in ("Hello", ids, tuple(ids), np.array(ids))]
    chat = generate(text_llm, [USER])

    assert all(output == outputs[0] for output in outputs)
    assert outputs[0].prompt_token_ids == ids
    assert chat.prompt_token_ids == tokenizer.encode(rendered)
    assert chat.prompt_token_ids != ids


def test_one_prompt_gives_one_output_and_a_list_gives_a_list(text_llm: LLM) -> None:
    one = generate(text_llm, "Hello")

    for prompts in (["Hello"], [one.prompt_token_ids]):
        assert generate(text_llm, prompts) == [one]
    assert len(generate(text_llm, [[USER]])) == 1
    mixed = generate(text_llm, ["Hello", one.prompt_token_ids, [USER]])
    assert mixed[:2] == [one, one]
    assert mixed[2] == generate(text_llm, [USER])


def test_two_dimensional_array_is_the_batch_form(text_llm: LLM) -> None:
    ids = np.array([[5, 17, 99], [3, 4, 5]])

    named = generate(text_llm, input_ids=ids.tolist())
    positional = generate(text_llm, ids)

    assert named.sequences.shape == (2, 5)
    np.testing.assert_array_equal(positional.sequences, named.sequences)
    np.testing.assert_array_equal(np.asarray(named), named.sequences)
    assert [output.prompt_token_ids for output in named.outputs] == ids.tolist()


def test_template_arguments_reach_the_template(text_llm: LLM) -> None:
    ending = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]

    plain = generate(text_llm, ending)
    continued = generate(text_llm, ending, chat_template_kwargs={"continue_final_message": True})

    assert text_llm.tokenizer is not None
    assert text_llm.tokenizer.decode(continued.prompt_token_ids).endswith("bcd")
    assert len(continued.prompt_token_ids) < len(plain.prompt_token_ids)


WRONG_PROMPTS: list[tuple[Any, str]] = [
    ("", "at least one token, got an empty text"),
    ([], "must not be an empty list"),
    ([[]], r"a list of prompts must hold .*, got \[\]"),
    ([""], "at least one token, got an empty text"),
    (np.zeros(0, np.int64), "at least one token, got none"),
    (3, "must be text, token ids, messages or a list of these, got int"),
    (USER, "must be text, token ids, messages or a list of these, got dict"),
    (b"Hello", "must be text, token ids, messages or a list of these, got bytes"),
    (np.zeros((1, 1, 1), np.int64), "a list of these, got ndarray"),
    (["Hello", 3], "a list of prompts must hold .*, got 3"),
    (["Hello", None], "a list of prompts must hold .*, got None"),
    ([3, "Hello"], "must be a list of token ids"),
    ([3, None], "must be a list of token ids"),
    ([3, 4.0], r"must be a list of token ids \(integers\), got float64"),
    ([3, True], r"must be a list of token ids \(integers\), got bool"),
    ([True, 3], "a list of prompts must hold .*, got True"),
    (np.array([True, False]), "must be a list of token ids .*got bool"),
    (np.array([3.0]), "must be a list of token ids .*got float64"),
    ([3, 304], r"token ids must be in 0\.\.303 \(the vocabulary\), got 304"),
    ([-1, 3], r"token ids must be in 0\.\.303 \(the vocabulary\), got -1"),
    ([2**70], r"must be a list of token ids"),
    (
        np.array([2**63 + 3], np.uint64),
        r"token ids must be in 0\.\.303 .*, got 9223372036854775811",
    ),
    ("\ud800", "valid Unicode"),
    ([USER, "Hello"], "messages must be dicts"),
]


@pytest.mark.parametrize(("prompt", "message"), WRONG_PROMPTS, ids=repr)
def test_wrong_prompt_is_refused_in_generate_and_stream(
    text_llm: LLM, prompt: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        generate(text_llm, prompt)
    if not isinstance(prompt, list) or not prompt or prompt[0] not in ("", "Hello"):
        with pytest.raises(RequestError, match=message):
            text_llm.stream(prompt, max_new_tokens=2)


WRONG_BATCHES: list[tuple[dict[str, Any], str, str]] = [
    ({"input_ids": [[1, 2], [3]]}, "rows of one length; pad them on the left", "input_ids"),
    ({"input_ids": [1, 2]}, r"a matrix \[rows, length\] of token ids", "input_ids"),
    ({"input_ids": [[True, 2]]}, "got bool of shape", "input_ids"),
    ({"input_ids": [[1.0, 2]]}, "got float64 of shape", "input_ids"),
    ({"input_ids": [[1, 500]]}, r"in 0\.\.303 .*got 500", "input_ids"),
    ({"input_ids": np.zeros((2, 0), np.int64)}, "at least one token", "prompt"),
    ({"input_ids": [[1]], "prompt": "Hello"}, "the prompt or input_ids, not both", "input_ids"),
    ({"attention_mask": [[1]]}, "attention_mask belongs to an array", "attention_mask"),
    (
        {"prompt": "Hello", "attention_mask": [[1]]},
        "attention_mask belongs to an array",
        "attention_mask",
    ),
    (
        {"input_ids": [[1, 2]], "attention_mask": [[1]]},
        r"in the shape of input_ids \[1, 2\], got int64 of shape \[1, 1\]",
        "attention_mask",
    ),
    ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "must hold 0 and 1", "attention_mask"),
    (
        {"input_ids": [[1, 2]], "attention_mask": [["1", "1"]]},
        "must hold 0 and 1",
        "attention_mask",
    ),
    (
        {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1]]},
        "attention_mask must be rows of one length",
        "attention_mask",
    ),
    (
        {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [0, 0]]},
        "row 1 is all padding",
        "attention_mask",
    ),
    (
        {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 0]]},
        "padded on the left, but row 1 ends with padding",
        "attention_mask",
    ),
    ({"input_ids": [[1]], "tools": [{}]}, "tools only works with messages", "tools"),
    (
        {"input_ids": [[1]], "chat_template_kwargs": {"a": 1}},
        "chat_template_kwargs only works with messages",
        "chat_template_kwargs",
    ),
]


@pytest.mark.parametrize(("arguments", "message", "param"), WRONG_BATCHES)
def test_wrong_batch_is_refused_by_the_argument_at_fault(
    text_llm: LLM, arguments: dict[str, Any], message: str, param: str
) -> None:
    with pytest.raises(RequestError, match=message) as error:
        generate(text_llm, **arguments)
    assert error.value.param == param


class NoEnd:
    def put(self, value: Any) -> None: ...


WRONG_ARGUMENTS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 0.0, "do_sample": True}, "temperature must be a finite float > 0", ""),
    ({"temperature": -1.0, "do_sample": True}, "temperature must be a finite float > 0", ""),
    ({"temperature": float("nan"), "do_sample": True}, "temperature must be a finite", ""),
    ({"temperature": "1", "do_sample": True}, "temperature must be a number, got '1'", ""),
    (
        {"temprature": 1.0},
        "unknown setting 'temprature'; did you mean 'temperature'",
        "temprature",
    ),
    ({"max_tokens": 3}, "did you mean 'max_new_tokens'", "max_tokens"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0", ""),
    ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\), got -1", ""),
    ({"tools": [{}]}, "tools only works with messages", "tools"),
    ({"chat_template_kwargs": {"a": 1}}, "only works with messages", "chat_template_kwargs"),
    ({"generation_config": {"do_sample": True}}, "must be a GenerationConfig, got dict", ""),
    ({"logits_processor": len}, "must be a list of callables, got builtin", "logits_processor"),
    ({"logits_processor": ["x"]}, "must hold callables", "logits_processor"),
    ({"logits_processor": [lambda ids: ids]}, "is called with", "logits_processor"),
    ({"stopping_criteria": len}, "must be a list of callables", "stopping_criteria"),
    ({"stopping_criteria": ["x"]}, "criterion must be callable", "stopping_criteria"),
    ({"stopping_criteria": [lambda ids, scores: None]}, "must return a bool", "stopping_criteria"),
    ({"prefix_allowed_tokens_fn": 3}, "must be callable, got int", "prefix_allowed_tokens_fn"),
    ({"streamer": NoEnd()}, "must have put and end, got NoEnd", "streamer"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs=True", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 305}, "at most 304", "top_logprobs"),
    ({"stop": ""}, "non-empty", "stop"),
    ({"num_return_sequences": 2}, "must be 1 in greedy decoding", "num_return_sequences"),
]


@pytest.mark.parametrize(
    ("arguments", "message", "param"), WRONG_ARGUMENTS, ids=lambda value: str(value)[:40]
)
def test_wrong_argument_is_refused_and_the_model_stays_usable(
    text_llm: LLM, arguments: dict[str, Any], message: str, param: str
) -> None:
    before = generate(text_llm, "Hello")

    with pytest.raises(RequestError, match=message) as error:
        generate(text_llm, "Hello", **arguments)

    assert error.value.param == (param or next(iter(arguments)))
    assert generate(text_llm, "Hello") == before


def test_pad_token_beyond_the_vocabulary_is_refused_where_it_would_be_run(text_llm: LLM) -> None:
    first = generate(text_llm, [5, 6], eos_token_id=None).token_ids[0]

    with pytest.raises(RequestError, match=r"pad_token_id must be in 0\.\.303") as error:
        generate(
            text_llm,
            input_ids=[[5, 6], [7, 8]],
            eos_token_id=first,
            pad_token_id=9999,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert error.value.param == "pad_token_id"


def test_streamer_follows_one_prompt_only(text_llm: LLM) -> None:
    streamer = TextStreamer(text_llm.tokenizer)

    with pytest.raises(RequestError, match="a streamer follows one prompt, got a list of 2"):
        generate(text_llm, ["a", "b"], streamer=streamer)
    with pytest.raises(RequestError, match="TextStreamer only supports batch size 1, got 2 rows"):
        generate(text_llm, input_ids=[[1], [2]], streamer=streamer)
    assert generate(text_llm, "Hello").token_ids


@pytest.mark.parametrize("prompt", [["a", "b"], None])
def test_stream_takes_one_prompt(text_llm: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError, match="stream takes one prompt, got"):
        text_llm.stream(prompt)


def test_stream_gives_one_sequence(text_llm: LLM) -> None:
    with pytest.raises(RequestError, match="one sequence as it grows, got num_return_sequences=2"):
        text_llm.stream("a", do_sample=True, num_return_sequences=2, max_new_tokens=2)


def test_prompt_beyond_the_limit_is_refused_with_both_numbers(tiny_llm: LLM) -> None:
    with pytest.raises(
        CapacityError, match=r"prompt must have at most 64 tokens .*got 65"
    ) as error:
        generate(tiny_llm, [1] * 65)
    assert error.value.param == "prompt"


def test_context_is_filled_to_the_last_token_and_not_beyond(tiny_llm: LLM) -> None:
    # The last token is returned, never fed: 64 fed ones and one more.
    assert len(generate(tiny_llm, [1] * 60, max_new_tokens=5).token_ids) == 5
    assert len(generate(tiny_llm, [1] * 64, max_new_tokens=1).token_ids) == 1
    with pytest.raises(CapacityError, match=r"got 60 \+ 6; lower max_new_tokens to 5") as error:
        generate(tiny_llm, [1] * 60, max_new_tokens=6)
    assert error.value.param == "max_new_tokens"
    with pytest.raises(CapacityError, match=r"got 64 \+ 2; lower max_new_tokens to 1"):
        generate(tiny_llm, input_ids=[[1] * 64], max_new_tokens=2)


def test_padding_takes_no_room(tiny_llm: LLM) -> None:
    ids, mask = np.ones((2, 70), np.int64), np.zeros((2, 70), np.int64)
    mask[:, 40:] = 1

    output = generate(tiny_llm, input_ids=ids, attention_mask=mask, max_new_tokens=5)

    alone = generate(tiny_llm, [1] * 30, max_new_tokens=5)
    assert output.sequences.shape == (2, 75)
    assert [row.token_ids for row in output.outputs] == [alone.token_ids] * 2


def test_bundle_without_a_tokenizer_takes_ids_only(tiny_llm: LLM) -> None:
    assert tiny_llm.tokenizer is None
    assert generate(tiny_llm, [1, 2]).text == ""
    with pytest.raises(RequestError, match="text needs a tokenizer, but this bundle has none"):
        generate(tiny_llm, "Hello")
    with pytest.raises(RequestError, match="messages need a chat template, but this bundle has"):
        generate(tiny_llm, [USER])
    with pytest.raises(
        RequestError, match="a stream gives text, but this bundle has no tokenizer"
    ):
        tiny_llm.stream([1, 2], max_new_tokens=2)
    with pytest.raises(RequestError, match="stop needs a tokenizer"):
        generate(tiny_llm, [1, 2], stop="x")


@pytest.fixture
def llm_with_template(text_bundle: Path, tmp_path: Path) -> Iterator[Callable[[str | None], LLM]]:
    """The small model with another chat template, or none."""
    opened: list[LLM] = []

    def make(template: str | None) -> LLM:
        folder = Path(shutil.copytree(text_bundle, tmp_path / "bundle"))
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if template is None:
            manifest["tokenizer"]["chat_templates"] = {}
        else:
            (folder / "chat_template.jinja").write_text(template)
            manifest["files"]["chat_template.jinja"]["num_bytes"] = len(template)
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        opened.append(LLM(folder))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def test_messages_to_a_bundle_without_a_template_are_refused(
    llm_with_template: Callable[[str | None], LLM],
) -> None:
    llm = llm_with_template(None)

    assert generate(llm, "Hello").token_ids
    with pytest.raises(RequestError, match="messages need a chat template") as error:
        generate(llm, [USER])
    assert error.value.param == "prompt"


def test_template_that_raises_is_an_error_with_its_message(
    llm_with_template: Callable[[str | None], LLM],
) -> None:
    llm = llm_with_template("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(RequestError, match="roles must alternate"):
        generate(llm, [USER])
    assert generate(llm, "Hello").token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device must be .*got 'tpu'"),
        ({"backend": "torch"}, "backend must be .*got 'torch'"),
        ({"threads": 0}, "threads must be an integer >= 1"),
    ],
)
def test_wrong_engine_option_is_refused(
    text_bundle: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as error:
        LLM(text_bundle, **arguments)
    assert error.value.param == next(iter(arguments))


def test_closed_llm_says_so(text_bundle: Path) -> None:
    llm = LLM(text_bundle)
    stream = llm.stream("a", max_new_tokens=2)
    llm.close()
    llm.close()

    with pytest.raises(BackendError, match="the LLM is closed"):
        generate(llm, "Hello")
    with pytest.raises(BackendError, match="the LLM is closed"):
        next(stream)


def test_settings_object_is_not_changed_by_a_call(text_llm: LLM) -> None:
    settings = GenerationConfig(do_sample=False)
    copy = GenerationConfig(do_sample=False)

    text_llm.generate("Hello", settings, max_new_tokens=2)

    assert settings == copy


@pytest.mark.parametrize("content", [b"hello", {"hello"}, np.zeros(2)])
def test_message_content_that_is_no_text_is_refused_by_its_type(
    text_llm: LLM, content: object
) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": content}]
    with pytest.raises(RequestError, match=f"message 1 .*got {type(content).__name__}") as caught:
        text_llm.generate(messages, max_new_tokens=1)
    assert caught.value.param == "messages"
