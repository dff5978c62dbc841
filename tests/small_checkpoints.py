"""Random checkpoints whose sizes blocks of 32 divide, which those of the golden models do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qwen_export.checkpoint import ModelConfig, expected_tensors

__all__ = ["small_checkpoint"]

_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}


def small_checkpoint(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write a checkpoint of two layers, a vocabulary of 101 and a tied table, or as asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(_CONFIG | config))
    rng = np.random.default_rng(seed)
    shapes = expected_tensors(ModelConfig.from_dict(json.loads(path.read_text()), path))
    save_file(
        {
            name: (rng.standard_normal(shape) * 0.15 + (len(shape) == 1)).astype(np.float32)
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
    )
    return folder
