"""The model that is profiled, as `trl sft` would load it, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_moe_ext.cli.build_model import build_on_meta, load_config, model_directory
from trl_moe_ext.cli.load_adapter import base_model_of, device_map_of, load_adapter, unpacked
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.profiles.measure import require_routers

__all__ = ["check_model", "load_model"]


def check_model(model: str, trust_remote_code: bool) -> Any:
    """Refuse, before anything large is read, a model that cannot be profiled.

    Returns:
        Its configuration.

    Raises:
        ConfigError: it is not found, has no routed experts, or is no language model that `trl sft` trains.
    """
    config = load_config(model, trust_remote_code)
    built = build_on_meta(config, trust_remote_code)
    require_routers(built, model)
    if not built.can_generate() or config.is_encoder_decoder:
        raise ConfigError(
            f"{model} ({type(built).__name__}) is no model that goes on with a text, as `trl sft` trains; in Python "
            "use trl_moe_ext.profiles.measure.measure_profile with batches of your own"
        )
    return config


def load_model(
    model: str, config: Any, adapter: Path | None, dtype: str, device: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Load a model, with an adapter on it if one is given, and a tokenizer.

    Args:
        model: directory, or name on the Hub.
        config: its configuration.
        adapter: directory of an adapter for it.
        dtype: ``auto`` for that of the files, or its name.
        device: of the model; all GPUs, or the CPU, if None.
        trust_remote_code: run the code that comes with the model, if it has some.

    Raises:
        ConfigError: something cannot be loaded, or there is no such device.
        AdapterFileError: the adapter is damaged or for another model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.utils import create_model_from_path

    source = model_directory(model)
    if adapter is not None:
        base_model_of(adapter)  # for its refusals: it may have been trained where the model had another path
        return load_adapter(adapter, source, dtype, device)
    options = {"dtype": dtype, "device_map": device_map_of(device), "trust_remote_code": trust_remote_code}
    architecture = None if config.architectures else AutoModelForCausalLM
    try:
        loaded = create_model_from_path(source, architecture, **options, **unpacked(config))
        return loaded, AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model} cannot be loaded: {' '.join(str(error).split())}") from error
