"""Blocks that call their experts in a way of their own, exchanged for sparse ones while the experts are adapted."""

from __future__ import annotations

from torch import nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.experts.reading import read_layout
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts


def use_sparse_block(block: nn.Module, layout: ExpertsLayout) -> None:
    """Make `block` an instance of the layout's sparse subclass; nothing happens if it is one or needs none.

    Raises:
        LayoutError: the block is not of the class that the sparse one replaces, or its forward is overridden.
    """
    sparse = layout.sparse_block
    if sparse is None or isinstance(block, sparse):
        return
    if type(block) is not sparse.__base__ or "forward" in vars(block):
        stock = sparse.__base__.__name__  # type: ignore[union-attr]
        raise LayoutError(
            f"the experts of {type(block).__name__} can only be adapted inside an unchanged {stock}: its forward is "
            "overridden, as hooks of accelerate do. Attach the adapter before the model is dispatched"
        )
    block.__class__ = sparse


def restore_blocks(model: nn.Module) -> None:
    """Give every block whose experts are no longer adapted its own class back."""
    for block in model.modules():
        for child in block.children():
            layout = None if isinstance(child, MoeLoraExperts) else read_layout(child)
            if layout is not None and layout.sparse_block is not None and type(block) is layout.sparse_block:
                block.__class__ = layout.sparse_block.__base__  # type: ignore[assignment]
