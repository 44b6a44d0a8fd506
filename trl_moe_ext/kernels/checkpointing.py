"""Whether a gradient checkpoint computes the running code twice."""

from __future__ import annotations

import torch
import torch.utils.checkpoint


def is_checkpointed() -> bool:
    """Whether this forward is inside a gradient checkpoint of torch, in its first run or in its recomputation.

    A non-reentrant checkpoint puts hooks of `torch.utils.checkpoint` around both; a reentrant one runs the first
    without gradients, where nothing is kept anyway, and the second inside the backward pass.
    """
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    is_non_reentrant = hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__
    return is_non_reentrant or torch._C._current_graph_task_id() != -1
