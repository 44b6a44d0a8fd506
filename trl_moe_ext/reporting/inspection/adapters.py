"""How large an adapter would be: one is attached to the model on the meta device, counted and taken off again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from trl_moe_ext.experts.anatomy import Anatomy
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.targets.options import TARGET_WORDS

_BYTES_FP32 = 4


@dataclass(frozen=True)
class AdapterSize:
    """The adapter that a choice of `moe_target` makes; zeros if the model has nothing of the kind.

    Attributes:
        moe_target: the words.
        modules: adapted modules; all experts of a layer are one.
        parameters: trainable.
        share: `parameters` among all parameters, the adapter's own included, as training reports it.
        bytes_fp32: of the adapter in float32.
    """

    moe_target: list[str]
    modules: int = 0
    parameters: int = 0
    share: float = 0.0
    bytes_fp32: int = 0


def adapter_sizes(model: PreTrainedModel, anatomy: Anatomy, r: int, expert_r: int | None) -> list[AdapterSize]:
    """The adapter of each word of `moe_target` alone, and last that of the default words.

    Where experts cannot be read, `experts` is empty and the default, which an adapter would refuse, is left out.

    Args:
        model: on the meta device, without adapters; left as it was.
        anatomy: of `model`.
        r: rank.
        expert_r: rank on routed experts; `r` if None.
    """
    sizes = [
        adapter_size(model, [word], r, expert_r) if _is_there(word, anatomy) else AdapterSize([word])
        for word in TARGET_WORDS
    ]
    default = list(MoeLoraConfig().moe_target)
    if anatomy.unread_experts:
        return sizes
    is_empty = not any(_is_there(word, anatomy) for word in default)
    return [*sizes, AdapterSize(default) if is_empty else adapter_size(model, default, r, expert_r)]


def adapter_size(model: PreTrainedModel, moe_target: list[str], r: int, expert_r: int | None) -> AdapterSize:
    """Attach an adapter for `moe_target` to `model`, on the meta device, count it and take it off.

    Raises:
        ConfigError: the model has nothing of what `moe_target` names.
        LayoutError: its experts cannot be read, and are asked for.
    """
    config = MoeLoraConfig(moe_target=list(moe_target), r=r, expert_r=expert_r if "experts" in moe_target else None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what the host libraries have to tell each other
        warnings.filterwarnings("ignore", message=".*has no routed experts.*")  # the report says so once
        adapted = get_peft_model(model, config)
    parameters, total = adapted.get_nb_trainable_parameters()
    modules = sum(
        isinstance(module, BaseTunerLayer) and any(p.requires_grad for p in module.parameters())
        for module in adapted.modules()
    )
    adapted.unload()
    return AdapterSize(moe_target, modules, parameters, parameters / total, parameters * _BYTES_FP32)


def _is_there(word: str, anatomy: Anatomy) -> bool:
    if word != "experts":
        return bool(getattr(anatomy, word) or anatomy.parameters[word])
    if anatomy.unread_experts:
        return False
    # Without routed experts the word means the dense MLP.
    return bool(anatomy.experts or anatomy.expert_linears) or _is_there("dense_mlp", anatomy)
