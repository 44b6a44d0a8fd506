"""Every error that this package raises on purpose.

    MoeExtError
    ├── ConfigError         an option is wrong, unknown, or has no effect        (also a ValueError)
    ├── LayoutError         a module of experts that cannot be read              (also a ValueError)
    ├── AdapterFileError    an adapter file is damaged or for another model      (also a ValueError)
    ├── PluginError         a plug-in is missing or broken                       (also a LookupError)
    └── HostVersionError    TRL, PEFT or transformers is not the one we know     (also an ImportError)

A message says what was wrong, what was found and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "HostVersionError",
    "LayoutError",
    "MoeExtError",
    "PluginError",
    "near_matches",
    "some_of",
]

_SHOWN = 3


class MoeExtError(Exception):
    """Base of every error of this package."""


class ConfigError(MoeExtError, ValueError):
    """An option is wrong, unknown, or has no effect."""


class LayoutError(MoeExtError, ValueError):
    """A module of routed experts whose layout cannot be read."""


class AdapterFileError(MoeExtError, ValueError):
    """An adapter file that is damaged, not finite, or made for another model."""


class PluginError(MoeExtError, LookupError):
    """A plug-in that is missing or failed to load."""


class HostVersionError(MoeExtError, ImportError):
    """A host library whose seam is not where this package knows it."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the names in `known` that look like `name`, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"


def some_of(names: Iterable[str], separator: str = ", ") -> str:
    """The first of many names for an error message, and how many more there are."""
    listed = list(names)
    more = len(listed) - _SHOWN
    return separator.join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
