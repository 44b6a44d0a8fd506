"""The parts of a composite that are models of their own: those that read text, and those of other modalities."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from trl_moe_ext.experts.anatomy import Anatomy
from trl_moe_ext.experts.finding import ancestors
from trl_moe_ext.experts.registry import PARTS


@dataclass(frozen=True)
class Submodel:
    """A model inside a model: its name, class, and number of parameters."""

    name: str
    class_name: str
    parameters: int


def submodels(model: PreTrainedModel, anatomy: Anatomy) -> tuple[list[Submodel], list[Submodel]]:
    """The parts of a composite that are adapted by default, and those that are not; nothing for any other model.

    Args:
        model: the model.
        anatomy: of `model`; a part is adapted by default if a part of the anatomy is in it.
    """
    text_config = model.config.get_text_config()
    if text_config is model.config:
        return [], []
    inside = {name: m for name, m in model.named_modules() if name and isinstance(m, PreTrainedModel)}
    adapted = _modules_with_adapted(anatomy)
    texts = {name for name, m in inside.items() if name in adapted and type(m.config) is type(text_config)}
    around = {each for name in texts if texts.isdisjoint(ancestors(name)) for each in ancestors(name)}
    outermost: list[str] = []
    for name in inside:
        if name not in around and not {*ancestors(name)} & {*outermost}:
            outermost.append(name)
    parts = {
        name: Submodel(name, type(inside[name]).__name__, sum(p.numel() for p in inside[name].parameters()))
        for name in outermost
    }
    return [p for n, p in parts.items() if n in adapted], [p for n, p in parts.items() if n not in adapted]


def _modules_with_adapted(anatomy: Anatomy) -> set[str]:
    """Names of the modules that hold something a word of `moe_target` names, or experts that cannot be read."""
    names = [*anatomy.experts, *anatomy.expert_linears, *anatomy.unread_experts]
    for part in PARTS:
        names += [*getattr(anatomy, part), *anatomy.parameters[part]]
    return {ancestor for name in names for ancestor in ancestors(name)}
