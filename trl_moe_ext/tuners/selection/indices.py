"""The chosen experts of an adapter as they stand in its file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from trl_moe_ext.kernels.selected import SelectedExperts


class SelectedIndices(nn.Module):
    """Which experts the weights of an adapter are of: ``(G,)`` int64 each, under their own names.

    A model that was built for other experts would load the weights without a difference in their shapes.

    Attributes:
        selections: name -> the experts that the weights in the model are of, whatever is loaded.
    """

    def __init__(self, selections: Mapping[str, SelectedExperts]) -> None:
        super().__init__()
        self.selections = dict(selections)
        for name, selected in selections.items():
            self.register_buffer(name, torch.tensor(selected.experts, device="cpu"))

    def differences(self) -> list[str]:
        """What was loaded for other experts than the model has."""
        return [
            f"{getattr(self, name).tolist()} instead of {list(selected.experts)}"
            for name, selected in self.selections.items()
            if getattr(self, name).tolist() != list(selected.experts)
        ]
