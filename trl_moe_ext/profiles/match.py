"""Whether a profile is of the model that it is used for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import distributed as dist
from torch import nn
from transformers.integrations import is_fsdp_enabled

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.profiles.fingerprint import fingerprint, is_same
from trl_moe_ext.profiles.profile import ExpertProfile, LayerUse
from trl_moe_ext.router.places import Place, read_places
from trl_moe_ext.router.routers import Router, find_routers

__all__ = ["check_profile"]


def check_profile(profile: ExpertProfile, model: nn.Module) -> None:
    """Refuse a profile of another model.

    Compared are the names of the modules of experts, how many each holds and how many are chosen for a token, and
    some weights of each router, where both are known: not on the meta device.

    Args:
        profile: of a model with or without adapters.
        model: with or without adapters.

    Raises:
        ConfigError: with the first difference.
    """
    places = read_places(model)
    routers = {experts: router for router in find_routers(model) for experts in router.all_experts}
    difference = _of_names(profile, routers, places) or next(
        (found for layer in profile.layers if (found := _of_layer(layer, routers[layer.experts[0]], places))), None
    )
    if difference is not None:
        raise ConfigError(
            f"the profile of {profile.model} is of another model: {difference}. Make one of this model with "
            "`trl-moe profile`"
        )


def _of_names(profile: ExpertProfile, names: Iterable[str], places: Mapping[str, Place]) -> str | None:
    here = [name for name in names if name not in profile.left_out]
    there = [name for layer in profile.layers for name in layer.experts]
    if {*here} == {*there}:
        return None
    architecture = type(places[""].module).__name__
    prefixes = _prefixes(there, here)
    if prefixes is not None:
        return (
            f"its names begin with {prefixes[0]!r} (it was loaded as {profile.architecture}), those of this model "
            f"with {prefixes[1]!r} ({architecture}). Load both with the same class"
        )
    surplus, missing = sorted({*there} - {*here}), sorted({*here} - {*there})
    parts = [f"it has the experts {surplus[0]!r}, which this {architecture} has not"] if surplus else []
    parts += [f"it has not the experts {missing[0]!r} of this {architecture}"] if missing else []
    more = len(surplus) + len(missing) - len(parts)
    return " and ".join(parts) + (f", and {more} more such differences" if more else "")


def _prefixes(there: Sequence[str], here: Sequence[str]) -> tuple[str, str] | None:
    """What all names begin with there and here, if they are the same after that."""
    if len(there) != len(here) or not there:
        return None
    one, other = there[0].split("."), here[0].split(".")
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    first, second = ("".join(f"{part}." for part in parts) for parts in (one, other))
    if not all(name.startswith(first) for name in there) or not all(name.startswith(second) for name in here):
        return None
    is_same_rest = {name[len(first) :] for name in there} == {name[len(second) :] for name in here}
    return (first, second) if is_same_rest else None


def _of_layer(layer: LayerUse, router: Router, places: Mapping[str, Place]) -> str | None:
    what = f"layer {layer.label} ({layer.experts[0]})"
    if layer.num_experts != router.num_with_weights:
        return f"{what} has {layer.num_experts} experts in it instead of {router.num_with_weights}"
    if layer.top_k != router.top_k:
        return f"{what} sends a token to {layer.top_k} experts in it instead of {router.top_k}"
    numbers = fingerprint(places, router.name) if _has_weights_here() else ()
    if not is_same(layer.fingerprint, numbers):
        return f"the weights of the router of {what} differ; it is another checkpoint"
    return None


def _has_weights_here() -> bool:
    """Under FSDP with RAM-efficient loading only the first process of a machine has read the weights yet."""
    return not is_fsdp_enabled() or dist.get_node_local_rank(0) == 0
