"""What MOE_ESFT promises on every family: one function a promise, which builds its own models and raises if broken.

The adapters train about a quarter of the experts of each layer, of those that the inputs reach, and every Linear
beside them. The models are float64 where a whole model is compared, see `comparing`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.experts.census import promises
from trl_moe_ext.experts.census.comparing import (
    BFLOAT16,
    CheckError,
    direction_of,
    gradients_of,
    output_of,
    relative_error,
    require_close,
    require_close_gradients,
    require_equal,
    stock_model,
)
from trl_moe_ext.experts.census.esft_reference import compare_layer, trained_parts
from trl_moe_ext.experts.census.tiny import build, skeleton
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig, MoeEsftExperts
from trl_moe_ext.tuners.targets.options import TARGET_WORDS

Selection = dict[str, list[int]]


def identity(model_type: str) -> None:
    """A new adapter changes nothing."""
    stock = stock_model(model_type)
    expected = output_of(stock)
    require_close(output_of(_adapted(stock, model_type, is_new=True)), expected, "output of a new adapter")


def reference(model_type: str) -> None:
    """Output and gradients are those of full fine-tuning, on what is trained; nothing else has a gradient."""
    stock = stock_model(model_type).requires_grad_(False)
    model = _adapted(copy.deepcopy(stock), model_type)
    deltas = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # In this order: some families change the dtype of a weight when they are first called.
    unadapted, found = output_of(stock), output_of(model)
    parts = trained_parts(model, stock)
    for name, delta in deltas.items():
        parts[name].add(delta.detach())
    weights = {name: parts[name].weight.requires_grad_() for name in deltas}
    expected = output_of(stock)
    require_close(found, expected, "output")
    if relative_error(unadapted, expected) < 1e-3:
        raise CheckError("the adapter does not change the output: nothing was tested")
    direction = direction_of(expected)
    of_full = zip(weights, gradients_of(expected, weights, direction), strict=True)
    of_chosen = [parts[name].chosen(gradient) for name, gradient in of_full]
    require_close_gradients(deltas, gradients_of(found, deltas, direction), of_chosen)
    torch.autograd.backward(output_of(model), direction)
    others = [n for n, p in model.named_parameters() if n not in deltas and p.grad is not None]
    if others:
        raise CheckError(f"frozen weights have gradients: {others[:3]}")


def merge(model_type: str) -> None:
    """Merged weights give the same output; experts that are not chosen never change, and unloading leaves no trace."""
    unchosen: dict[str, Tensor] = {}

    def adapt(stock: nn.Module) -> PeftModel:
        model = _adapted(stock, model_type)
        unchosen.update(_rows_of_others(model))
        return model

    promises.keeps_merging(stock_model(model_type), adapt, lambda model, what: _same_rows(model, unchosen, what))


def reload(model_type: str) -> None:
    """A saved adapter, loaded by PEFT or by transformers itself, gives the same output to the last bit."""
    promises.keeps_reloading(stock_model(model_type), lambda stock: _adapted(stock, model_type))


def two_adapters(model_type: str) -> None:
    """Adapters of different experts on one model: each alone, both together, merged together, one deleted."""
    model = _adapted(stock_model(model_type), model_type)
    second = promises.keeps_apart(model, _config(model_type, skip=1), randomise_deltas)
    both = output_of(model)
    model.merge_adapter(["default", "second"])
    require_close(output_of(model), both, "output with two merged adapters")
    model.unmerge_adapter()
    model.delete_adapter("default")
    model.set_adapter("second")
    require_close(output_of(model), second, "output of the second adapter after the first was deleted")


def checkpointing(model_type: str) -> None:
    """Gradient checkpointing, which computes a layer twice, gives the same gradients."""
    promises.keeps_checkpointing(_adapted(stock_model(model_type), model_type).train())


def bfloat16(model_type: str) -> None:
    """Every layer of experts in bfloat16, its deltas in float32, is as near to float64 as roundings allow."""
    model = get_peft_model(build(model_type, torch.bfloat16), _config(model_type))
    randomise_deltas(model, "default", seed=3)
    for layer in model.modules():
        if isinstance(layer, MoeEsftExperts):
            found, expected = compare_layer(layer)
            for name, value in expected.items():
                require_close(found[name], value, f"{name} of one layer in bfloat16", BFLOAT16)


ESFT_CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check for check in (identity, reference, merge, reload, two_adapters, checkpointing, bfloat16)
}


@torch.no_grad()
def randomise_deltas(model: nn.Module, adapter: str, seed: int) -> None:
    """Give an adapter deltas of a third of the size of its weights."""
    generator = torch.Generator().manual_seed(seed)
    deltas = dict(model.named_parameters())
    for name, part in trained_parts(model).items():
        if f".esft_delta.{adapter}." in name:
            size = 0.3 * float(part.weight.float().square().mean().sqrt())
            deltas[name].copy_(torch.randn(deltas[name].shape, generator=generator) * size)


def words(model_type: str) -> list[str]:
    """The parts of a family that MOE_ESFT can train: those without bare parameters, and experts that are no tables."""
    modules = dict(skeleton(model_type).named_modules())
    anatomy = read_anatomy(modules.items())
    trained = [word for word in TARGET_WORDS if not anatomy.parameters.get(word)]
    if not all(isinstance(modules[name], nn.Linear) for name in anatomy.expert_linears):
        trained.remove("experts")
    return trained


@cache
def _used_experts(model_type: str) -> dict[str, list[int]]:
    """Modules of experts -> all of theirs, those that most depends on first: found by training every one."""
    stock = stock_model(model_type)
    anatomy = read_anatomy(stock.named_modules())
    config = MoeEsftConfig(moe_target=["experts"], expert_selection="all")
    model = get_peft_model(stock, config, autocast_adapter_dtype=False).eval()
    deltas = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes: dict[str, Tensor] = {}
    for name, gradient in zip(deltas, gradients_of(output_of(model).square().mean(), deltas), strict=True):
        module = name.partition(".esft_delta.")[0].removeprefix("base_model.model.")
        container = anatomy.expert_linears.get(module)
        if container is None:
            sizes[module] = sizes.get(module, 0) + gradient.flatten(1).square().sum(1)
        else:
            children = [child for child, _ in stock.get_submodule(container).named_children()]
            expert = children.index(module[len(container) + 1 :].partition(".")[0])
            of_all = sizes.setdefault(container, torch.zeros(len(children), dtype=torch.float64))
            of_all[expert] += gradient.square().sum()
    return {name: size.argsort(descending=True).tolist() for name, size in sizes.items()}


def _config(model_type: str, skip: int = 0) -> MoeEsftConfig:
    """An adapter of a quarter of the experts, without the `skip` most important ones, and of all else."""
    trained = words(model_type)
    if "experts" not in trained:
        return MoeEsftConfig(moe_target=trained)
    selection = {
        name: experts[skip:][: max(1, len(experts) // 4)] for name, experts in _used_experts(model_type).items()
    }
    return MoeEsftConfig(moe_target=trained, selected_experts=selection)


def _adapted(stock: nn.Module, model_type: str, is_new: bool = False) -> PeftModel:
    model = get_peft_model(stock, _config(model_type), autocast_adapter_dtype=False).eval()
    if not is_new:
        randomise_deltas(model, "default", seed=3)
    return model


def _rows_of_others(model: nn.Module) -> dict[str, Tensor]:
    """Of every stack with a delta the rows of the experts that are not trained."""
    return {name: part.others() for name, part in trained_parts(model).items() if part.layout is not None}


def _same_rows(model: nn.Module, before: dict[str, Tensor], what: str) -> None:
    for name, rows in _rows_of_others(model).items():
        require_equal(rows, before[name], f"{name}, of experts that are not chosen, after {what}")
