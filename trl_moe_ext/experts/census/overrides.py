"""What the rules about attribute names cannot know of a family. One entry a model type, with its reason."""

from __future__ import annotations

from typing import Any

# fmt: off
OVERRIDES: dict[str, dict[str, Any]] = {
    # Product keys: an expert is a pair of sub-keys, so the number of experts is a square and a pair of halves.
    "doge": {"num_experts": 64},
    # The default config lacks two numbers that the attention reads.
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    # In the sliding layers a head has to be the sum of its parts, one of which is larger there.
    "dots3_note_text": {"head_dim": 40},
    # The default is Mamba in every layer; its cache asks for one layer of attention.
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    # A layer for each prime factor of a patch, and one: with fewer the class asks for scipy. Widths grow by the patch.
    "inkling_vision": {"n_layers": 4, "patch_size": 4},
    # No layer types by default: one of each of the two that the model has.
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    # The default config lacks the size of the shared expert, which every layer has.
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 48},
    # The text slot takes any type and is dense by default; checkpoints with experts hold a mistral4.
    "mistral3": {"text_config": {"model_type": "mistral4"}},
    # Two configs have to agree on a number that the inner one leaves open.
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    # The default talker lacks what its class reads; checkpoints repeat it from the vision config.
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    # The indexer's sizes are left to the checkpoint.
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    # A mask with a window is made even where no layer has one, and by default none has.
    "step3p5": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
}
# fmt: on

# Types whose forward cannot embed tokens, with the reason.
EMBEDDINGS_ONLY: dict[str, str] = {
    "qwen3_omni_moe_talker_text": "its forward looks for `embed_tokens`, the model has `codec_embedding`",
}
