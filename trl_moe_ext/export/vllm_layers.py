"""What of an adapted model goes into vLLM's layout: names, shapes and scalings of its layers, or why it can't."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.layout import ExpertsLayout, Projection
from trl_moe_ext.export.hub_names import HubNames, Part, parts_of, read_hub_names
from trl_moe_ext.tuners.moe_lora.factors import RankClass
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts
from trl_moe_ext.tuners.moe_lora.rows import MoeLoraRows

__all__ = ["AdaptedLayers", "AdaptedStack", "read_layers", "split_rows"]

# Part of a key -> what it is there for.
_KEYS = {
    ".lora_router_bias.": "router_bias=True, a bias for the choice of experts",
    ".lora_embedding_": "LoRA on an embedding",
}
_OTHER_KEY = "a weight that is trained itself, by modules_to_save, router_mode='full' or bias"
# Options of a plain LoraConfig under which B @ A is not the whole change; moe_lora refuses them itself.
_OPTIONS = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora")
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdaptedStack:
    """One module of experts.

    Attributes:
        layout: how it stores them.
        classes: the adapted experts by their rank, each with the scaling of its updates.
    """

    layout: ExpertsLayout
    classes: tuple[tuple[RankClass, float], ...]

    @classmethod
    def of(cls, layer: MoeLoraExperts, adapter_name: str) -> AdaptedStack:
        """What `layer` has of an adapter."""
        updates = next(found for p in layer.layout.projections if (found := layer.updates(adapter_name, p)))
        scalings = (update.scaling for update in updates)
        return cls(layer.layout, tuple(zip(layer.rank_classes[adapter_name], scalings, strict=True)))

    @property
    def rank(self) -> int:
        """The largest one."""
        return max(rank_class.rank for rank_class, _ in self.classes)

    @property
    def keys(self) -> set[str]:
        """What the names of its tensors end with."""
        factors = {c.factors_of(p) for c, _ in self.classes for p in self.layout.projections}
        return {f"lora_{side}.{name}" for name in factors for side in "AB"} | self.indices.keys()

    @property
    def indices(self) -> dict[str, tuple[int, ...]]:
        """Those of these tensors that tell which experts are adapted, and the experts."""
        return {
            f"lora_selected.experts{rank_class.suffix}": rank_class.selected.experts
            for rank_class, _ in self.classes
            if rank_class.selected is not None
        }


@dataclass(frozen=True)
class AdaptedLayers:
    """The layers of one adapter, by their paths in the model.

    Attributes:
        linears: path -> scaling.
        experts: path -> its experts.
        names: of both.
        shapes: of the adapter's tensors, by their keys without PEFT's prefix.
    """

    linears: dict[str, float]
    experts: dict[str, AdaptedStack]
    names: HubNames
    shapes: dict[str, tuple[int, ...]]

    @property
    def scaling(self) -> float:
        """Of the first experts, else of the first layer: the one that the config of the export has."""
        of_experts = (scaling for stack in self.experts.values() for _, scaling in stack.classes)
        return next(of_experts, None) or next(iter(self.linears.values()))

    @property
    def rank(self) -> int:
        """The largest one. A is ``(r, in)`` or ``(G, r, in)``."""
        return max(shape[-2] for key, shape in self.shapes.items() if ".lora_A." in key)


def split_rows(B: Tensor, projection: Projection, layout: ExpertsLayout) -> Iterator[tuple[Part, Tensor]]:
    """The factor ``(G, out, r)`` of a stack by what its rows are: halves, or every other one, of gate and up."""
    parts = parts_of(projection, layout)
    for position, part in enumerate(parts):
        if layout.is_interleaved:
            yield part, B[:, position :: len(parts)]
        else:
            yield part, B.chunk(len(parts), dim=1)[position]


def read_layers(model: PeftModel, adapter_name: str) -> AdaptedLayers:
    """The layers of an adapter.

    Raises:
        ConfigError: it has something that vLLM's layout can't hold.
    """
    base = model.get_base_model()
    _check_options(model.peft_config[adapter_name])
    linears: dict[str, float] = {}
    experts: dict[str, AdaptedStack] = {}
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            _check_layer(path, module, base)
            if isinstance(module, MoeLoraExperts):
                experts[path] = AdaptedStack.of(module, adapter_name)
            else:
                linears[path] = module.scaling[adapter_name]
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    shapes = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in state.items()}
    _check_keys(shapes, linears, experts)
    names = read_hub_names(base, {path: stack.layout for path, stack in experts.items()})
    merged = linears.keys() - names.linears.keys()
    if merged:
        raise _refused(f"LoRA on {min(merged)}, which the checkpoint keeps in one weight with others")
    return AdaptedLayers(linears, experts, names, shapes)


def _check_options(config: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise _refused(
            f"an adapter of {type(config).__name__}, which is no LoRA",
            "use LoRA or moe_lora, or merge the adapter (merge_and_unload) and serve the merged model",
        )
    for option in _OPTIONS:
        if getattr(config, option, None):
            raise _refused(f"{option}={getattr(config, option)!r}")
    if config.init_lora_weights not in _PLAIN_INITIALISATIONS:
        raise _refused(f"init_lora_weights={config.init_lora_weights!r}, which changes the base model's weights")


def _check_layer(path: str, module: LoraLayer, base: Any) -> None:
    if module is base.get_output_embeddings() or path.rpartition(".")[2] == "lm_head":
        raise _refused(f"LoRA on the output layer {path}")
    if isinstance(module, MoeLoraRows):
        raise _refused(f"experts without a gate_proj, up_proj and down_proj of their own ({path})")
    if isinstance(module, ParamWrapper) and (module.get_param().ndim != 2 or module.parameter_name != "weight"):
        raise _refused(f"target_parameters of PEFT on {path}.{module.parameter_name}", "use peft_type moe_lora")
    if path.rpartition(".")[2] == "kv_b_proj":
        warnings.warn(
            f"LoRA on {path}: vLLM multiplies this weight into others when it loads a model with latent attention, "
            "and leaves the adapter of it out while it generates. Put kv_b_proj into exclude_modules",
            stacklevel=2,
        )


def _check_keys(shapes: Mapping[str, Any], linears: Mapping[str, Any], experts: Mapping[str, AdaptedStack]) -> None:
    known = {f"{path}.lora_{side}.weight" for path in linears for side in "AB"}
    known |= {f"{path}.{key}" for path, stack in experts.items() for key in stack.keys}
    for key in shapes:
        if key not in known:
            reason = next((reason for part, reason in _KEYS.items() if part in key), _OTHER_KEY)
            raise _refused(f"{key} ({reason})")


def _refused(
    what: str, remedy: str = "train without it, or merge the adapter and serve the merged model"
) -> ConfigError:
    return ConfigError(f"vLLM's layout of adapters has no place for {what}: {remedy}")
