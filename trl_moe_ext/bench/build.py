"""From a plan to the model that is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trl_moe_ext.bench.plan import Kind, Plan
from trl_moe_ext.bench.shapes import shape_named
from trl_moe_ext.bench.subjects import ExpertsAlone, LanguageModel, Subject
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.finding import find_experts


def build(plan: Plan, implementation: str) -> Subject:
    """The model of a plan, frozen and in training mode.

    Args:
        plan: which model, in what dtype and on which device.
        implementation: of transformers' experts, where the family has a choice.

    Raises:
        ConfigError: there is no such shape, or the checkpoint has no routed experts.
    """
    model = _model(plan.kind, plan.source, plan.dtype, plan.device)
    if any(layout.read_from == "interface" for layout in find_experts(dict(model.named_modules())).stacks.values()):
        model.set_experts_implementation(implementation)
    if plan.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    subject = _subject(plan.kind, plan.source, model)
    subject.model.requires_grad_(False).train()
    return subject


def skeleton(kind: Kind, source: str, dtype: str) -> Subject:
    """The same without weights, on the meta device.

    Raises:
        ConfigError: as `build`.
    """
    return _subject(kind, source, _model(kind, source, dtype, "meta"))


def _model(kind: Kind, source: str, dtype: str, device: str) -> Any:
    if kind != "step":
        return shape_named(source).build(getattr(torch, dtype), device)
    from transformers import AutoConfig, AutoModelForCausalLM

    if device == "meta":
        with torch.device(device):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=getattr(torch, dtype))
    return AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).to(device)


def _subject(kind: Kind, source: str, model: nn.Module) -> Subject:
    if kind == "experts":
        return ExpertsAlone(model)
    subject = LanguageModel(model)
    if not subject.found.modules:
        raise ConfigError(f"{source} has no routed experts: its peers would all be the same")
    return subject
