"""What adapters of every tuner promise alike. The checks of each tuner make the models, and what they add to this."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from trl_moe_ext.experts.census.comparing import (
    CheckError,
    gradients_of,
    output_of,
    output_without_adapters,
    relative_error,
    require_close,
    require_close_gradients,
    require_equal,
)

Adapt = Callable[[nn.Module], PeftModel]


def keeps_merging(stock: nn.Module, adapt: Adapt, after: Callable[[PeftModel, str], None] | None = None) -> None:
    """Merged weights give the same output, unmerging gives the old weights back, and unloading leaves no trace.

    Args:
        stock: the family's own model.
        adapt: gives it an adapter.
        after: called with the model after merging and after unmerging, for what else has to hold then.
    """
    before, classes = copy.deepcopy(stock.state_dict()), [type(m) for m in stock.modules()]
    model = adapt(stock)
    expected, base = output_of(model), output_without_adapters(model)
    model.merge_adapter()
    require_close(output_of(model), expected, "output with merged weights")
    if after is not None:
        after(model, "merging")
    require_close(output_without_adapters(copy.deepcopy(model)), base, "output without the adapter while it is merged")
    model.unmerge_adapter()
    require_close(output_of(model), expected, "output after unmerging")
    if after is not None:
        after(model, "unmerging")
    merged = model.merge_and_unload(safe_merge=True)
    require_close(output_of(merged), expected, "output of the merged model")
    if [type(m) for m in merged.modules()] != classes or merged.state_dict().keys() != before.keys():
        raise CheckError("the merged model has other modules or weights than the stock one")


def keeps_reloading(stock: nn.Module, adapt: Adapt) -> None:
    """A saved adapter, loaded by PEFT or by transformers itself, gives the same output to the last bit."""
    with tempfile.TemporaryDirectory() as directory:
        model = adapt(copy.deepcopy(stock))
        model.save_pretrained(directory)
        expected = output_of(model)
        loaded = PeftModel.from_pretrained(copy.deepcopy(stock), directory, autocast_adapter_dtype=False).eval()
        require_equal(output_of(loaded), expected, "output after PeftModel.from_pretrained")
        stock.load_adapter(directory)  # type: ignore[operator]
        require_equal(output_of(stock.eval()), expected, "output after model.load_adapter")


def keeps_apart(model: PeftModel, second: PeftConfig, randomise: Callable[[nn.Module, str, int], None]) -> Tensor:
    """A second adapter beside the first: each alone, and both together, which are active afterwards.

    Args:
        model: with the adapter ``default``.
        second: of the adapter ``second``.
        randomise: draws the weights of an adapter from a seed.

    Returns:
        The output of the second alone.
    """
    first = output_of(model)
    model.add_adapter("second", second)
    require_equal(output_of(model), first, "output of the first adapter beside a second one")
    randomise(model, "second", 7)
    model.set_adapter("second")
    alone = output_of(model)
    if relative_error(alone, first) < 1e-3:
        raise CheckError("both adapters give the same output")
    model.base_model.set_adapter(["default", "second"])
    both = output_of(model)
    if min(relative_error(both, first), relative_error(both, alone)) < 1e-3:
        raise CheckError("two active adapters give the output of one")
    return alone


def keeps_checkpointing(model: PeftModel) -> None:
    """Gradient checkpointing, which computes a layer twice, gives the same gradients.

    Args:
        model: with an adapter, in training mode.
    """
    base = model.get_base_model()
    has_layers = any(hasattr(module, "gradient_checkpointing") for module in base.modules())
    if not (has_layers and base.supports_gradient_checkpointing):
        return  # the family has none
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = gradients_of(output_of(model).square().mean(), weights)
    # Its name from transformers 5.23 on, and the one before.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    require_close_gradients(weights, gradients_of(output_of(model).square().mean(), weights), plain)
