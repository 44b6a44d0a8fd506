"""Looking up a place in a host library that we hook into, and saying so clearly when it is not there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any

from trl_moe_ext.errors import HostVersionError

__all__ = ["find_seam", "missing_seam"]


def find_seam(seam: str, parameters: Sequence[str] = ()) -> Any:
    """The object at `seam`, written ``package.module:name`` or ``package.module:Class.method``.

    Args:
        seam: where to look. The module is imported.
        parameters: names that the callable found there has to accept.

    Raises:
        HostVersionError: there is no such module or name, or it does not take these parameters.
    """
    module, _, path = seam.partition(":")
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise missing_seam(seam, f"not found ({error})") from error
    if parameters:
        taken = inspect.signature(found).parameters if callable(found) else {}
        lacking = [name for name in parameters if name not in taken]
        if lacking:
            raise missing_seam(seam, f"does not take {', '.join(lacking)}")
    return found


def missing_seam(seam: str, reason: str) -> HostVersionError:
    """The error that names the library, its version, the seam, and the versions that trl_moe_ext supports."""
    library = seam.partition(":")[0].partition(".")[0]
    return HostVersionError(
        f"{library} {_installed(library)} is not a version that trl_moe_ext knows: {seam} {reason}. "
        f"Install {library}{_supported(library)}."
    )


def _installed(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "(version unknown)"


def _supported(library: str) -> str:
    """The range in our own metadata, as ``>=1.16,<1.17``: pyproject.toml is the one place where it is written."""
    for requirement in metadata.requires("trl_moe_ext") or ():
        found = re.match(rf"{library}\s*([<>=!~][^;]*)", requirement)
        if found:
            # Lower bound first: build tools sort the specifiers as text.
            return ",".join(sorted(found[1].strip().split(","), reverse=True))
    return ""
