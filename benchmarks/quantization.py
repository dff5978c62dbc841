"""Quality of the quantisation formats and methods on the embedded model.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --formats int4-128-search --tables fp32 int8-128-search int4-128-search
    python benchmarks/quantization.py --synthetic

Every format's dequantised weights replace the model's own in transformers, in fp32, and are asked
for: the perplexity of text that the model was not trained on, over the tokens it is trained to
give; how far its next-token distributions are from the original's (KL); the share of the
evaluation set it answers right. ``--synthetic`` measures the output error of one linear layer of
Qwen2.5-0.5B's shape with random weights and inputs instead, with and without outliers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import report
from torch import Tensor

from qwen_export.bundle import embedded_model
from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.quantization import METHODS, QuantizationOptions, Quantizer, make_quantizer
from qwen_export.quantization.gptq import error_feedback, gptq
from qwen_export.quantization.quantizer import BlockwiseQuantizer

DATA = Path(__file__).parent / "data"
CASES = Path(__file__).parents[1] / "tests" / "data" / "eval_set.jsonl"
BATCH_ROWS = 16
STORY_TOKENS = 320
TABLE = "model.embed_tokens.weight"
FORMATS = (
    *(f"int8-{block}-{method}" for block in (32, 64, 128) for method in ("rtn", "search")),
    *(f"int4-{block}-{method}" for block in (32, 64, 128) for method in METHODS),
)
HEADER = (
    "| linears | table | perplexity | of fp32 | KL, mean | same token | right answers "
    "| weight error | output error | seconds |\n|---|---|" + "---:|" * 8
)


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens, and which of them are scored."""

    ids: list[int]
    scored: list[bool]
    """Whether the token is one that the model is to give."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures of one format."""

    perplexity: float
    kl: float
    same_token: float
    accuracy: float


class Evaluation:
    """The embedded model, what it is asked, and what it answered in fp32."""

    def __init__(self) -> None:
        self.checkpoint = open_checkpoint(embedded_model())
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_model())
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            embedded_model(), dtype=torch.float32
        ).eval()
        self.original = {name: value.clone() for name, value in self.model.state_dict().items()}
        text = (DATA / "held_out.jsonl").read_text(encoding="utf-8")
        self.rows = [self._row(json.loads(line)) for line in text.splitlines()]
        cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
        self.exact = [case for case in cases if case["check"]["kind"] == "exact"]
        self.stories = [case for case in cases if case["check"]["kind"] == "story"]
        self.reference = dict(self._text_logits())

    def _row(self, document: str) -> Row:
        """In a conversation the assistant's words are scored, in plain text all."""
        start, stop = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        ids = self.tokenizer(document)["input_ids"]
        if ids[0] != start:
            return Row(ids, [True] * len(ids))
        scored, inside = [False] * len(ids), False
        header = self.tokenizer("<|im_start|>assistant\n")["input_ids"]
        for i in range(len(ids)):
            scored[i] = inside
            if ids[i] == stop:
                inside = False
            elif ids[max(0, i + 1 - len(header)) : i + 1] == header:
                inside = True
        return Row(ids, scored)

    def _text_logits(self) -> Iterator[tuple[int, Tensor]]:
        """The index and the logits [T, V] of every row of the text."""
        rows = [row.ids for row in self.rows]
        return self._logits(rows, [len(row) for row in rows])

    @torch.no_grad()
    def _logits(self, rows: list[list[int]], wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Every row's index and the logits of its last wanted_i tokens, [wanted_i, V].

        Rows of like length run together, so they do not come in order.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for at in range(0, len(order), BATCH_ROWS):
            group = order[at : at + BATCH_ROWS]
            width = max(len(rows[i]) for i in group)
            # Pads on the right change nothing before them.
            batch = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in group])
            hidden = self.model.model(batch).last_hidden_state
            for i, row in zip(group, hidden, strict=True):
                end = len(rows[i])
                yield i, self.model.lm_head(row[end - wanted[i] : end])

    def measure(self, weights: Mapping[str, Tensor], *, answers: bool) -> Quality:
        """Put weights in the place of the model's own, and ask; NaN without ``answers``."""
        self.model.load_state_dict({**self.original, **weights})
        loss, divergence, same, scored, tokens = 0.0, 0.0, 0, 0, 0
        for i, logits in self._text_logits():
            row, reference = self.rows[i], self.reference[i]
            wanted = torch.tensor(row.scored[1:])
            theirs, ours = reference[:-1].log_softmax(-1), logits[:-1].log_softmax(-1)
            target = torch.tensor(row.ids[1:])[:, None]
            loss -= float(ours.gather(1, target)[wanted].sum())
            scored += int(wanted.sum())
            divergence += float((theirs.exp() * (theirs - ours)).sum())
            same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
            tokens += len(theirs)
        return Quality(
            float(np.exp(loss / scored)),
            divergence / tokens,
            same / tokens,
            self._accuracy() if answers else math.nan,
        )

    def _accuracy(self) -> float:
        """Share of the evaluation set with a whole and right greedy answer."""
        stop = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        prompts = [self._prompt(case) for case in self.exact]
        answers = [self.tokenizer(case["answer"])["input_ids"] + [stop] for case in self.exact]
        passed = 0
        rows = [p + a[:-1] for p, a in zip(prompts, answers, strict=True)]
        for i, logits in self._logits(rows, [len(answer) for answer in answers]):
            answer = answers[i]
            # Greedy search gives the answer exactly when each of its tokens is the best one
            # after those before it.
            passed += bool((logits.argmax(-1) == torch.tensor(answer)).all())
        passed += self._told()
        return passed / (len(self.exact) + len(self.stories))

    def _prompt(self, case: dict[str, Any]) -> list[int]:
        if "prompt" in case:
            return list(self.tokenizer(case["prompt"])["input_ids"])
        text = self.tokenizer.apply_chat_template(
            case["messages"], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def _told(self) -> int:
        """How many open stories end and are about what was asked."""
        prompts = [self._prompt(case) for case in self.stories]
        width = max(map(len, prompts))
        padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        rows = self.model.generate(
            padded,
            attention_mask=real,
            max_new_tokens=STORY_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
        )[:, width:]
        ends = torch.tensor(self.model.generation_config.eos_token_id)
        told = 0
        for case, row in zip(self.stories, rows, strict=True):
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            whole = case.get("prompt", "") + text
            told += (
                bool(torch.isin(row, ends).any())
                and all(word in whole for word in case["check"]["want"].values())
                and len(re.findall(r"[.!?。]", whole)) >= 3
            )
        return told


def options_of(name: str) -> QuantizationOptions:
    """``int4-32-search`` as options."""
    bits, block_size, method = name.removeprefix("int").split("-")
    return QuantizationOptions(int(bits), int(block_size), method)  # type: ignore[arg-type]


def quantize(checkpoint: Checkpoint, quantizer: Quantizer, names: list[str]) -> dict[str, Tensor]:
    """Dequantised weights, [N, K], by name."""
    result = {}
    for name in names:
        weight = np.ascontiguousarray(checkpoint.read(name).astype(np.float32).T)
        result[name] = torch.from_numpy(quantizer(weight, name=name).dequantize().T.copy())
    return result


class LinearInputs:
    """X^T X of what every linear layer is given in fp32, over the held-out text."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._sums: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(self._hook(f"{name}.weight"))
            for name, module in evaluation.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        ]
        with torch.no_grad():
            for row in evaluation.rows:
                evaluation.model(torch.tensor([row.ids]))
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def add(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0][0].double()
            self._sums[name] = self._sums.get(name, 0) + x.T @ x

        return add

    def errors(
        self, original: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> tuple[float, float]:
        """Mean over the layers of the relative squared error of weights and of outputs."""
        of_weights, of_outputs = [], []
        for name, sums in self._sums.items():
            right = original[name].double()
            wrong = weights[name].double() - right
            of_weights.append(float((wrong**2).sum() / (right**2).sum()))
            of_outputs.append(
                float(((wrong @ sums) * wrong).sum() / ((right @ sums) * right).sum())
            )
        return float(np.mean(of_weights)), float(np.mean(of_outputs))


def measure_formats(formats: list[str], tables: list[str], answers: bool) -> dict[str, object]:
    """The table of formats; progress goes with it, line by line."""
    evaluation = Evaluation()
    inputs = LinearInputs(evaluation)
    checkpoint, original = evaluation.checkpoint, evaluation.original
    linears = [name for name in checkpoint.tensors if name.endswith("_proj.weight")]
    names = sorted(linears, key=lambda name: int(name.split(".")[2]))
    with_table = {
        name: {}
        if name == "fp32"
        else _tied(quantize(checkpoint, make_quantizer(options_of(name)), [TABLE])[TABLE])
        for name in tables
    }
    base = evaluation.measure({}, answers=answers)
    print(HEADER, flush=True)
    results = {"fp32": _row("fp32", "fp32", base, base, (0.0, 0.0), 0.0)}
    for name in formats:
        options = options_of(name)
        calibration = DATA / "calibration.txt" if options.method == "gptq" else None
        started = time.monotonic()
        quantizer = make_quantizer(options, checkpoint=checkpoint, calibration=calibration)
        weights = quantize(checkpoint, quantizer, names)
        seconds = time.monotonic() - started
        errors = inputs.errors(original, weights)
        for table in tables:
            quality = evaluation.measure({**weights, **with_table[table]}, answers=answers)
            results[f"{name}, table {table}"] = _row(name, table, quality, base, errors, seconds)
    return results


def _tied(table: Tensor) -> dict[str, Tensor]:
    return {TABLE: table, "lm_head.weight": table}


def _row(
    name: str,
    table: str,
    quality: Quality,
    base: Quality,
    errors: tuple[float, float],
    seconds: float,
) -> str:
    row = (
        f"| {name} | {table} | {quality.perplexity:.5f} "
        f"| {quality.perplexity / base.perplexity - 1:+.3%} | {quality.kl:.2e} "
        f"| {quality.same_token:.2%} | {quality.accuracy:.1%} "
        f"| {errors[0]:.3e} | {errors[1]:.3e} | {seconds:.1f} |"
    )
    print(row, flush=True)
    return row


def measure_synthetic(inputs: int = 896, outputs: int = 896, samples: int = 16384) -> None:
    """Output error of one layer, by kind of weights and inputs, relative to round-to-nearest."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((inputs, inputs // 8)).astype(np.float32)
    mixed = rng.standard_normal((samples, inputs // 8)).astype(np.float32) @ spread.T
    mixed = mixed / mixed.std() + 0.3 * rng.standard_normal((samples, inputs)).astype(np.float32)
    loud = mixed * np.where(rng.random(inputs) < 0.01, 20, 1).astype(np.float32)
    white = rng.standard_normal((samples, inputs)).astype(np.float32)
    gaussian = 0.02 * rng.standard_normal((inputs, outputs)).astype(np.float32)
    outliers = gaussian * np.where(rng.random(gaussian.shape) < 0.001, 10, 1).astype(np.float32)
    print("| weights | inputs | format | search / rtn | gptq / rtn |\n|---|---|---|---:|---:|")
    for inputs_name, x in (("independent", white), ("dependent", mixed), ("1 % loud", loud)):
        # Half of the samples calibrate, the other half measure.
        feedback = error_feedback(x[::2].T @ x[::2])
        for weights_name, weight in (("Gaussian", gaussian), ("0.1 % x 10", outliers)):
            for name in ("int8-32", "int4-32", "int4-128"):
                options = options_of(f"{name}-rtn")
                bits, block_size = options.bits, options.block_size
                found = {
                    "rtn": BlockwiseQuantizer(options)(weight, name="weight"),
                    "search": BlockwiseQuantizer(options_of(f"{name}-search"))(
                        weight, name="weight"
                    ),
                    "gptq": gptq(weight, feedback, bits, block_size),
                }
                error = {
                    method: float(((x[1::2] @ (q.dequantize() - weight)) ** 2).mean())
                    for method, q in found.items()
                }
                print(
                    f"| {weights_name} | {inputs_name} | {name} "
                    f"| {error['search'] / error['rtn']:.3f} "
                    f"| {error['gptq'] / error['rtn']:.3f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument(
        "--tables",
        nargs="+",
        default=["int8-128-search"],
        help="fp32, or formats by rtn or search",
    )
    parser.add_argument("--no-answers", action="store_false", dest="answers")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    if args.synthetic:
        measure_synthetic()
        return
    report(measure_formats(args.formats, args.tables, args.answers), args.as_json)


if __name__ == "__main__":
    main()
