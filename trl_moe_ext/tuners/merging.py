"""Adapters that are merged by adding to parts of the frozen weights: when they act, how they go in and come out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor

from trl_moe_ext.errors import AdapterFileError, ConfigError


class MergesDeltas(BaseTunerLayer):  # type: ignore[misc]
    """A layer that says which adapters it holds and what each adds to the frozen weights."""

    @abstractmethod
    def holds(self, adapter_name: str) -> bool:
        """Whether the adapter changes this layer."""

    @abstractmethod
    def _deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the frozen weights, as views, each with what the adapter adds to it, in any dtype."""

    def _check_mergeable(self, adapter_name: str) -> None:
        """Raise ConfigError if the adapter has a part that cannot be merged."""

    def _merge_rest(self, adapter_name: str, sign: int) -> None:
        """Add (sign 1) or subtract (sign -1) what the adapter has besides `_deltas`."""

    def refuse_mixed_batch(self, options: dict[str, Any]) -> None:
        """Take PEFT's ``adapter_names`` out of the keywords of a forward.

        Raises:
            ConfigError: it is given, one adapter for each sequence of the batch.
        """
        if options.pop("adapter_names", None) is not None:
            raise ConfigError(
                "one batch with several adapters (adapter_names) is not supported on "
                f"{type(self.get_base_layer()).__name__}; run a batch for each adapter, with set_adapter before it"
            )

    def adapters_to_apply(self) -> list[str]:
        """The active adapters whose updates are to be added to the output.

        Asked before the frozen weights are used: where adapters are disabled, it takes merged ones out of them.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if self.holds(name)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or the named) adapters to the frozen weights, one part after the other.

        Raises:
            AdapterFileError: with `safe_merge`, a merged weight would not be finite; then nothing has changed.
            ConfigError: the adapter has a part that cannot be merged.
        """
        self.check_mergeable(adapter_names, safe_merge)
        for name in check_adapters_to_merge(self, adapter_names):
            if self.holds(name):
                self._add(name, 1)
                self.merged_adapters.append(name)

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise what `merge` would raise; nothing is changed."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if self.holds(name) and name not in self.merged_adapters:
                self._check_mergeable(name)
                if safe_merge:
                    self._check_finite(name)

    def unmerge(self) -> None:
        """Subtract every merged adapter again; exact up to the rounding of the weights' dtype."""
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1)

    @torch.no_grad()
    def _add(self, adapter_name: str, sign: int) -> None:
        for weight, changed in self._changed(adapter_name, sign):
            weight.copy_(changed)
        self._merge_rest(adapter_name, sign)

    def _changed(self, adapter_name: str, sign: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the frozen weights, each with what is to stand there, which is float32 or wider."""
        for weight, delta in self._deltas(adapter_name):
            dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
            yield weight, weight.to(dtype) + sign * delta.to(weight.device, dtype)

    @torch.no_grad()
    def _check_finite(self, adapter_name: str) -> None:
        for _, changed in self._changed(adapter_name, 1):
            if not torch.isfinite(changed).all():
                raise AdapterFileError(
                    f"adapter {adapter_name!r} would make weights of {type(self.get_base_layer()).__name__} that are "
                    "not finite (NaN or infinite); nothing was merged. Load an intact adapter"
                )
