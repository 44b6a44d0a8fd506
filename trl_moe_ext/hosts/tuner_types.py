"""The adapter types of this package, as its hosts name them. Nothing is imported for it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["OUR_TYPES", "TUNERS", "TunerType"]


class TunerType(NamedTuple):
    """An adapter type and the classes of its tuner.

    Attributes:
        option: its name on the command line.
        package: where its classes are.
        config, model: their names.
        prefix: what the names of an adapter's own weights begin with; PEFT finds them by it.
    """

    option: str
    package: str
    config: str
    model: str
    prefix: str

    @property
    def peft_type(self) -> str:
        """Its member of `PeftType`, which stands in adapter files."""
        return self.option.upper()


TUNERS = (
    # The prefix is LoRA's, as that of AdaLoRA is: its Linears are PEFT's own LoRA layers.
    TunerType("moe_lora", "trl_moe_ext.tuners.moe_lora", "MoeLoraConfig", "MoeLoraModel", "lora_"),
    TunerType("moe_esft", "trl_moe_ext.tuners.moe_esft", "MoeEsftConfig", "MoeEsftModel", "esft_"),
)
OUR_TYPES = tuple(tuner.peft_type for tuner in TUNERS)
