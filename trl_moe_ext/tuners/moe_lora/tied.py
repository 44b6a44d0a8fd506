"""Modules that share their weights share one adapter layer: two updates of one weight could never be merged."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Weights = tuple[type[nn.Module], tuple[int, ...]]


class TiedLayers:
    """The adapted layers of a model, by the weights that they wrap.

    Args:
        model: the model, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {_weights(m.get_base_layer()): m for m in model.modules() if isinstance(m, BaseTunerLayer)}

    def share(self, target: nn.Module) -> nn.Module | None:
        """The layer that adapts all weights of `target` already, under another name, if there is one.

        It keeps `target`, to be put back by `unwrap_tied`.
        """
        layer = None if isinstance(target, BaseTunerLayer) else self._layers.get(_weights(target))
        if layer is not None:
            layer.tied_base_layers = [*getattr(layer, "tied_base_layers", ()), target]
        return layer

    def add(self, layer: nn.Module) -> None:
        """Remember a new layer."""
        if isinstance(layer, BaseTunerLayer):
            self._layers[_weights(layer.get_base_layer())] = layer


def unwrap_tied(model: nn.Module) -> None:
    """Put every tied module back where PEFT, which visits a layer once, left the layer in its other places."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.tied_base_layers.pop(0))


def _weights(module: nn.Module) -> Weights:
    return type(module), tuple(id(parameter) for parameter in module.parameters())
