"""PEFT: the adapter type `PeftType.MOE_LORA`, and its registration.

PEFT keys its registry by members of the enum `PeftType` and reads the type of a saved adapter with
`PeftType(config["peft_type"])`, so a new method needs a genuine member.
"""

from __future__ import annotations

import enum
import sys

from trl_moe_ext._autoload import when_complete
from trl_moe_ext.hosts import adapter_files
from trl_moe_ext.hosts.seams import find_seam, missing_seam

__all__ = ["add_member", "register"]

_TUNER = "trl_moe_ext.tuners.moe_lora"


def register() -> None:
    """Make MOE_LORA known to PEFT; a second call does nothing.

    If this runs because the tuner itself was imported first, and with it PEFT, its classes are registered when that
    import is complete.

    Raises:
        HostVersionError: PEFT does not keep its types and methods where we know them.
    """
    # The member comes first: the tuner's modules may name it.
    add_member(find_seam("peft.utils.peft_types:PeftType"), "MOE_LORA")
    if _TUNER in sys.modules:
        when_complete(_TUNER, _register_method)
    else:
        _register_method()


def _register_method() -> None:
    register_peft_method = find_seam(
        "peft.utils.peft_types:register_peft_method", parameters=("name", "config_cls", "model_cls", "prefix")
    )
    methods = find_seam("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING")
    from trl_moe_ext.tuners.moe_lora import MoeLoraConfig, MoeLoraModel

    if "MOE_LORA" not in methods:
        # PEFT finds adapter weights by the prefix. It is LoRA's, as AdaLoRA's is.
        register_peft_method(name="moe_lora", config_cls=MoeLoraConfig, model_cls=MoeLoraModel, prefix="lora_")
    adapter_files.install()


def add_member(cls: type[enum.Enum], name: str) -> None:
    """Add the member `name`, with its name as its value, to an enum class that already exists.

    `enum._proto_member` is what turns each line of a class body into a member while the class is created. Used after
    the fact it does all the bookkeeping (lookup by name, value and attribute, order, pickling) as this Python does it.

    Args:
        cls: an enum of strings. Members equal their names, so that dict keys given as strings find them.
        name: unchanged if `cls` has it.

    Raises:
        HostVersionError: `cls` is not an enum of strings, or this Python builds enums in another way.
    """
    if not (isinstance(cls, enum.EnumType) and issubclass(cls, str)):
        raise missing_seam("peft.utils.peft_types:PeftType", "is not an enum of strings")
    if name in cls.__members__:
        return
    try:
        proto_member = enum._proto_member(name)  # type: ignore[attr-defined]
        setattr(cls, name, proto_member)
        proto_member.__set_name__(cls, name)
    except (AttributeError, TypeError) as error:
        reason = f"cannot be extended on Python {sys.version.split()[0]} ({error})"
        raise missing_seam("peft.utils.peft_types:PeftType", reason) from error
