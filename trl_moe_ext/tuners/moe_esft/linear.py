"""A Linear that is trained in full, by what is added to its weight and bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trl_moe_ext.tuners.moe_esft.config import MoeEsftConfig
from trl_moe_ext.tuners.moe_esft.deltas import Deltas, EsftLayer


class MoeEsftLinear(nn.Module, EsftLayer):
    """Wraps an `nn.Linear`: ``y = base(x) + x D^T + d`` with the deltas D and d of the active adapters.

    Its state dict has ``esft_delta.<adapter>.weight``, and ``bias`` where the Linear has one.
    """

    base_layer: nn.Linear

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: MoeEsftConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self._start(adapter_name)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MoeEsftConfig) -> None:
        """Create the deltas of an adapter, of zero."""
        own = self.base_layer.named_parameters(recurse=False)
        self.esft_delta[adapter_name] = Deltas({name: p.shape for name, p in own}, self.base_layer.weight)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the wrapped Linear: ``(..., in)`` to ``(..., out)``, in the dtype that it returns."""
        self.refuse_mixed_batch(kwargs)
        active = self._active()  # first: it may take a merged adapter out of the frozen weights
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for deltas in active:
            weight, bias = deltas.of("weight"), deltas.of("bias")
            assert weight is not None, "every adapter of a Linear has a delta of its weight"
            y = y + F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).to(y.dtype)
        return y

    @property
    def weight(self) -> Tensor:
        """``(out, in)`` with the active deltas, through which gradients flow: some blocks read it and multiply."""
        return self._with_deltas("weight", self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """``(out,)`` with the active deltas; None without a bias."""
        bias = self.base_layer.bias
        return None if bias is None else self._with_deltas("bias", bias)

    def _with_deltas(self, name: str, frozen: Tensor) -> Tensor:
        total = frozen
        for deltas in self._active():
            delta = deltas.of(name)
            total = total if delta is None else total + delta
        return total.to(frozen.dtype)

    def _active(self) -> list[Deltas]:
        """The deltas that are to be added to what the wrapped Linear gives."""
        return [self.esft_delta[name] for name in self.adapters_to_apply()]  # type: ignore[misc]

    # -- merging -----------------------------------------------------------------------------------------------------

    def _deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The weight, and the bias where there is one, each with its delta."""
        for name, delta in self.esft_delta[adapter_name].named_parameters():
            yield self.base_layer.get_parameter(name), delta

    def __repr__(self) -> str:
        return "moe_esft." + super().__repr__()
