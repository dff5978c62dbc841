"""Assisted generation over the whole evaluation set: acceptance, model calls, speed, same text.

    python benchmarks/assisted.py [--tokens 5] [--limit 50] [--json]

Every question is answered greedily three times: plainly, with the draft model, and with prompt
lookup. The text must be the same each time. The model calls are counted; the seconds are wall
time of whole answers, one at a time, the three ways in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from common import report

from qwen_export.bundle import BuildOptions, build
from qwen_runtime import LLM

DATA = Path(__file__).parents[1] / "tests" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draft", type=Path, default=DATA / "tiny-qwen2-draft", help="checkpoint")
    parser.add_argument("--tokens", type=int, default=5, help="tokens drafted per round")
    parser.add_argument("--confidence", type=float, default=0.4, help="drafting ends below it")
    parser.add_argument("--lookup", type=int, default=5, help="tokens looked up per round")
    parser.add_argument("--new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--limit", type=int, help="questions; all by default")
    parser.add_argument("--threads", type=int, help="threads of an operator; one per core")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    args = parser.parse_args()
    lines = (DATA / "eval_set.jsonl").read_text("utf-8").splitlines()[: args.limit]
    with tempfile.TemporaryDirectory() as scratch:
        options = BuildOptions(verify=False)
        bundle = build(None, Path(scratch, "model"), options)
        draft_bundle = build(args.draft, Path(scratch, "draft"), options)
        with (
            LLM(bundle, threads=args.threads) as llm,
            LLM(draft_bundle, threads=args.threads) as draft,
        ):
            draft.generation_config = dataclasses.replace(
                draft.generation_config,
                num_assistant_tokens=args.tokens,
                assistant_confidence_threshold=args.confidence,
            )
            result = measure(llm, draft, [_prompt(json.loads(line)) for line in lines], args)
    report(result, args.as_json)
    if result["different_texts"]:
        sys.exit("some texts differ from plain decoding")


def _prompt(question: dict[str, Any]) -> Any:
    """Messages for most questions; some are a text to go on with."""
    return question.get("messages") or question["prompt"]


def measure(
    llm: LLM, draft: LLM, prompts: list[Any], args: argparse.Namespace
) -> dict[str, object]:
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "draft": {"assistant_model": draft},
        "lookup": {"prompt_lookup_num_tokens": args.lookup},
    }
    seconds = dict.fromkeys(ways, 0.0)
    sums = {way: {"drafted": 0, "accepted": 0, "calls": 0} for way in ways}
    different = tokens = 0
    for number, prompt in enumerate(prompts):
        outputs = {}
        # In turn, and each way first in a third of the turns, so that drift cancels.
        order = [*ways][number % 3 :] + [*ways][: number % 3]
        for way in order:
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outputs[way] = llm.generate(
                    prompt, do_sample=False, max_new_tokens=args.new_tokens, **ways[way]
                )
            seconds[way] += time.perf_counter() - started
            saved = outputs[way].assistance
            sums[way]["calls"] += saved.model_calls if saved else len(outputs[way].token_ids)
            if saved:
                sums[way]["drafted"] += saved.drafted
                sums[way]["accepted"] += saved.accepted
        tokens += len(outputs["plain"].token_ids)
        different += any(
            outputs[way].token_ids != outputs["plain"].token_ids
            or outputs[way].text != outputs["plain"].text
            for way in ways
        )
    result: dict[str, object] = {
        "questions": len(prompts),
        "tokens": tokens,
        "different_texts": different,
        "drafted_per_round": args.tokens,
        "confidence": args.confidence,
        "threads": args.threads or "one per core",
    }
    for way, total in sums.items():
        result[f"{way}_model_calls"] = total["calls"]
        result[f"{way}_seconds"] = seconds[way]
        if way != "plain":
            result[f"{way}_acceptance"] = total["accepted"] / max(1, total["drafted"])
            result[f"{way}_calls_ratio"] = total["calls"] / sums["plain"]["calls"]
            result[f"{way}_speed"] = seconds["plain"] / seconds[way]
    return result


if __name__ == "__main__":
    main()
