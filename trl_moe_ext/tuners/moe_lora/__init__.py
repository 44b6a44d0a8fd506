"""Tuner type MOE_LORA: grouped LoRA on routed experts, PEFT's own LoRA on everything else."""

from trl_moe_ext.tuners.moe_lora.biased_routers import router_biases
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts
from trl_moe_ext.tuners.moe_lora.model import MoeLoraModel

__all__ = ["MoeLoraConfig", "MoeLoraExperts", "MoeLoraModel", "router_biases"]
