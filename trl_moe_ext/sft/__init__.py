"""Supervised fine-tuning that sees, steers and protects the router: TRL's `SFTTrainer` with a few options more.

The names load on first use: a command line needs the options alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_moe_ext.sft.config import MoeSFTConfig
    from trl_moe_ext.sft.trainer import MoeSFTTrainer

__all__ = ["MoeSFTConfig", "MoeSFTTrainer"]


def __getattr__(name: str) -> Any:
    if name == "MoeSFTConfig":
        from trl_moe_ext.sft.config import MoeSFTConfig

        return MoeSFTConfig
    if name == "MoeSFTTrainer":
        from trl_moe_ext.sft.trainer import MoeSFTTrainer

        return MoeSFTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
