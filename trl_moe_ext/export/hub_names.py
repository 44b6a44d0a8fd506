"""What the parts of a model are called in its checkpoint on the hub, which is what a server calls them.

transformers renames and stacks what a checkpoint holds, and can do the reverse. Nothing here lists names of families:
stand-ins of a few numbers are put through that reverse in the place of the weights, and under the name where a number
comes out, the part that it was put in for is stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from trl_moe_ext.experts.layout import ExpertsLayout, Projection

__all__ = ["HubNames", "Part", "parts_of", "read_hub_names"]

Part = Literal["gate", "up", "down"]

# Where the checkpoint stacks the experts, it has no name for one of them: these are vLLM's.
_UNNAMED: dict[Part, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# model_type -> the same where vLLM (0.32, `get_expert_mapping` of the model) departs from it.
_UNNAMED_OF: dict[str, dict[Part, str]] = {"gpt_oss": {"gate": "w1", "up": "w3", "down": "w2"}}


@dataclass(frozen=True)
class HubNames:
    """Names of modules, without ``.weight``.

    Attributes:
        linears: path in the model -> name, of those whose weight a checkpoint has as it is.
        experts: path of the module of experts, expert, part -> name.
    """

    linears: dict[str, str]
    experts: dict[tuple[str, int, Part], str]


def parts_of(projection: Projection, layout: ExpertsLayout) -> tuple[Part, ...]:
    """What the rows of a stack are: gate and up, in this order, or one of the three."""
    if projection.role == "up" and layout.has_gate and layout.by_role("gate") is None:
        return ("gate", "up")
    return (projection.role,)


def read_hub_names(model: PreTrainedModel, experts: Mapping[str, ExpertsLayout]) -> HubNames:
    """The names of all Linears and of every expert's projections.

    Args:
        model: of transformers; it may be on the meta device, and wrapped by PEFT inside.
        experts: path in the model, as if nothing were wrapped, -> layout.
    """
    numbers: list[tuple[str, int, Part | None]] = []  # what each number stands for

    def number(*what: tuple[str, int, Part | None]) -> Tensor:
        numbers.extend(what)
        return torch.arange(len(numbers) - len(what), len(numbers))

    # All Linears, adapted or not: weights that a checkpoint has merged are told by meeting each other.
    stand_ins = {f"{path}.weight": number((path, 0, None)).view(1, 1) for path in _linears(model)}
    for path, layout in experts.items():
        for projection in layout.projections:
            parts = parts_of(projection, layout)
            each = [(path, expert, part) for expert in range(layout.num_experts) for part in parts]
            stack = number(*each).view(layout.num_experts, len(parts), 1)
            stand_ins[f"{path}.{projection.parameter}"] = stack
    return _names(numbers, revert_weight_conversion(model, stand_ins), model.config.model_type)


def _linears(model: nn.Module) -> list[str]:
    weights = (name for name, weight in model.named_parameters() if name.endswith(".weight") and weight.ndim == 2)
    return [name.removesuffix(".weight").removesuffix(".base_layer") for name in weights if ".lora_" not in name]


def _names(numbers: list[tuple[str, int, Part | None]], found: Mapping[str, Tensor], model_type: str) -> HubNames:
    single = {int(tensor): key.removesuffix(".weight") for key, tensor in found.items() if tensor.numel() == 1}
    stacks = {number: key for key, tensor in found.items() if tensor.ndim == 3 for number in tensor.flatten().tolist()}
    stacks_of: defaultdict[str, set[str]] = defaultdict(set)
    for number, key in stacks.items():
        stacks_of[numbers[number][0]].add(key)
    modules = {path: _module(keys) for path, keys in stacks_of.items()}
    unnamed = _UNNAMED_OF.get(model_type, _UNNAMED)
    names = HubNames({}, {})
    for number, (path, expert, part) in enumerate(numbers):
        if part is None:
            if number in single:
                names.linears[path] = single[number]
        elif number in stacks:
            names.experts[path, expert, part] = f"{modules[path]}.{expert}.{unnamed[part]}"
        elif number in single:
            names.experts[path, expert, part] = single[number]
        else:
            names.experts[path, expert, part] = f"{path}.{expert}.{unnamed[part]}"
    return names


def _module(stacks: set[str]) -> str:
    """The module of experts, from the names of the stacks that a checkpoint has: what they have in common."""
    levels = zip(*(key.split(".")[:-1] for key in stacks))
    common = [names[0] for names in levels if len(set(names)) == 1]
    inside = common.index("experts") if "experts" in common else len(common)
    return ".".join([*common[:inside], "experts"])
