"""PEFT's reading and writing of adapter files: whole files only, and safetensors only, for adapters of ours.

PEFT writes into the target directory and reads whatever it finds there. For adapters of our types a file is written to
a directory of its own and then moved into place, and one that cannot be read is named with what to do. Adapters of
other types take PEFT's own code unchanged.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trl_moe_ext.errors import AdapterFileError, ConfigError
from trl_moe_ext.hosts.seams import find_seam
from trl_moe_ext.hosts.tuner_types import OUR_TYPES

__all__ = ["install"]

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def install() -> None:
    """Wrap how PEFT saves and loads adapters, and how transformers loads them; a second call does nothing.

    Raises:
        HostVersionError: one of them is not where we know it, or takes something else.
    """
    save = find_seam(
        "peft.peft_model:PeftModel.save_pretrained",
        parameters=("save_directory", "safe_serialization", "is_main_process"),
    )
    load = find_seam("peft.peft_model:load_peft_weights", parameters=("model_id",))
    load_adapter = find_seam(
        "transformers.integrations.peft:PeftAdapterMixin.load_adapter", parameters=("peft_model_id", "adapter_name")
    )
    if not hasattr(save, "trl_moe_ext"):
        find_seam("peft.peft_model:PeftModel").save_pretrained = _whole_files(save)
        vars(import_module("peft.peft_model"))["load_peft_weights"] = _readable_files(load)
        mixin = find_seam("transformers.integrations.peft:PeftAdapterMixin")
        mixin.load_adapter = _complete_adapters(load_adapter)


def _whole_files(save: Any) -> Any:
    @functools.wraps(save)
    def save_pretrained(
        self: Any, save_directory: str, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        ours = [name for name, config in self.peft_config.items() if config.peft_type in OUR_TYPES]
        if ours and not safe_serialization:
            raise ConfigError(f"adapter {ours[0]!r} is saved as safetensors only; leave safe_serialization at True")
        if not ours or not kwargs.get("is_main_process", True) or Path(save_directory).is_file():
            save(self, save_directory, safe_serialization, *args, **kwargs)
            return
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        # Inside the target: it may be a mount of its own, or its parent not writable.
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as staging:
            if (target / "README.md").exists():  # PEFT updates the model card that is there
                shutil.copy2(target / "README.md", staging)
            save(self, staging, safe_serialization, *args, **kwargs)
            _move_files(Path(staging), target)

    save_pretrained.trl_moe_ext = True  # type: ignore[attr-defined]
    return save_pretrained


def _move_files(source: Path, target: Path) -> None:
    """Replace file by file, the config last: who finds a new config finds its weights as well."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == _CONFIG)
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)


def _readable_files(load: Any) -> Any:
    @functools.wraps(load)
    def load_peft_weights(model_id: str, *args: Any, **kwargs: Any) -> Any:
        directory = Path(model_id, kwargs.get("subfolder") or "")
        if not _is_ours(directory):
            return load(model_id, *args, **kwargs)
        file = directory / _WEIGHTS
        if not file.exists():
            found = ", ".join(sorted(path.name for path in directory.iterdir()))
            raise AdapterFileError(
                f"{directory} has no {_WEIGHTS} (found: {found}). Adapters of this type are safetensors only; save it "
                "again, or load another checkpoint"
            )
        with _named(file):
            return load(model_id, *args, **kwargs)

    return load_peft_weights


def _complete_adapters(load: Any) -> Any:
    """`AutoModel.from_pretrained(adapter_dir)` reports what is missing and goes on; an adapter of ours is whole."""

    @functools.wraps(load)
    def load_adapter(
        self: Any, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        given = kwargs.get("peft_config")
        given_type = given.get("peft_type") if isinstance(given, dict) else getattr(given, "peft_type", None)
        if given_type in OUR_TYPES or (peft_model_id and _is_ours(Path(peft_model_id))):
            kwargs["weight_mapping"] = _no_renaming()
        with _named(Path(peft_model_id or "", _WEIGHTS)):
            info = load(self, peft_model_id, adapter_name, *args, **kwargs)
        name = adapter_name or "default"
        if self.peft_config[name].peft_type in OUR_TYPES:
            from trl_moe_ext.tuners.adapter_files import check_loaded, fill_in

            missing = set(info.missing_keys)
            if missing and peft_model_id:
                missing -= fill_in(self, _weights_of(peft_model_id, kwargs), missing, name)
            check_loaded(self, missing, name)
        return info

    return load_adapter


def _no_renaming() -> list[Any]:
    """Keys of our files are those of the model: what renames a family's own checkpoints would change right names."""
    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(r"\A\Z", "")]  # an empty list would mean the family's own


def _weights_of(peft_model_id: str, options: dict[str, Any]) -> dict[str, Any]:
    """The tensors of an adapter under the names of its file, from a directory or from the hub."""
    from peft.utils.save_and_load import load_peft_weights

    download = getattr(options.get("load_config"), "download_kwargs", {}) | (options.get("adapter_kwargs") or {})
    known = {name: download[name] for name in ("revision", "subfolder", "token", "cache_dir") if download.get(name)}
    weights: dict[str, Any] = load_peft_weights(peft_model_id, device="cpu", **known)
    return weights


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Say which file of ours cannot be read."""
    try:
        yield
    except SafetensorError as error:
        if not _is_ours(file.parent):
            raise
        raise AdapterFileError(
            f"{file} ({file.stat().st_size:,} bytes) is damaged or cut off: {error}. Load an earlier checkpoint, "
            "or copy the file again"
        ) from error


def _is_ours(directory: Path) -> bool:
    try:
        config = json.loads((directory / _CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") in OUR_TYPES
