"""Continuous batching: many clients against one, against a static batch, and with long prompts.

    python benchmarks/serving_engine.py --bundle DIR [--clients 16] [--requests 128] [--json]

Three things are measured in one process, greedy, with prompts of random ids and no end token:

* aggregate tokens/s of one client and of many, each with one request after the other;
* requests whose output lengths are uniform in 8..256: all given to the engine with its own limits,
  and the same ones in their order in static batches of as many rows as there are clients, as a
  plain generate() runs them: prompts padded to the longest (the pads are computed), every row as
  long as the longest output. Only tokens that were asked for are counted. The longest of 16
  outputs is 1.83 times the mean, so that a gain beyond that comes from more rows in a step;
* time between two tokens of running rows, first undisturbed, then while prompts of 2,000 tokens
  arrive one after the other: median and 99th percentile.

A bundle with the shape of Qwen2.5-0.5B: `python -m benchmarks.peers --help` says how ours-int8 is
built. Run it on an idle machine; it warns when the load average says that it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

import numpy as np
from common import report, warn_if_busy

from qwen_runtime import LLM, AsyncLLM
from qwen_runtime.engine.limits import MAX_NUM_SEQS

GREEDY = {"do_sample": False, "eos_token_id": None, "repetition_penalty": 1.0}
SHORTEST, LONGEST = 8, 256
LONG_PROMPT = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=128, help="of the mixed lengths")
    parser.add_argument("--long-prompts", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=MAX_NUM_SEQS)
    parser.add_argument("--prefill-chunk-size", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parts = ["clients", "static", "pace"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warn_if_busy()
    measure = {"clients": clients, "static": static, "pace": pace}
    result: dict[str, object] = {}
    with LLM(
        arguments.bundle,
        max_num_seqs=arguments.max_num_seqs,
        max_queued_requests=arguments.requests,
        prefix_cache_slots=0,
        prefill_chunk_size=arguments.prefill_chunk_size,
        threads=arguments.threads,
    ) as llm:
        if llm.tokenizer is None and "pace" in arguments.parts:
            sys.exit(f"pace reads streams, which need a tokenizer; {arguments.bundle} has none")
        llm.generate(prompts(llm, [16])[0], max_new_tokens=8, **GREEDY)  # warm-up
        for part in arguments.parts:
            result |= asyncio.run(measure[part](AsyncLLM(llm), arguments))
    report(result, as_json=arguments.json)


async def clients(service: AsyncLLM, arguments: argparse.Namespace) -> dict[str, object]:
    """Tokens/s of one client and of many."""

    async def client(asked: list[list[int]]) -> None:
        for prompt in asked:
            await service.generate(prompt, max_new_tokens=64, **GREEDY)

    async def rate(number: int, seed: int) -> float:
        asked = [prompts(service.llm, [32] * 3, seed=100 * seed + n) for n in range(number)]
        start = time.perf_counter()
        await asyncio.gather(*map(client, asked))
        return 3 * 64 * number / (time.perf_counter() - start)

    # In turn, so that a drifting machine hurts both alike.
    pairs = [(await rate(1, seed), await rate(arguments.clients, seed)) for seed in range(3)]
    one, many = (float(np.median(rates)) for rates in zip(*pairs, strict=True))
    return {
        "tokens/s, 1 client": round(one, 1),
        f"tokens/s, {arguments.clients} clients": round(many, 1),
        "ratio (at least 3)": round(float(np.median([n / m for m, n in pairs])), 2),
    }


async def static(service: AsyncLLM, arguments: argparse.Namespace) -> dict[str, object]:
    """Useful tokens/s of continuous and of static batches."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(SHORTEST, LONGEST + 1, arguments.requests).tolist()
    asked = prompts(service.llm, rng.integers(8, 65, arguments.requests).tolist(), seed=2)

    async def one(prompt: list[int], length: int) -> None:
        await service.generate(prompt, max_new_tokens=length, **GREEDY)

    start = time.perf_counter()
    await asyncio.gather(*map(one, asked, lengths))
    continuous = sum(lengths) / (time.perf_counter() - start)

    start = time.perf_counter()
    for first in range(0, len(asked), arguments.clients):
        batch = asked[first : first + arguments.clients]
        width = max(map(len, batch))
        # Random ids in place of pads: a plain generate() computes those, too, and hides them.
        padded = [
            pads + prompt
            for pads, prompt in zip(
                prompts(service.llm, [width - len(prompt) for prompt in batch], seed=first),
                batch,
                strict=True,
            )
        ]
        longest = max(lengths[first : first + arguments.clients])
        await asyncio.to_thread(
            service.llm.generate, np.array(padded), max_new_tokens=longest, **GREEDY
        )
    batched = sum(lengths) / (time.perf_counter() - start)
    return {
        "tokens/s, static batches": round(batched, 1),
        "tokens/s, continuous": round(continuous, 1),
        "ratio (at least 2)": round(continuous / batched, 2),
    }


async def pace(service: AsyncLLM, arguments: argparse.Namespace) -> dict[str, object]:
    """Milliseconds between tokens of running rows, with and without long prompts that arrive."""
    limit = service.llm.bundle.manifest.max_context
    length = min(LONG_PROMPT, limit - 8)
    gaps: dict[str, list[float]] = {"quiet": [], "arriving": []}
    phase, over = "quiet", False

    async def reader(prompt: list[int]) -> None:
        while not over:
            stream = service.stream(prompt, max_new_tokens=min(1024, limit - 64), **GREEDY)
            last = None
            async for chunk in stream.chunks():
                now = time.perf_counter()
                # Of a chunk with several tokens, the later ones were there at once.
                if last is not None and chunk.token_ids:
                    gaps[phase] += [1e3 * (now - last)] + [0.0] * (len(chunk.token_ids) - 1)
                last = now
                if over:
                    break
            await stream.aclose()

    readers = [
        asyncio.create_task(reader(prompt))
        for prompt in prompts(service.llm, [16] * (arguments.clients - 1), seed=3)
    ]
    while len(gaps["quiet"]) < 40 * len(readers):
        await asyncio.sleep(0.05)
    phase = "arriving"
    waited = []
    for prompt in prompts(service.llm, [length] * arguments.long_prompts, seed=4):
        start = time.perf_counter()
        await service.generate(prompt, max_new_tokens=1, **GREEDY)
        waited.append(time.perf_counter() - start)
    over = True
    await asyncio.gather(*readers)
    # The first gaps of every reader belong to prompts that come together.
    quiet = np.percentile(gaps["quiet"][10 * len(readers) :], [50, 99])
    arriving = np.percentile(gaps["arriving"], [50, 99])
    return {
        "ms between tokens, quiet: p50": round(quiet[0], 1),
        "ms between tokens, quiet: p99": round(quiet[1], 1),
        f"... prompts of {length} arrive: p50": round(arriving[0], 1),
        f"... prompts of {length} arrive: p99": round(arriving[1], 1),
        "p99 / p50 (at most 3)": round(arriving[1] / arriving[0], 2),
        "p99 / quiet p50": round(arriving[1] / quiet[0], 2),
        "s to a long prompt's token": round(float(np.median(waited)), 2),
    }


def prompts(llm: LLM, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random ids."""
    rng = np.random.default_rng(seed)
    vocab_size = llm.bundle.manifest.model.vocab_size
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


if __name__ == "__main__":
    main()
