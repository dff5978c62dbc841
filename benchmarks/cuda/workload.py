"""What the CUDA benchmark measures, and the goals it is held to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GOALS", "MODELS", "Goal", "Measured", "Work", "works"]

MODELS = ("Qwen2.5-1.5B", "Qwen2.5-7B")
PAST, PROMPT, STEPS = 512, 2048, 128
BATCHES = (1, 32)


@dataclass(frozen=True, slots=True)
class Work:
    """One model in one format, at one batch size."""

    model: str
    """A shape of random_checkpoint."""
    precision: str
    """Of the weights: the compute dtype's own, "fp16" or "bf16", or "int4"."""
    compute_dtype: str
    batch: int
    past: int = PAST
    """Tokens in every row when steps begin."""
    prompt: int = PROMPT
    """Tokens of the prompt whose speed is measured, at batch 1."""
    steps: int = STEPS

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.model} {self.precision}, batch {self.batch}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one contender did with a work; None where it does not apply."""

    step_ms: float
    """Median of a decode step."""
    prefill_tokens_per_s: float | None
    generate_step_ms: float | None
    """A step of `LLM.generate`, everything included."""
    device_mb: float
    """Device memory taken from before the load to after the last step."""
    weights_and_caches_mb: float | None
    note: str = ""
    sampled_step_ms: float | None = None
    """As `generate_step_ms`, with the sampling settings that Qwen2.5 ships."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that a work should reach on an H100."""

    model: str
    precision: str
    batch: int
    figure: str
    """A field of `Measured`."""
    bound: float
    at_most: bool


GOALS = (
    Goal("Qwen2.5-7B", "fp16", 1, "step_ms", 5.86, True),
    Goal("Qwen2.5-1.5B", "fp16", 1, "step_ms", 2.0, True),
    Goal("Qwen2.5-1.5B", "fp16", 32, "step_ms", 3.0, True),
    Goal("Qwen2.5-1.5B", "fp16", 1, "prefill_tokens_per_s", 100_000.0, False),
)
"""Beside these: int4 at 1.5B 1.1 times onnxruntime-genai's, `generate` within 10 % of the raw step,
and device memory at most 1.03 times weights and caches and 1 GB."""


def works(models: tuple[str, ...], compute_dtype: str) -> tuple[Work, ...]:
    """Every work, smallest model first: floats at every batch size, then int4 of the first model."""
    found = [
        Work(model, compute_dtype, compute_dtype, batch) for model in models for batch in BATCHES
    ]
    return (*found, Work(models[0], "int4", compute_dtype, 1))
