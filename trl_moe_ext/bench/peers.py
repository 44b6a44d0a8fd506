"""What is compared: the same model, with its experts frozen or adapted in different ways.

All train LoRA of the same rank on the same Linears of attention, where the model has attention, so that only what they
do with the experts differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from trl_moe_ext.bench.subjects import Subject
from trl_moe_ext.errors import ConfigError, MoeExtError, near_matches
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.plugins import host
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig
from trl_moe_ext.tuners.moe_lora import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts

_KERNEL = "moe_lora:"


class PeerUnavailableError(MoeExtError):
    """A peer that cannot adapt the model at hand; the message is the reason."""


@dataclass(frozen=True)
class Peer:
    """One way to adapt a model.

    Attributes:
        attach: from a subject and a rank to the model that is trained.
        implementation: of transformers' experts, where a family has a choice.
        adapts_experts: whether the experts get low-rank factors that are trained.
        is_stock: whether the experts run in transformers' own code.
        gradient_stacks: how many tensors of the size of a layer's experts its backward pass holds at once, besides
            the merged experts that it keeps if this is not zero.
        trained_share: part of the experts' own weights that is trained.
    """

    attach: Callable[[Subject, int], nn.Module]
    implementation: str = "grouped_mm"
    adapts_experts: bool = True
    is_stock: bool = False
    gradient_stacks: int = 0
    trained_share: float = 0.0


def peer_named(name: str) -> Peer:
    """The peer of that name, one of `PEERS` or ``moe_lora:KERNEL``.

    Raises:
        ConfigError: there is none.
        PluginError: there is no such kernel.
    """
    if name.startswith(_KERNEL):
        kernel = host().lookup("register_kernels", name.removeprefix(_KERNEL)).name
        return Peer(partial(_moe_lora, kernel=kernel))
    if name not in PEERS:
        raise ConfigError(f"there is no peer {name!r}; {near_matches(name, [*PEERS, f'{_KERNEL}KERNEL'])}")
    return PEERS[name]


def _attention(subject: Subject) -> list[str]:
    """Full names of ``q_proj`` and ``v_proj``, or of all Linears of attention in a family without either."""
    last = {name: name.rpartition(".")[2] for name in read_anatomy(subject.model.named_modules()).attention}
    wanted = {"q_proj", "v_proj"}
    return [name for name in last if last[name] in wanted or not wanted <= set(last.values())]


def _frozen(subject: Subject, rank: int) -> nn.Module:
    attention = _attention(subject)
    if not attention:
        return subject.model
    return get_peft_model(subject.model, LoraConfig(r=rank, target_modules=attention))  # type: ignore[no-any-return]


def _moe_lora(subject: Subject, rank: int, **options: Any) -> nn.Module:
    # Given as Linears, attention is what is named here; without any, the experts are all there is to adapt.
    config = MoeLoraConfig(r=rank, target_modules=_attention(subject) or None, moe_target=["experts"], **options)
    return get_peft_model(subject.model, config)  # type: ignore[no-any-return]


def _quarter(subject: Subject) -> dict[str, list[int]]:
    """Every fourth expert of each layer: with random routing they are used as much as the others."""
    if subject.found.linears:
        raise PeerUnavailableError("Experts that are Linears of their own run in no kernel of ours")
    return {name: [*range(0, layout.num_experts, 4)] for name, layout in subject.found.stacks.items()}


def _moe_lora_quarter(subject: Subject, rank: int) -> nn.Module:
    return _moe_lora(subject, rank, selected_experts=_quarter(subject))


def _moe_esft_quarter(subject: Subject, rank: int) -> nn.Module:
    """A quarter of the experts in full; attention as it is, as the two are no adapters of one type."""
    config = MoeEsftConfig(moe_target=["experts"], selected_experts=_quarter(subject))
    return get_peft_model(subject.model, config)  # type: ignore[no-any-return]


def _moe_lora_off(subject: Subject, rank: int) -> nn.Module:
    """Our own kernel as if no adapter were active. `disable_adapter` would run the stock module."""
    model = _moe_lora(subject, rank)
    layers = [module for module in model.modules() if isinstance(module, MoeLoraExperts)]
    if not layers:
        raise PeerUnavailableError("Experts that are Linears of their own run in no kernel of ours")
    for layer in layers:
        without = type(f"{type(layer).__name__}Off", (type(layer),), {"_updates": lambda *_, **__: ()})
        layer.__class__ = without
        for factors in (layer.lora_A, layer.lora_B):
            factors.requires_grad_(False)
    return model


def _peft(subject: Subject, rank: int, implementation: str) -> nn.Module:
    others = [layout.read_from for layout in subject.found.stacks.values() if layout.read_from != "interface"]
    if others and implementation != "eager":
        raise PeerUnavailableError(
            f"Experts outside transformers' experts interface ({others[0]}) have one implementation, see peft_eager"
        )
    stacks = [f"{name}.{p.parameter}" for name, layout in subject.found.stacks.items() for p in layout.projections]
    config = LoraConfig(
        r=rank, target_modules=[*_attention(subject), *subject.found.linears], target_parameters=stacks or None
    )
    try:
        return get_peft_model(subject.model, config)  # type: ignore[no-any-return]
    except Exception as error:  # whatever stock PEFT has against these stacks
        raise PeerUnavailableError(f"Stock PEFT refuses: {type(error).__name__}: {error}") from error


PEERS = {
    # The experts as they are, in stock transformers.
    "frozen": Peer(_frozen, adapts_experts=False, is_stock=True),
    # Default settings; with one other; and our own kernel without an adapter on the experts: the truer floor.
    "moe_lora": Peer(_moe_lora),
    "moe_lora_none": Peer(partial(_moe_lora, save_activations="none")),
    "moe_lora_off": Peer(_moe_lora_off, adapts_experts=False),
    # A quarter of the experts, with factors and in full.
    "moe_lora_quarter": Peer(_moe_lora_quarter),
    "moe_esft_quarter": Peer(_moe_esft_quarter, adapts_experts=False, trained_share=0.25),
    # Stock PEFT's target_parameters, with grouped products and with one expert after the other, which takes minutes.
    "peft_grouped_mm": Peer(partial(_peft, implementation="grouped_mm"), is_stock=True, gradient_stacks=1),
    "peft_eager": Peer(
        partial(_peft, implementation="eager"), implementation="eager", is_stock=True, gradient_stacks=2
    ),
}
_ON_DEMAND = ("moe_lora_quarter", "moe_esft_quarter", "peft_eager")
DEFAULT_PEERS = tuple(name for name in PEERS if name not in _ON_DEMAND)
