"""The parts of `over_http.py`: what each sends, and what it makes of the times."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from load import (
    Asked,
    LlamaServer,
    OurServer,
    Target,
    Timeline,
    inter_token_ms,
    percentile,
    run_clients,
    streamed,
)
from process import Process
from server_process import ServerProcess

__all__ = ["PARTS", "Plan"]

_HERE = Path(__file__).parent
_SLOTS = 16
_LONG_PROMPT = 2000
_CLIENTS = (1, 2, 4, 8, 16)
_SEEDS = itertools.count()
_SMALL_ROUNDS = 3  # times the rounds of a large model: they take a second each


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how much of it."""

    bundle: Path
    small: Path
    """The bundle on which overhead is measured."""
    llama: tuple[Path, Path] | None
    """Program and model of llama.cpp's server."""
    threads: int
    rounds: int
    num_tokens: int
    num_requests: int
    """Of answers with uniform lengths."""
    num_long_tokens: int
    """Of the streams that long prompts disturb."""


def overhead(plan: Plan) -> dict[str, object]:
    """A server against the engine alone."""
    result: dict[str, object] = {}
    end_tokens = _end_tokens(plan.small)
    engine = Process(_worker(plan.small, 1), "engine")
    with engine, _ours(plan.small, 1) as server:
        target = OurServer(server.port, end_tokens)
        for clients in (1, _SLOTS):
            num_tokens = 64
            num_requests = 2 * max(clients, 4)

            def alone(asked: Sequence[Asked], clients: int = clients) -> _Run:
                requests = [astuple(each) for each in asked]
                answer = engine.ask(
                    "clients", asked=requests, num_clients=clients, end_tokens=end_tokens
                )
                timelines = [Timeline(*each) for each in answer["timelines"]]
                return _Run(answer["seconds"], timelines, answer["cpu_s"])

            def over_http(asked: Sequence[Asked], clients: int = clients) -> _Run:
                before = server.cpu_s()
                run = _run(target, asked, clients)
                return replace(run, cpu_s=server.cpu_s() - before)

            pairs = []
            for number in range(plan.rounds * _SMALL_ROUNDS + 1):
                asked = _requests(plan.small, [32] * num_requests, num_tokens)
                if number % 2:
                    http, own = over_http(asked), alone(asked)
                else:
                    own, http = alone(asked), over_http(asked)
                pairs.append((own, http))
            del pairs[0]  # it warmed up
            name = f"{clients} client" + "s" * (clients > 1)
            total = num_requests * num_tokens
            added_ms = [(http.seconds - own.seconds) / total * 1e3 for own, http in pairs]
            first_ms = [(http.first_token_s - own.first_token_s) * 1e3 for own, http in pairs]
            between = [
                statistics.fmean(inter_token_ms(http.timelines))
                - statistics.fmean(inter_token_ms(own.timelines))
                for own, http in pairs
            ]
            added_cpu = [(http.cpu_s - own.cpu_s) / total * 1e3 for own, http in pairs]
            own_ms = statistics.median(own.seconds / total * 1e3 for own, _ in pairs)
            result |= {
                f"overhead, {name}: engine alone, ms a token": own_ms,
                f"overhead, {name}: added, ms a token (at most 0.3)": statistics.median(added_ms),
                f"overhead, {name}: added CPU time, ms a token": statistics.median(added_cpu),
                f"overhead, {name}: added between a stream's tokens, ms": statistics.median(
                    between
                ),
                f"overhead, {name}: added to the first token, ms (at most 5)": statistics.median(
                    first_ms
                ),
            }
    return result


def clients(plan: Plan) -> dict[str, object]:
    """Tokens per second by number of clients."""
    rates: dict[tuple[str, int], list[float]] = {}
    with _targets(plan, 64 + plan.num_tokens) as targets:
        for target in targets.values():
            _run(target, _requests(plan.bundle, [64] * 2, 8), 2)
        for number in range(plan.rounds):
            for count in _CLIENTS:
                asked = _requests(plan.bundle, [64] * count, plan.num_tokens)
                for name in _turn(targets, number):
                    run = _run(targets[name], asked, count)
                    rates.setdefault((name, count), []).append(run.tokens_per_s)
    medians = {key: statistics.median(values) for key, values in rates.items()}
    result: dict[str, object] = {
        f"{name}, {count} clients: tok/s": rate for (name, count), rate in medians.items()
    }
    for name in targets:
        gain = medians[name, _SLOTS] / medians[name, 1]
        result[f"{name}, 16 clients against 1 (ours at least 3)"] = gain
    return result | _ratios(rates, f"{_SLOTS} clients", _SLOTS)


def lengths(plan: Plan) -> dict[str, object]:
    """Answers of different lengths, against static batches."""
    draw = np.random.default_rng(7)
    sizes = draw.integers(16, 257, plan.num_requests).tolist()
    asked = [
        Asked(each.prompt, int(draw.integers(8, 257))) for each in _requests(plan.bundle, sizes, 0)
    ]
    total = sum(each.num_tokens for each in asked)
    result: dict[str, object] = {}
    rates: dict[str, float] = {}
    with _targets(plan, 512) as targets:
        for name, target in targets.items():
            _run(target, _requests(plan.bundle, [64] * 2, 8), 2)
            rates[name] = _run(target, asked, _SLOTS).tokens_per_s
    with Process(_worker(plan.bundle, plan.threads), "engine") as engine:
        requests = [astuple(each) for each in asked]
        engine.ask("batches", asked=[([1] * 16, 4)] * 2, size=2)
        rates["static"] = total / engine.ask("batches", asked=requests, size=_SLOTS)["seconds"]
    result |= {f"uniform lengths, {name}: tok/s": rate for name, rate in rates.items()}
    ratio = rates["ours"] / rates["static"]
    result["uniform lengths, ours against static batches (at least 2)"] = ratio
    return result


def arrivals(plan: Plan) -> dict[str, object]:
    """Time between tokens while long prompts arrive."""
    result: dict[str, object] = {}
    with _targets(plan, _LONG_PROMPT + plan.num_long_tokens) as targets:
        for name, target in targets.items():
            _run(target, _requests(plan.bundle, [64] * 2, 8), 2)
            result |= asyncio.run(_disturbed(plan, name, target))
    return result


async def _disturbed(plan: Plan, name: str, target: Target) -> dict[str, object]:
    stream = partial(streamed, target)
    asked = _requests(plan.bundle, [32] * (_SLOTS - 1), plan.num_long_tokens)
    running = asyncio.create_task(run_clients(stream, asked, _SLOTS - 1))
    await asyncio.sleep(4)
    began = time.monotonic()
    long_firsts: list[float] = []
    while not running.done():
        prompt = _requests(plan.bundle, [_LONG_PROMPT], 2)
        _, (timeline,) = await run_clients(stream, prompt, 1)
        long_firsts.append(timeline.first_token_s)
    _, timelines = await running
    ended = min(timeline.arrivals[-1] for timeline in timelines)
    # Quiet is from when all have their first token, to when the first long prompt comes.
    started = max(timeline.arrivals[0] for timeline in timelines)
    quiet = inter_token_ms(timelines, (started, began))
    gaps = inter_token_ms(timelines, (began, ended))
    if not gaps:
        raise RuntimeError("streams ended before long prompts came; raise --long")
    p50, p99 = percentile(gaps, 50), percentile(gaps, 99)
    return {
        f"arrivals, {name}: between tokens before, p50 ms": percentile(quiet, 50)
        if quiet
        else None,
        f"arrivals, {name}: between tokens, p50 / p99 / max ms": (
            f"{p50:.1f} / {p99:.1f} / {max(gaps):.1f}"
        ),
        f"arrivals, {name}: p99 over p50 (ours at most 3)": p99 / p50,
        f"arrivals, {name}: first token of a long prompt, s": statistics.median(long_firsts),
    }


PARTS: dict[str, Callable[[Plan], dict[str, object]]] = {
    "overhead": overhead,
    "clients": clients,
    "lengths": lengths,
    "arrivals": arrivals,
}
"""By the name that `--only` takes."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Requests of some clients, done."""

    seconds: float
    timelines: list[Timeline]
    cpu_s: float = 0.0
    """CPU time of the process that answered; 0 where it was not read."""

    @property
    def tokens_per_s(self) -> float:
        return sum(timeline.num_tokens for timeline in self.timelines) / self.seconds

    @property
    def first_token_s(self) -> float:
        return statistics.median(timeline.first_token_s for timeline in self.timelines)


def _run(target: Target, asked: Sequence[Asked], num_clients: int) -> _Run:
    return _Run(*asyncio.run(run_clients(partial(streamed, target), asked, num_clients)))


def _turn(targets: dict[str, Target], number: int) -> list[str]:
    return [*targets][:: -1 if number % 2 else 1]


def _ratios(rates: dict[tuple[str, int], list[float]], what: str, count: int) -> dict[str, object]:
    if ("llama.cpp", count) not in rates:
        return {}
    pairs = zip(rates["ours", count], rates["llama.cpp", count], strict=True)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    return {f"ours against llama.cpp, {what}": ratio}


def _requests(bundle: Path, sizes: Sequence[int], num_tokens: int) -> list[Asked]:
    """Requests with random prompts; every call gives others, so that none is found in a cache."""
    vocab_size = json.loads((bundle / "manifest.json").read_text())["model"]["vocab_size"]
    draw = np.random.default_rng(next(_SEEDS))
    # Special tokens come last.
    return [Asked(draw.integers(0, vocab_size - 16, size).tolist(), num_tokens) for size in sizes]


def _end_tokens(bundle: Path) -> list[int]:
    ids = json.loads((bundle / "generation_config.json").read_text()).get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def _worker(bundle: Path, threads: int) -> list[str]:
    return [
        sys.executable,
        str(_HERE / "engine_worker.py"),
        str(bundle),
        "--threads",
        str(threads),
    ]


@contextlib.contextmanager
def _ours(bundle: Path, threads: int) -> Iterator[ServerProcess]:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "qwen_runtime",
        "serve",
        bundle,
        "--port",
        "0",
    ]
    options = ["--threads", str(threads), "--max-num-seqs", str(_SLOTS)]
    with ServerProcess([*command, *options]) as server:
        yield server


@contextlib.contextmanager
def _targets(plan: Plan, context: int) -> Iterator[dict[str, Target]]:
    """The servers, both running: ours and, where there is one, llama.cpp's.

    Args:
        plan: Names them.
        context: Tokens of prompt and answer, at most.
    """
    with contextlib.ExitStack() as stack:
        targets: dict[str, Target] = {
            "ours": OurServer(
                stack.enter_context(_ours(plan.bundle, plan.threads)).port,
                _end_tokens(plan.bundle),
            )
        }
        if plan.llama is not None:
            program, model = plan.llama
            # Slots share the context evenly.
            sizes = ["-np", str(_SLOTS), "-c", str(_SLOTS * (context + 64))]
            address = ["--host", "127.0.0.1", "--port", str(_free_port())]
            command: list[str | Path] = [
                program,
                "-m",
                model,
                "-t",
                str(plan.threads),
                *sizes,
                *address,
            ]
            server = stack.enter_context(ServerProcess([*command, "--no-ui"]))
            targets["llama.cpp"] = LlamaServer(server.port)
        yield targets


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
