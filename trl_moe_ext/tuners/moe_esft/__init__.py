"""Tuner type MOE_ESFT: the chosen experts' own weights are trained, and Linears beside them in full."""

from trl_moe_ext.tuners.moe_esft.config import MoeEsftConfig
from trl_moe_ext.tuners.moe_esft.layer import MoeEsftExperts
from trl_moe_ext.tuners.moe_esft.linear import MoeEsftLinear
from trl_moe_ext.tuners.moe_esft.model import MoeEsftModel

__all__ = ["MoeEsftConfig", "MoeEsftExperts", "MoeEsftLinear", "MoeEsftModel"]
