"""Modules that share their weights share one adapter layer: two updates of one weight could never be merged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

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


class TiedNames:
    """The names of modules that share their weights: an update of one is an update of the others.

    Args:
        modules: name -> module of the model as if no adapter were attached.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._weights = {name: _weights(module) for name, module in modules.items() if _holds_weights(module)}
        self._names: defaultdict[Weights, set[str]] = defaultdict(set)
        for name, weights in self._weights.items():
            self._names[weights].add(name)

    def of(self, names: Iterable[str]) -> set[str]:
        """`names` and all that share weights with one of them."""
        weights = {self._weights[name] for name in names if name in self._weights}
        return {*names, *(other for each in weights for other in self._names[each])}


def unwrap_tied(model: nn.Module) -> None:
    """Put every tied module back where PEFT, which visits a layer once, left the layer in its other places."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.tied_base_layers.pop(0))


def _holds_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _weights(module: nn.Module) -> Weights:
    return type(module), tuple(id(parameter) for parameter in module.parameters())
