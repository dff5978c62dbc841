"""Nothing that runs beside a request changes a bit of what it gets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.bundle import BuildOptions, build, embedded_model
from qwen_runtime import LLM, AsyncLLM

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def service_llm(embedded_bundle: Path) -> Iterator[LLM]:
    """Few rows and small chunks, so that requests wait and prompts are cut."""
    with LLM(embedded_bundle, max_num_seqs=5, prefill_chunk_size=16, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain_llm(embedded_bundle: Path) -> Iterator[LLM]:
    """One request at a time, prompts whole."""
    with LLM(embedded_bundle, prefix_cache_slots=0, threads=1) as llm:
        yield llm


def prompts(llm: LLM, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(7)
    vocab_size = llm.bundle.manifest.model.vocab_size
    shared = rng.integers(0, vocab_size, 40).tolist()
    made = []
    for index, length in enumerate(lengths):
        own = rng.integers(0, vocab_size, length).tolist()
        made.append((shared + own)[:length] if index % 3 == 0 else own)
    return made


def ask_at_once(llm: LLM, asked: list[tuple[list[int], dict[str, Any]]], order: Any) -> list[Any]:
    """All requests over one engine, coming in some order, some while others run."""

    async def one(service: AsyncLLM, index: int, place: int) -> Any:
        while service.stats().num_generated_tokens < start + place:
            await asyncio.sleep(0.001)
        prompt, settings = asked[index]
        return await service.generate(prompt, **settings)

    async def everything() -> list[Any]:
        service = AsyncLLM(llm)
        tasks = [one(service, index, place) for place, index in enumerate(order)]
        results = await asyncio.gather(*tasks)
        return [results[list(order).index(index)] for index in range(len(asked))]

    start = llm.stats().num_generated_tokens
    return asyncio.run(everything())


@pytest.mark.slow
@given(order=st.permutations(range(8)))
@settings(max_examples=3, deadline=None)
def test_greedy_and_seeded_outputs_are_bit_equal_alone_and_in_company(
    service_llm: LLM, plain_llm: LLM, order: list[int]
) -> None:
    lengths = [90, 3, 47, 131, 1, 64, 33, 200]
    asked: list[tuple[list[int], dict[str, Any]]] = []
    for index, prompt in enumerate(prompts(plain_llm, lengths)):
        chosen: dict[str, Any] = {"max_new_tokens": 12 + 3 * index, "logprobs": True}
        if index % 2:
            chosen |= {"do_sample": True, "seed": index, "top_logprobs": 3, "eos_token_id": None}
        else:
            chosen |= GREEDY
        asked.append((prompt, chosen))
    alone = [plain_llm.generate(prompt, **chosen) for prompt, chosen in asked]

    together = ask_at_once(service_llm, asked, order)

    # Log-probabilities are compared bit by bit: any other rounding would show.
    assert together == alone


def test_prompt_in_chunks_gives_the_logits_of_the_whole_prompt(
    service_llm: LLM, plain_llm: LLM
) -> None:
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    (long,) = prompts(plain_llm, [301])
    whole = plain_llm.generate(long, **settings, **GREEDY)

    async def ask() -> Any:
        service = AsyncLLM(service_llm)
        # A row that decodes makes the prompt run in chunks.
        stream = service.stream(prompts(plain_llm, [4, 5])[1], max_new_tokens=60, **GREEDY)
        await anext(stream.chunks())
        steps = service.stats().num_steps
        output = await service.generate(long, **settings, **GREEDY)
        assert service.stats().num_steps - steps >= 301 // 16
        await stream.aclose()
        return output

    np.testing.assert_array_equal(asyncio.run(ask()).logits[0], whole.logits[0])


@pytest.mark.slow
def test_int8_prompt_gives_the_same_logits_alone_and_in_company(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    build(embedded_model(), folder, BuildOptions(precision="int8", quantizer="rtn", verify=False))
    with LLM(folder, max_num_seqs=5, prefill_chunk_size=16, threads=1) as llm:
        lengths = [90, 47, 131, 64, 33, 200]
        # Kernels for one row and for many differ at decode; a prompt's logits must not.
        chosen = {"max_new_tokens": 1, "logprobs": True, "top_logprobs": 5, **GREEDY}
        busy = {"max_new_tokens": 60, **GREEDY}
        measured = [(prompt, chosen) for prompt in prompts(llm, lengths)]
        alone = [llm.generate(prompt, **settings) for prompt, settings in measured]
        company = [(prompt, busy) for prompt in prompts(llm, [7, 21, 40])]

        together = ask_at_once(llm, company + measured, range(9))

    assert together[3:] == alone
