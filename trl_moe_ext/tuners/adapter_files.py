"""Is this the adapter that the model expects? Checked before a single weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from torch import Tensor, nn

from trl_moe_ext.errors import AdapterFileError, some_of
from trl_moe_ext.tuners.selection.indices import SelectedIndices

_OTHER_EXPERTS = "of other experts than the model trains"


def check_adapter_state(
    model: nn.Module, state: dict[str, Tensor], adapter_name: str, tuner_prefix: str = "lora_"
) -> None:
    """Compare an adapter's tensors, under the model's own names, with the parameters they are for.

    Args:
        model: the model with the adapter's weights in place.
        state: tensors by the names of `model`'s state dict (with or without its PEFT prefix).
        adapter_name: the adapter that is being loaded.
        tuner_prefix: what the names of the tuner's own weights begin with.

    Raises:
        AdapterFileError: tensors are missing, unknown, of another shape, of other experts, or not finite; the first of
            them are named.
    """
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    expected = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
    found = {key: tensor for key, tensor in state.items() if f".{tuner_prefix}" in key}
    on_one_side = expected.keys() ^ found.keys()
    _refuse_unless_fitting(
        adapter_name,
        {
            "missing from the file": sorted(expected.keys() - found.keys()),
            "not in the model": sorted(found.keys() - expected.keys()),
            "of another shape": _other_shapes(expected, found),
            _OTHER_EXPERTS: _other_experts(expected, found),
        },
        # With a choice of experts on one side only, the weights differ in their shapes and the indices are too many.
        is_other_choice=bool(on_one_side) and all("_selected." in key for key in on_one_side),
    )
    _refuse_unless_finite(adapter_name, state)  # copies of routers too


def with_aliases(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with every name of the factors that several modules share: a file has one of them."""
    shared = {aliases[0]: aliases for aliases in _names(model).values() if len(aliases) > 1}
    return state | {alias: state[name] for name, aliases in shared.items() if name in state for alias in aliases}


def fill_in(model: nn.Module, tensors: dict[str, Tensor], missing: set[str], adapter_name: str) -> set[str]:
    """Load from an adapter's file what transformers did not find in it, and return the names that were there.

    transformers renames the keys of an adapter as it renames those of the family's own checkpoints, which in some
    families changes names that were right; and it looks for weights that several modules share under one name only.

    Args:
        model: the model with the adapter's factors in place.
        tensors: of the adapter, under the names of its file.
        missing: names of parameters of `model`.
        adapter_name: the adapter that is being loaded.
    """
    found: set[str] = set()
    for parameter, aliases in _names(model).items():
        if found.isdisjoint(aliases) and not set(aliases).isdisjoint(missing):
            parts = (alias.rpartition(f".{adapter_name}") for alias in aliases)
            keys = (f"base_model.model.{before}{after}" for before, _, after in parts)
            tensor = next((tensors[key] for key in keys if key in tensors), None)
            if tensor is not None and tensor.shape == parameter.shape:
                parameter.data = tensor.to(parameter.device, parameter.dtype)
                found.update(aliases)
    return found


def check_loaded(model: nn.Module, missing: Iterable[str], adapter_name: str) -> None:
    """The same after transformers has loaded an adapter itself, which reports missing tensors and goes on.

    Args:
        model: the model with the adapter.
        missing: names of parameters for which the file had no tensor.
        adapter_name: the adapter that was loaded.

    Raises:
        AdapterFileError: tensors are missing, of other experts, or not finite.
    """
    others = [
        f"{name.rpartition('.')[0]} {difference}"
        for name, module in model.named_modules()
        if isinstance(module, SelectedIndices) and name.endswith(f".{adapter_name}")
        for difference in module.differences()
    ]
    _refuse_unless_fitting(adapter_name, {"missing from the file": sorted(missing), _OTHER_EXPERTS: others})
    state = model.state_dict()
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    copies = {key: tensor for key, tensor in state.items() if f".modules_to_save.{adapter_name}." in key}
    _refuse_unless_finite(adapter_name, _filter_state_dict_by_key_prefixes(state, prefixes) | copies)


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    """Every name of every parameter and buffer."""
    names: dict[Tensor, list[str]] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for name, tensor in chain(parameters, buffers):
        names.setdefault(tensor, []).append(name)
    return names


def _refuse_unless_fitting(adapter_name: str, problems: dict[str, list[str]], is_other_choice: bool = False) -> None:
    told = [part for what, names in problems.items() for part in _listed(what, names)]
    if problems[_OTHER_EXPERTS] or is_other_choice:
        raise AdapterFileError(
            f"adapter {adapter_name!r} trains other experts than this run: " + "; ".join(told[::-1]) + ". Choose "
            "those that it was trained with: selected_experts in its adapter_config.json, or the profile and the "
            "options that they came from"
        )
    if told:
        raise AdapterFileError(
            f"adapter {adapter_name!r} is not for this model, or was trained with other options: "
            + "; ".join(told)
            + ". Load it on the model that base_model_name_or_path in its adapter_config.json names; to go on with "
            "its training give the peft_type, targets and ranks that stand there; or check that the file is complete"
        )


def _refuse_unless_finite(adapter_name: str, tensors: dict[str, Tensor]) -> None:
    broken = [
        key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise AdapterFileError(
            f"adapter {adapter_name!r} holds NaN or infinite values: {'; '.join(_listed('in', broken))}. Its training "
            "diverged or the file is damaged; load an earlier checkpoint"
        )


def _other_shapes(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    return [
        f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & found.keys())
        if expected[key].shape != found[key].shape
    ]


def _other_experts(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Indices of experts that differ: factors of the same shape would be loaded for the wrong ones."""
    return [
        f"{key.rpartition('.')[0]} {found[key].tolist()} instead of {expected[key].tolist()}"
        for key in sorted(expected.keys() & found.keys())
        if not expected[key].is_floating_point() and not torch.equal(expected[key].cpu(), found[key].cpu())
    ]


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{what}: {some_of(names)}"]
