"""LoRA on routed experts, and training of chosen ones, for TRL and PEFT.

Importing this package imports nothing but the standard library; the public names load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_moe_ext._version import __version__

if TYPE_CHECKING:
    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
    from trl_moe_ext.grpo.trainer import AsyncMoeGRPOTrainer
    from trl_moe_ext.sft import MoeSFTConfig, MoeSFTTrainer
    from trl_moe_ext.tuners.moe_esft import MoeEsftConfig, MoeEsftModel
    from trl_moe_ext.tuners.moe_lora import MoeLoraConfig, MoeLoraModel

__all__ = [
    "AsyncMoeGRPOConfig",
    "AsyncMoeGRPOTrainer",
    "MoeEsftConfig",
    "MoeEsftModel",
    "MoeLoraConfig",
    "MoeLoraModel",
    "MoeSFTConfig",
    "MoeSFTTrainer",
    "__version__",
]

_HOME = {
    "AsyncMoeGRPOConfig": "trl_moe_ext.grpo.config",
    "AsyncMoeGRPOTrainer": "trl_moe_ext.grpo.trainer",
    "MoeEsftConfig": "trl_moe_ext.tuners.moe_esft",
    "MoeEsftModel": "trl_moe_ext.tuners.moe_esft",
    "MoeLoraConfig": "trl_moe_ext.tuners.moe_lora",
    "MoeLoraModel": "trl_moe_ext.tuners.moe_lora",
    "MoeSFTConfig": "trl_moe_ext.sft",
    "MoeSFTTrainer": "trl_moe_ext.sft",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(_HOME[name]), name)
    # Done already by autoload, unless that is switched off: who asks for a class by name wants it to work.
    import_module("trl_moe_ext.hosts.peft").register()
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
