"""Blocks that call their experts in a way of their own, exchanged for sparse ones while the experts are adapted."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.experts.reading import read_layout
from trl_moe_ext.tuners.adapted_experts import AdaptedExperts


def check_block(block: nn.Module, layout: ExpertsLayout) -> None:
    """Refuse a block that cannot be exchanged.

    Raises:
        LayoutError: the block is not of the class that the sparse one replaces, or has a forward of its own.
    """
    sparse = layout.sparse_block
    if sparse is None or isinstance(block, sparse):
        return
    stock = sparse.__base__
    assert stock is not None
    # Under hooks of accelerate, which put a forward on the instance, this is the forward that they call.
    forward = vars(block).get("_old_forward", vars(block).get("forward"))
    if type(block) is not stock or getattr(forward, "__func__", forward or stock.forward) is not stock.forward:
        raise LayoutError(
            f"the experts of {type(block).__name__} can only be adapted inside an unchanged {stock.__name__}: it is "
            "exchanged for one that calls chosen experts only. Leave 'experts' out of moe_target, or its forward alone"
        )


def use_sparse_block(block: nn.Module, layout: ExpertsLayout) -> None:
    """Make `block` an instance of the layout's sparse subclass; nothing happens if it is one or needs none."""
    if layout.sparse_block is not None and not isinstance(block, layout.sparse_block):
        check_block(block, layout)
        _exchange(block, layout.sparse_block)


def restore_blocks(model: nn.Module) -> None:
    """Give every block whose experts are no longer adapted its own class back."""
    for block in model.modules():
        for child in block.children():
            layout = None if isinstance(child, AdaptedExperts) else read_layout(child)
            if layout is not None and layout.sparse_block is not None and type(block) is layout.sparse_block:
                _exchange(block, layout.sparse_block.__base__)


def _exchange(block: nn.Module, block_class: Any) -> None:
    block.__class__ = block_class
    if "_old_forward" in vars(block):  # what hooks of accelerate call
        vars(block)["_old_forward"] = MethodType(block_class.forward, block)
