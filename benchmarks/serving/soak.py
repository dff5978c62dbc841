"""Thousands of requests of every kind against a served bundle; exits with 1 if anything is wrong.

    python benchmarks/serving/soak.py artifacts/tiny-qwen2-chat --requests 10000

A server is started for it. Clients send, in a seeded order: chat and plain completions, whole and
streamed, greedy and sampled, several choices, tools, JSON schemas, log-probabilities; requests that
must be refused; streams that they leave in the middle, answers that they do not wait for, and
streams that they read slowly. Every good answer is compared with that of `LLM.generate`, computed
before, and what was read of one that was left with its beginning. At the end nothing may run, wait
or hold a slot; no answer may have been a 500; the server must end by itself; and its memory must
not have grown since the warm-up. Growth compares the median of the last tenth of the samples with
that of the tenth after the warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(1, str(HERE.parent))

from cases import bad_requests, good_cases  # noqa: E402 - stays with its neighbours
from common import report  # noqa: E402 - needs the path above
from server_process import ServerError, ServerProcess  # noqa: E402 - stays with its neighbours
from visitor import Visitor  # noqa: E402 - stays with its neighbours
from wire import get_json, get_text  # noqa: E402 - stays with its neighbours

from qwen_runtime import LLM  # noqa: E402 - stays with its neighbours

_SAMPLE_S = 1.0
_REQUEST_S = 120.0
_SETTLE_S = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="a small chat model in fp32")
    parser.add_argument("--requests", type=int, default=10_000, help="default 10000")
    parser.add_argument("--clients", type=int, default=24, help="at once; default 24")
    parser.add_argument("--minutes", type=float, default=30, help="stop after these; default 30")
    parser.add_argument("--warm-up", type=float, default=0.2, help="of the samples; default 0.2")
    parser.add_argument("--max-growth", type=float, default=0.02, help="of memory; default 0.02")
    parser.add_argument("--threads", type=int, default=1, help="of the model; default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the order; default 0")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    args = parser.parse_args()
    if min(args.requests, args.clients, args.threads) < 1 or args.minutes <= 0:
        parser.error("--requests, --clients and --threads must be at least 1, --minutes above 0")
    if not 0 <= args.warm_up <= 0.8:
        parser.error(f"--warm-up must be a share of 0 to 0.8, got {args.warm_up}")
    with LLM(args.bundle, threads=args.threads) as llm:
        cases = good_cases(llm)
        refusals = bad_requests(llm.bundle.manifest.max_context)
    command = [sys.executable, "-m", "qwen_runtime", "serve", args.bundle, "--port", "0"]
    try:
        with ServerProcess([*command, "--threads", str(args.threads)]) as server:
            soak = Soak(server, Visitor(server.port, cases, refusals, args.seed))
            result = asyncio.run(soak.run(args.requests, args.clients, args.minutes * 60))
            result["exit status"] = server.stop()
    except ServerError as error:
        sys.exit(f"Error: {error}")
    growth = memory_growth(soak.memory_mb, args.warm_up)
    result["memory growth"] = growth
    wrong = [*soak.wrong]
    if growth > args.max_growth:
        wrong.append(f"memory grew by {growth:.2%}, more than {args.max_growth:.2%}")
    if result["exit status"] != 0:
        wrong.append(f"the server ended with status {result['exit status']}")
    result["wrong"] = wrong
    result["load average"] = [round(load, 1) for load in os.getloadavg()]
    report(result, args.as_json)
    sys.exit(bool(wrong))


def memory_growth(samples_mb: list[float], warm_up: float) -> float:
    """How much memory has grown since the warm-up, as a share of what it was then.

    Args:
        samples_mb: Memory at even intervals.
        warm_up: Share of the samples that do not count.
    """
    tenth = max(1, len(samples_mb) // 10)
    start = int(len(samples_mb) * warm_up)
    before = statistics.median(samples_mb[start : start + tenth])
    return statistics.median(samples_mb[-tenth:]) / before - 1


class Soak:
    """Sends requests to a server and keeps account of it.

    Args:
        server: That is running.
        visitor: Makes the requests.
    """

    def __init__(self, server: ServerProcess, visitor: Visitor) -> None:
        self._server = server
        self._visitor = visitor
        self._counts: Counter[str] = Counter()
        self.memory_mb: list[float] = []
        """Of the server, once a second."""
        self.wrong: list[str] = []
        """What must not have happened; the first hundred."""

    async def run(self, num_requests: int, num_clients: int, seconds: float) -> dict[str, object]:
        """Send requests, and look at what is left of them.

        Args:
            num_requests: How many, unless the time is over first.
            num_clients: How many at once.
            seconds: When to send no more.
        """
        began = time.monotonic()
        watch = asyncio.create_task(self._watch())
        numbers = itertools.takewhile(
            lambda _: time.monotonic() - began < seconds, range(num_requests)
        )
        await asyncio.gather(*(self._client(numbers) for _ in range(num_clients)))
        elapsed = time.monotonic() - began
        await self._settle()
        watch.cancel()
        num_sent = sum(self._counts.values())
        if num_sent < num_requests:
            self._blame(f"only {num_sent} of {num_requests} requests were sent in {elapsed:.0f} s")
        return {
            "requests": num_sent,
            "clients": num_clients,
            "seconds": round(elapsed, 1),
            "requests per second": num_sent / elapsed,
            "good answers compared": self._visitor.num_compared,
            "tokens compared": self._visitor.num_tokens,
            "kinds": dict(sorted(self._counts.items())),
            "memory of the server, MB": _thinned(self.memory_mb),
        }

    async def _client(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            visit = self._visitor.visit(number)
            self._counts[visit.kind] += 1
            try:
                async with asyncio.timeout(_REQUEST_S):
                    problem = await visit.run()
            except TimeoutError:
                problem = f"no answer within {_REQUEST_S:g} s"
            except Exception as error:  # noqa: BLE001 - a client that fails is a result
                problem = f"{type(error).__name__}: {error}"
            if problem is not None:
                self._blame(f"request {number} ({visit.kind}, {visit.name}): {problem}")

    async def _watch(self) -> None:
        while True:
            self.memory_mb.append(self._server.memory_mb())
            await asyncio.sleep(_SAMPLE_S)

    async def _settle(self) -> None:
        """Wait until the server knows of all who left; then nothing may be left of them."""
        deadline = time.monotonic() + _SETTLE_S
        while left := await self._left():
            if time.monotonic() > deadline:
                self._blame(f"{_SETTLE_S:g} s after the last request the server has {left}")
                return
            await asyncio.sleep(0.1)
        metrics = await get_text(self._server.port, "/metrics")
        for line in metrics.splitlines():
            name, _, value = line.rpartition(" ")
            failed = name.startswith('qwen:http_responses_total{status="5')
            held = name.startswith(("qwen:num_requests_", "qwen:num_cache_slots_used"))
            if (failed or (held and "_limit" not in name)) and float(value) != 0:
                self._blame(f"/metrics has {line}")

    async def _left(self) -> dict[str, int]:
        health = await get_json(self._server.port, "/health")
        names = ("num_running", "num_waiting", "num_slots_used", "cache_tokens_used")
        counts = {name: health["engine"][name] for name in names}
        counts["requests_active"] = health["requests_active"]
        return {name: count for name, count in counts.items() if count}

    def _blame(self, problem: str) -> None:
        if len(self.wrong) < 100:
            self.wrong.append(problem)


def _thinned(samples: list[float], most: int = 60) -> list[float]:
    step = -(-len(samples) // most)
    return [round(sample, 1) for sample in samples[::step]]


if __name__ == "__main__":
    main()
