"""What a served bundle does over HTTP: against its engine alone, static batches and llama.cpp.

    python benchmarks/serving/prepare.py --peers /tmp/peers-work/layers-all \
        --work /tmp/serving-work --peers-python benchmarks/peers/.venv/bin/python
    python benchmarks/serving/over_http.py /tmp/serving-work/int8 --small artifacts/tiny-qwen2-chat \
        --llama-server build/bin/llama-server --gguf /tmp/serving-work/q8_0.gguf

llama-server is built from the llama.cpp in the sdist of llama-cpp-python 0.3.36, below vendor/:

    cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    ninja -C build llama-server

Parts, each of which can run alone with --only:

- `overhead`: the same requests to a server and to `AsyncLLM` in a process of its own, with the
  small model, on which what a server adds shows; one thread for the model, the other core for
  whoever reads. Time a token is wall time over tokens.
- `clients`: tokens per second of all clients together, by their number.
- `lengths`: answers of uniform length in 8..256 to prompts of uniform length in 16..256, to 16
  clients, against static batches of 16.
- `arrivals`: time between the tokens of 15 streams while prompts of 2,000 tokens arrive, one after
  another, at the sixteenth slot.

What is compared in `overhead` and `clients` runs in turn, A B B A; `lengths` and `arrivals` run once
for each server. Both servers have 16 slots and the same threads; they get the
same token ids, decode greedily and reuse no prompt. Clients are tasks of this process, and share
the cores with what they measure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[1:1] = [str(HERE.parent), str(HERE.parent / "peers")]

from common import report  # noqa: E402 - needs the path above
from parts import PARTS, Plan  # noqa: E402 - stays with its neighbours
from process import ProcessError  # noqa: E402 - needs the path above
from server_process import ServerError  # noqa: E402 - stays with its neighbours


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="from prepare.py, or any with a tokenizer")
    parser.add_argument("--small", type=Path, help="bundle for the overhead; BUNDLE by default")
    parser.add_argument("--llama-server", type=Path, help="its program; left out, not measured")
    parser.add_argument("--gguf", type=Path, help="its model")
    parser.add_argument("--threads", type=int, default=2, help="of each model; default 2")
    parser.add_argument("--rounds", type=int, default=2, help="in turn; default 2")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer; default 48")
    parser.add_argument("--requests", type=int, default=32, help="of `lengths`; default 32")
    parser.add_argument("--long", type=int, default=160, help="tokens in `arrivals`; default 160")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="parts")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    args = parser.parse_args()
    if min(args.threads, args.rounds, args.requests) < 1 or min(args.tokens, args.long) < 2:
        parser.error("--threads, --rounds, --requests must be at least 1, --tokens, --long 2")
    if (args.llama_server is None) != (args.gguf is None):
        parser.error("--llama-server and --gguf come together")
    plan = Plan(
        bundle=args.bundle,
        small=args.small or args.bundle,
        llama=None if args.gguf is None else (args.llama_server, args.gguf),
        threads=args.threads,
        rounds=args.rounds,
        num_tokens=args.tokens,
        num_requests=args.requests,
        num_long_tokens=args.long,
    )
    results: dict[str, object] = {"load average before": _load()}
    try:
        for name in args.only:
            print(f"{name} ...", file=sys.stderr)
            results |= PARTS[name](plan)
    except (ProcessError, ServerError, RuntimeError) as error:
        sys.exit(f"Error: {error}")
    if args.llama_server is not None:
        results["llama.cpp"] = json.dumps([str(args.llama_server), str(args.gguf)])
    report(results | {"load average after": _load()}, args.as_json)


def _load() -> float:
    return round(os.getloadavg()[0], 2)


if __name__ == "__main__":
    main()
