"""What the trainer is told when generation has ended for good."""

from __future__ import annotations

from trl_moe_ext.errors import MoeExtError

__all__ = ["RolloutError"]


class RolloutError(MoeExtError):
    """No more samples will come; its cause tells why."""
