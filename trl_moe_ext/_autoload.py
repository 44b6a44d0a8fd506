"""`import torch` calls `autoload`, which has accelerate, peft and trl call `trl_moe_ext.hosts` when they are imported.

torch loads the entry points of the group `torch.backends` at the end of its own import, in every process: that is how
`--peft_type moe_lora` reaches the `trl` script, the process that accelerate launches and a notebook alike without an
import by the user. Two things follow. An exception here would abort `import torch`, so nothing is raised: a host that
cannot be served is named in one warning and stays as it is. And torch is often imported in the middle of peft's or
trl's own import, so a host module is either still to come (its loader is wrapped), under way (its spec tells when it
is complete) or complete.

Standard library only, and `hosts` is loaded by name when a host library is there: it costs `import torch` about 1 ms.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["DISABLE_VARIABLE", "autoload", "when_complete"]

DISABLE_VARIABLE = "TRL_MOE_EXT_DISABLE"

# Host module -> "module:function" to call when it is complete. `peft` as a whole, because the tuner imports from it;
# of trl only submodules, because trl puts another object in the place of its own package while that is imported.
_HOSTS = {
    "accelerate.utils.fsdp_utils": "trl_moe_ext.hosts.accelerate_fsdp2:install",
    "peft": "trl_moe_ext.hosts.peft:register",
    "trl.scripts.utils": "trl_moe_ext.hosts.trl:install_parser",
    "trl.trainer.utils": "trl_moe_ext.hosts.trl:install_peft_config",
}

_warned: set[str] = set()


def autoload() -> None:
    """Install the hooks, unless `TRL_MOE_EXT_DISABLE` is set to something other than 0. Never raises."""
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        return
    try:
        if not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _HostFinder())
        for name in _HOSTS:
            if name in sys.modules:
                when_complete(name, partial(_serve, name))
    except Exception as error:
        _warn("torch", error)


def when_complete(name: str, action: Callable[[], None]) -> None:
    """Call `action` now if the imported module `name` is complete, else when its import has succeeded.

    importlib sets `_initializing` on the spec to True before a module is executed and to False afterwards, also after
    a failure, which takes the module out of `sys.modules` first. There is no public way to be told.
    """
    spec = getattr(sys.modules[name], "__spec__", None)
    if spec is None or not getattr(spec, "_initializing", False):
        action()
        return
    original: type[ModuleSpec] = type(spec)

    class WatchedSpec(original):  # type: ignore[misc, valid-type]
        def __setattr__(self, attribute: str, value: Any) -> None:
            if attribute != "_initializing" or value:
                super().__setattr__(attribute, value)
                return
            self.__class__ = original  # type: ignore[assignment]
            setattr(self, attribute, value)
            if name in sys.modules:
                action()

    spec.__class__ = WatchedSpec


class _HostFinder:
    """Finds nothing itself: it lets the other finders find a host module and wraps the loader that they return."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _HOSTS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _HostFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _wrap_loader(name, spec.loader)
                return spec
        return None


def _wrap_loader(name: str, loader: Any) -> None:
    """Have `loader` serve a host module after it has executed it.

    The method is replaced on the instance, so that `__loader__` stays what other libraries expect. One loader may be
    shared by many modules, of a zip file for example: it is wrapped once and looks at the name of each.
    """
    execute = getattr(loader, "exec_module", None)
    if execute is None or hasattr(execute, "trl_moe_ext"):
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ in _HOSTS:
            _serve(module.__name__)

    exec_module.trl_moe_ext = True  # type: ignore[attr-defined]
    try:
        loader.exec_module = exec_module
    except AttributeError as error:  # a loader with slots, or one that is a class
        _warn(name, error)


def _serve(name: str) -> None:
    module, _, function = _HOSTS[name].partition(":")
    try:
        getattr(import_module(module), function)()
    except Exception as error:
        _warn(name, error)


def _warn(host: str, error: Exception) -> None:
    """One warning a library. Python may have been told to raise warnings: then it goes to stderr."""
    library = host.partition(".")[0]
    if library in _warned:
        return
    _warned.add(library)
    # A HostVersionError already says what was expected; by name, to keep this module free of imports.
    reason = str(error) if type(error).__name__ == "HostVersionError" else f"{type(error).__name__}: {error}"
    text = f"trl_moe_ext leaves {library} as it is: {reason} ({DISABLE_VARIABLE}=1 turns trl_moe_ext off.)"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        print(text, file=sys.stderr)
