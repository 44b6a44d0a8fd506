"""PEFT: the members `PeftType.MOE_LORA` and `PeftType.MOE_ESFT`, and the registration of their tuners.

PEFT keys its registry by members of the enum `PeftType` and reads the type of a saved adapter with
`PeftType(config["peft_type"])`, so a new method needs a genuine member.
"""

from __future__ import annotations

import enum
import sys
from importlib import import_module

from trl_moe_ext._autoload import when_complete
from trl_moe_ext.hosts import adapter_files
from trl_moe_ext.hosts.seams import find_seam, missing_seam
from trl_moe_ext.hosts.tuner_types import TUNERS

__all__ = ["add_member", "register"]


def register() -> None:
    """Make our adapter types known to PEFT; a second call does nothing.

    If this runs because a module of ours was imported first, and with it PEFT, the classes are registered when that
    import is complete: until then the tuners might find parts of each other missing.

    Raises:
        HostVersionError: PEFT does not keep its types and methods where we know them.
    """
    peft_types = find_seam("peft.utils.peft_types:PeftType")
    # The members come first: the tuners' modules may name them.
    for tuner in TUNERS:
        add_member(peft_types, tuner.peft_type)
    first = _first_under_way()
    if first is not None:
        when_complete(first, _register_methods)
    else:
        _register_methods()


def _first_under_way() -> str | None:
    """The first module of this package whose import has begun and not ended."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trl_moe_ext.") and getattr(getattr(module, "__spec__", None), "_initializing", False):
            return name
    return None


def _register_methods() -> None:
    register_peft_method = find_seam(
        "peft.utils.peft_types:register_peft_method", parameters=("name", "config_cls", "model_cls", "prefix")
    )
    methods = find_seam("peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING")
    for tuner in TUNERS:
        package = import_module(tuner.package)
        if tuner.peft_type not in methods:
            register_peft_method(
                name=tuner.option,
                config_cls=getattr(package, tuner.config),
                model_cls=getattr(package, tuner.model),
                prefix=tuner.prefix,
            )
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
