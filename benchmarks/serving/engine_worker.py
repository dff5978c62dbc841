"""The engine without a server, in a process of its own: answers lines of JSON.

    python engine_worker.py BUNDLE --threads 1

`{"clients": {"asked": [[prompt, num_tokens], ...], "num_clients": 4, "end_tokens": []}}` streams
answers to tasks of one event loop and gives the timelines; `{"batches": {"asked": ..., "size": 16}}`
runs static batches, each as long as its longest answer. Prompts of a batch are padded on the left
and the pads are computed, as where a batch is one array.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from load import Asked, run_clients

from qwen_runtime import LLM, AsyncLLM

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    with LLM(args.bundle, threads=args.threads) as llm:
        print(json.dumps({}), flush=True)
        for line in sys.stdin:
            ((verb, arguments),) = json.loads(line).items()
            asked = [Asked(*each) for each in arguments.pop("asked")]
            if verb == "clients":
                answer = asyncio.run(_clients(llm, asked, **arguments))
            else:
                answer = {"seconds": _batches(llm, asked, **arguments)}
            print(json.dumps(answer), flush=True)


async def _clients(
    llm: LLM, asked: list[Asked], num_clients: int, end_tokens: list[int]
) -> dict[str, Any]:
    engine = AsyncLLM(llm)
    bias: dict[str, Any] = {"logit_bias": dict.fromkeys(end_tokens, -100.0)} if end_tokens else {}

    async def stream(each: Asked) -> AsyncIterator[object]:
        answer = engine.stream(
            each.prompt, do_sample=False, max_new_tokens=each.num_tokens, **bias
        )
        async for chunk in answer.chunks():
            # As a server does: what brings no text yet is not sent.
            if chunk.text:
                yield chunk

    began = time.process_time()
    seconds, timelines = await run_clients(stream, asked, num_clients)
    return {
        "seconds": seconds,
        "timelines": [dataclasses.astuple(each) for each in timelines],
        "cpu_s": time.process_time() - began,
    }


def _batches(llm: LLM, asked: list[Asked], size: int) -> float:
    began = time.monotonic()
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        longest = max(len(each.prompt) for each in batch)
        rows = [[0] * (longest - len(each.prompt)) + each.prompt for each in batch]
        num_tokens = max(each.num_tokens for each in batch)
        llm.generate(np.array(rows), do_sample=False, max_new_tokens=num_tokens)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
