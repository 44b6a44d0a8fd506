"""What a mixture made from a dense checkpoint is to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trl_moe_ext.errors import ConfigError, near_matches

__all__ = ["DTYPES", "UpcycleOptions"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class UpcycleOptions:
    """What the mixture is to be.

    Attributes:
        num_experts: copies of each MLP.
        top_k: experts a token.
        noise: standard deviation of the normal noise on every copy, in units of the weight's own. Zero keeps the
            logits; with more, the experts differ from the start.
        dtype: of the written weights; ``"auto"`` keeps that of the checkpoint.
        seed: of the routers and the noise.

    Raises:
        ConfigError: a value is out of its range.
    """

    num_experts: int = 4
    top_k: int = 2
    noise: float = 0.0
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k {self.top_k} of num_experts {self.num_experts} is impossible; take 1 <= top_k <= num_experts"
            )
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ConfigError(f"noise {self.noise} is not a standard deviation; give 0 or a positive number")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; {near_matches(self.dtype, DTYPES)}")
