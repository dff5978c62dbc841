"""How the parity error grows with depth: random models of a few sizes, built and verified.

python benchmarks/depth.py --layers 4 16 48
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import report
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_export.bundle import build


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 48])
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = {"model": "random Qwen2, hidden 128, 4 heads, vocabulary 512"}
    with tempfile.TemporaryDirectory() as scratch:
        for layers in args.layers:
            torch.manual_seed(0)
            config = Qwen2Config(
                vocab_size=512,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
            )
            checkpoint = Path(scratch, f"checkpoint-{layers}")
            Qwen2ForCausalLM(config).save_pretrained(checkpoint)
            parity = build(checkpoint, Path(scratch, f"bundle-{layers}")).manifest.parity
            result[f"{layers} layers: largest logit error"] = parity.max_logit_error
            result[f"{layers} layers: tolerance"] = parity.tolerance
    report(result, args.as_json)


if __name__ == "__main__":
    main()
