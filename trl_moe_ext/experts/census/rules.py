"""How an attribute of a config shrinks, told by the meaning of its name. No model is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

HIDDEN = 64
HEADS = 4
HEAD_DIM = 16
EXPERTS = 8
TOP_K = 2
MOE_INTERMEDIATE = 32
INTERMEDIATE = 96
VOCABULARY = 128
FEWEST_LAYERS = 2
POSITIONS = 256
WINDOW = 8
# A Linear of `HIDDEN` inputs keeps the variance of what goes through it.
WEIGHT_STD = HIDDEN**-0.5

Rule = Callable[[int], int]


def exactly(size: int) -> Rule:
    """`size`, but what a config switches off with 0 stays off."""
    return lambda value: size if value > 0 else value


def at_most(size: int) -> Rule:
    return lambda value: min(value, size)


def _top_k(value: int) -> int:
    return min(value, TOP_K)


def _groups(value: int) -> int:
    return min(value, 2)


# First match wins. The pattern has to match the whole name.
INTEGERS: tuple[tuple[str, Rule], ...] = (
    # Routed and shared experts
    (r"(moe_)?(num|n)_shared_experts", at_most(2)),
    (r"(moe_)?(num|n)_(local_|routed_)?experts", exactly(EXPERTS)),
    (r"zero_expert_num", at_most(2)),
    (r"num_experts_per_tok(en)?|(moe_)?(top_?k|k)(_experts)?|num_selected_experts", _top_k),
    (r"n_group|num_expert_group|o_groups|n_groups", _groups),
    (r"topk_group", at_most(1)),
    (r"expert_capacity", at_most(64)),
    # Which layers are sparse, or of another kind
    (r"first_k_dense_replace|num_dense_layers|num_sparse_(en|de)coder_layers", at_most(1)),
    (r"\w*(sparse_step|layer_step|layer_interval|layer_period|_every_n_layers|layers_per\w*)", at_most(2)),
    (r"\w*layer_(offset|start_index|end_index)|max_window_layers", at_most(1)),
    # Widths
    (r"\w*vocab_size\w*", at_most(VOCABULARY)),
    (r"moe_(hidden|latent)_size|moe_\w*intermediate_size|expert_ffn_hidden_size", exactly(MOE_INTERMEDIATE)),
    (r"share\w*(intermediate_size|dim)", exactly(48)),
    (r"\w*intermediate_size\w*|\w*ffn_(hidden_size|dim)|d_ff|mlp_dim", exactly(INTERMEDIATE)),
    (r"router_hidden_size|hidden_size_per_layer_input|ple_embed_dim|d_rel", exactly(16)),
    (r"q_lora_rank", exactly(24)),
    (r"\w*rank", at_most(16)),
    (r"qk_rope_head_dim|rotary_dim", exactly(8)),
    (r"\w*head_dim|d_kv|kv_channels|mamba_d_head", exactly(HEAD_DIM)),
    (r"\w*(state_size|d_state)", at_most(16)),
    (r"\w*hidden_sizes?|d_model|embed_dim|hidden_dim", exactly(HIDDEN)),
    (r"\w*(out|in|input|output|projection_hidden|projector_hidden)_(size|dims?)", exactly(HIDDEN)),
    # Heads
    (r"index\w*heads|linear_num_key_heads", at_most(2)),
    (r"mamba_(num|n)_heads", at_most(8)),
    (r"\w*heads(_per_layer)?", at_most(HEADS)),
    # Positions
    (r"\w*(position_embeddings|position_embedding_size|source_positions|max_seq_len|max_length)", at_most(POSITIONS)),
    (r"\w*(sliding_window|window_size|block_size|chunk_size)", at_most(WINDOW)),
    (r"rel_extent", at_most(32)),
    (r"index_topk", at_most(8)),
    (r"index_topk_blocks|index_kpool", at_most(2)),
    # Images and sounds
    (r"image_size", exactly(32)),
    (r"patch_size", exactly(8)),
    (r"max_(img|image)_size|max_resolution", at_most(64)),
    (r"\w*_channels", at_most(64)),
    (r"(n|num)_mel_bins|part_features", at_most(16)),
    (r"depths", at_most(1)),
)
BOOLEANS: tuple[tuple[str, bool], ...] = (
    (r"(is|use|enable)_moe\w*", True),
    # Kernels that need a GPU, and warn where there is none.
    (r"use_\w*kernels", False),
)
FLOATS: tuple[tuple[str, float], ...] = (
    (r"\w*(drop|jitter)\w*", 0.0),
    (r"initializer_range|init_std", WEIGHT_STD),
)
# Attributes that some families leave to the checkpoint: without a value there are no experts, or no model at all.
NEEDED: tuple[tuple[str, Any], ...] = (
    (r"(moe_)?(num|n)_(local_|routed_)?experts", EXPERTS),
    (r"(moe_)?(num|n)_shared_experts", 1),
    (r"num_experts_per_tok|(moe_)?top_?k(_experts)?", TOP_K),
    (r"moe_intermediate_size", MOE_INTERMEDIATE),
    (r"head_dim", HEAD_DIM),
    (r"mlp_layer_types", ["dense", "sparse"]),
)
TOKEN_ID = re.compile(r"\w*(token_id|token_index|token_ids)")
KEY_VALUE_HEADS = re.compile(r"\w*(key_value_heads|kv_n_heads|kv_heads)")


def find(table: tuple[tuple[str, Any], ...], name: str) -> Any:
    """The entry of `table` for the attribute `name`, or None."""
    return next((entry for pattern, entry in table if re.fullmatch(pattern, name)), None)
