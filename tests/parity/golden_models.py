"""The golden models that can be exported."""

SUPPORTED = (
    "qwen2_untied",
    "qwen2_tied",
    "qwen2_sharded",
    "qwen2_bf16",
    "qwen2_text",
    "qwen2_instruct",
    "qwen2_draft",
    "qwen3_untied",
    "qwen3_tied_bias",
)
