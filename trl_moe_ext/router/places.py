"""The modules of a model as if no adapter were attached, each with what is called in its place.

PEFT is not imported: its wrappers are known by the package that their classes come from, and by where they keep what
they wrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Place:
    """One place in a model.

    Attributes:
        called: what the surrounding module calls: the family's own module, or the wrapper that an adapter put there.
        module: the family's own module, without adapters.
    """

    called: nn.Module
    module: nn.Module


def read_places(model: Any) -> dict[str, Place]:
    """Names in the model without adapters -> what stands there, parents before children; the model itself is ``""``.

    A module that stands in several places, as adapted experts of a tied encoder and decoder do, has several names.
    """
    places: dict[str, Place] = {}

    def visit(name: str, called: nn.Module) -> None:
        module = without_adapter(called)
        places[name] = Place(called, module)
        for child, inside in module._modules.items():
            if inside is not None:
                visit(f"{name}.{child}" if name else child, inside)

    visit("", model.get_base_model() if hasattr(model, "get_base_model") else model)
    return places


def without_adapter(module: nn.Module) -> nn.Module:
    """The family's own module inside the wrappers of PEFT."""
    while (wrapped := _wrapped(module)) is not None:
        module = wrapped
    return module


def running(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of PEFT that runs now: a copy that is trained in full, or the family's own."""
    while (wrapped := _wrapped(module)) is not None:
        copies: Any = module._modules.get("modules_to_save")
        active = getattr(module, "active_adapters", None)
        is_copied = copies is not None and active and active[0] in copies and not module.disable_adapters
        module = copies[active[0]] if is_copied else wrapped  # type: ignore[index]
    return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    if not any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
        return None
    # Asked by name, since a wrapper hands on what it does not have itself.
    found = (module._modules.get(name) for name in ("base_layer", "original_module"))
    return next((inside for inside in found if inside is not None), None)
