"""All that is told of a model: its size, its parts, its routed experts, and the adapter that each word would make."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from trl_moe_ext.experts.anatomy import Anatomy, read_anatomy
from trl_moe_ext.reporting.inspection.adapters import AdapterSize, adapter_sizes
from trl_moe_ext.reporting.inspection.blocks import Modules
from trl_moe_ext.reporting.inspection.experts import RoutedExperts, routed_experts, split_layer
from trl_moe_ext.reporting.inspection.submodels import Submodel, submodels
from trl_moe_ext.reporting.inspection.unread import UnreadExperts, describe_unread


@dataclass(frozen=True)
class Inspection:
    """The facts of a model. Numbers of parameters count tied weights once.

    Attributes:
        model_type: as in ``config.json``.
        model_class: the class that was built.
        parameters: all.
        routed_expert_parameters: those of routed experts that could be read.
        active_parameters: what one token of text runs through, embeddings included and other modalities left out; None
            if the model does not say how many experts it chooses.
        is_active_at_most: a token may be sent to identity experts, and then runs through less.
        layers: name of a list of layers -> its length, for each list with something that can be adapted.
        has_routed_experts: some were found, readable or not.
        text_models: the parts of a composite that are adapted by default; empty if the model is no composite.
        other_models: the parts that are not.
        stored_quantised: the method with which the checkpoint is quantised, or None.
        experts: routed experts, blocks of a kind together.
        unread_experts: those that could not be read.
        r, expert_r: ranks of the adapters; `expert_r` is `r` if None.
        adapters: of each word of `moe_target` and, last, of the default.
    """

    model_type: str
    model_class: str
    parameters: int
    routed_expert_parameters: int
    active_parameters: int | None
    is_active_at_most: bool
    layers: dict[str, int]
    has_routed_experts: bool
    text_models: list[Submodel]
    other_models: list[Submodel]
    stored_quantised: str | None
    experts: list[RoutedExperts]
    unread_experts: list[UnreadExperts]
    r: int
    expert_r: int | None
    adapters: list[AdapterSize]


def inspect_model(model: PreTrainedModel, r: int = 16, expert_r: int | None = None) -> Inspection:
    """Tell what `model` is made of.

    Args:
        model: on the meta device, without adapters; left as it was.
        r: rank of the adapters that are counted.
        expert_r: their rank on routed experts; `r` if None.

    Raises:
        LayoutError: the parameters of a module of experts contradict each other.
    """
    modules = dict(model.named_modules())
    anatomy = read_anatomy((name, module) for name, module in modules.items() if name)
    experts = routed_experts(modules, anatomy)
    text_models, other_models = submodels(model, anatomy)
    parameters = sum(p.numel() for p in model.parameters())
    return Inspection(
        model_type=model.config.model_type,
        model_class=type(model).__name__,
        parameters=parameters,
        routed_expert_parameters=sum(each.parameters for each in experts),
        active_parameters=None if anatomy.unread_experts else _active(parameters, experts, other_models),
        is_active_at_most=any(each.identity_experts for each in experts),
        layers=_layers(modules, anatomy),
        has_routed_experts=bool(experts or anatomy.unread_experts),
        text_models=text_models,
        other_models=other_models,
        stored_quantised=_quantisation(model),
        experts=experts,
        unread_experts=describe_unread(anatomy.unread_experts, modules),
        r=r,
        expert_r=expert_r,
        adapters=adapter_sizes(model, anatomy, r, expert_r),
    )


def _layers(modules: Modules, anatomy: Anatomy) -> dict[str, int]:
    names = [
        *anatomy.experts,
        *anatomy.expert_linears,
        *anatomy.unread_experts,
        *anatomy.attention,
        *anatomy.dense_mlp,
    ]
    stacks = dict.fromkeys(stack for stack, index, _ in map(split_layer, names) if index is not None)
    return {stack: len(list(modules[stack].children())) for stack in stacks}


def _active(parameters: int, experts: list[RoutedExperts], other_models: list[Submodel]) -> int | None:
    active = parameters - sum(part.parameters for part in other_models)
    for each in experts:
        if each.other_modality:
            # Those in a tower went with the tower, those beside the text's experts are left out here.
            active -= 0 if _is_inside(each.stack, other_models) else each.parameters
        elif each.active_parameters is None:
            return None
        else:
            active += each.active_parameters - each.parameters
    return active


def _is_inside(name: str, parts: list[Submodel]) -> bool:
    return any(f"{name}.".startswith(f"{part.name}.") for part in parts)


def _quantisation(model: PreTrainedModel) -> str | None:
    """The name of the method in ``quantization_config``, which a config keeps as it stands in the file."""
    stored = getattr(model.config, "quantization_config", None)
    return stored.get("quant_method") if isinstance(stored, dict) else None
