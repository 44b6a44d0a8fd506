"""Sparse upcycling (arXiv 2212.05055): a dense checkpoint becomes a mixture of experts with the same logits.

Every MLP turns into `num_experts` copies of itself behind a new router (`upcycle_weights`). What was written is read
back and compared with the dense model.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.experts.upcycle_families import check_source, moe_config
from trl_moe_ext.experts.upcycle_files import (
    appearing_whole,
    check_output,
    copy_companions,
    load_model,
    read_settings,
)
from trl_moe_ext.experts.upcycle_options import UpcycleOptions
from trl_moe_ext.experts.upcycle_weights import mixture_of

__all__ = ["LOGITS_TOLERANCE", "UpcycleOptions", "UpcycleReport", "upcycle"]

# Largest difference of two logits in fp32. A sound conversion is some 1e-5 off, because a sum of top_k weighted copies
# is rounded differently from one product; a wrong one is off by the size of the logits, 1 and more.
LOGITS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class UpcycleReport:
    """What was written. Tied parameters are counted once; `active_parameters` are those that one token uses."""

    source: str
    target: str
    layers: int
    dtype: str
    dense_parameters: int
    parameters: int
    active_parameters: int
    max_difference: float


def upcycle(
    dense_dir: Path,
    out_dir: Path,
    options: UpcycleOptions,
    *,
    gguf_file: str | None = None,
    overwrite: bool = False,
) -> UpcycleReport:
    """Write the mixture made from a dense checkpoint, and compare the logits of what was written.

    The output appears whole or not at all. Memory: less than two mixtures in `options.dtype` while writing, and one in
    fp32 for the comparison.

    Args:
        dense_dir: a checkpoint directory as `save_pretrained` writes it, or one with `gguf_file` in it.
        out_dir: a directory that does not exist or is empty.
        options: what the mixture is to be.
        gguf_file: name of a GGUF file in `dense_dir` to read weights, configuration and tokenizer from.
        overwrite: replace `out_dir` if it is there.

    Raises:
        ConfigError: a directory or a file is missing, unreadable or in the way.
        LayoutError: the checkpoint has no exact mixture, or what was written has other logits.
    """
    check_source(read_settings(dense_dir, gguf_file), dense_dir)
    check_output(dense_dir, out_dir, overwrite)
    dense = load_model(dense_dir, options.dtype, gguf_file=gguf_file)
    config = moe_config(dense.config, options.num_experts, options.top_k)
    probe = torch.randint(config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = _logits_in_fp32(dense, probe)
    if not expected.isfinite().all():
        raise ConfigError(f"the dense model in {dense_dir} gives logits that are not finite; its weights are damaged")
    source, dtype, dense_parameters = dense.config.model_type, str(dense.dtype), dense.num_parameters()
    one_of_each_mlp = sum(p.numel() for layer in dense.model.layers for p in layer.mlp.parameters())
    with appearing_whole(out_dir.resolve()) as partial:
        mixture_of(dense, config, options).save_pretrained(partial)
        del dense
        copy_companions(dense_dir, partial, gguf_file)
        mixture = load_model(partial, torch.float32, experts_implementation="eager")
        max_difference = (_logits_in_fp32(mixture, probe) - expected).abs().max().item()
        _check(max_difference, options.noise)
    return UpcycleReport(
        source=source,
        target=config.model_type,
        layers=config.num_hidden_layers,
        dtype=dtype.removeprefix("torch."),
        dense_parameters=dense_parameters,
        parameters=mixture.num_parameters(),
        active_parameters=mixture.num_parameters() - (options.num_experts - options.top_k) * one_of_each_mlp,
        max_difference=max_difference,
    )


@torch.inference_mode()
def _logits_in_fp32(model: Any, input_ids: Tensor) -> Tensor:
    """Logits `(batch, length, vocabulary)` computed in fp32 from the model's weights, whatever their dtype."""
    if model.dtype != torch.float32:
        # transformers' own `float` refuses a model from a GGUF file, though nothing of it is quantised any more.
        model = nn.Module.float(copy.deepcopy(model))
    logits: Tensor = model(input_ids=input_ids).logits
    return logits


def _check(max_difference: float, noise: float) -> None:
    """Raises LayoutError if the logits are not those of the dense model; with noise they need only be finite."""
    allowed = math.inf if noise else LOGITS_TOLERANCE
    if not max_difference < allowed:
        raise LayoutError(
            f"the logits of the written mixture differ from the dense model's by {max_difference:.1e} in fp32, "
            f"allowed is {allowed:.0e}; nothing was kept"
        )
