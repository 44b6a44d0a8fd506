"""Tiny random models of every MoE model type that the installed transformers knows, made from the config class alone.

    for model_type in moe_model_types():
        model = build(model_type)
        hidden = output(model, inputs(model))

Nothing here lists model types: a family that transformers learns of tomorrow is found, shrunk and built by the same
rules about attribute names. The few families that need a word more have it in `overrides`, with a reason each.
"""

from trl_moe_ext.experts.census.discover import Discovery, composite_types, discover, moe_model_types
from trl_moe_ext.experts.census.tensors import inputs, output
from trl_moe_ext.experts.census.tiny import build, skeleton, tiny_config
from trl_moe_ext.experts.census.weights import randomise_factors

__all__ = [
    "Discovery",
    "build",
    "composite_types",
    "discover",
    "inputs",
    "moe_model_types",
    "output",
    "randomise_factors",
    "skeleton",
    "tiny_config",
]
