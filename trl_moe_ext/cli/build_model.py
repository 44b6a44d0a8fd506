"""From the name of a model to its modules without weights: config.json alone, built on the meta device."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import ConfigError, MoeExtError, near_matches

__all__ = ["build_on_meta", "load_config", "model_directory"]


def model_directory(model: str) -> str:
    """What the loaders of transformers take for `model`: the directory of a ``config.json``, or `model` itself."""
    path = Path(model)
    return str(path.parent) if path.name == "config.json" and path.is_file() else model


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model.

    Args:
        model: a directory, a ``config.json``, or a name on the Hub.
        trust_remote_code: run the code that comes with the model, if it has some.

    Raises:
        ConfigError: there is no such configuration, it is damaged, or transformers does not know its type.
    """
    from transformers import AutoConfig, PreTrainedConfig

    source = model_directory(model)
    try:
        stored, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(model, error)) from error
    _check_type(model, stored, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # of the class of the config: each checks its attributes in its own way
        raise ConfigError(f"the config.json of {model} is refused by its class: {_in_short(error)}") from error


def _check_type(model: str, stored: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise ConfigError unless the type of a stored config is one of transformers, or brings code that may be run."""
    from transformers import CONFIG_MAPPING

    if not stored:
        raise ConfigError(f"{model} has no config.json; give the directory of a model of transformers")
    model_type = stored.get("model_type")
    if model_type is None:
        raise ConfigError(f"the config.json of {model} has no model_type; give that of a model of transformers")
    has_code = "AutoConfig" in stored.get("auto_map", {})
    if model_type in CONFIG_MAPPING or (has_code and trust_remote_code):
        return
    if has_code:
        raise ConfigError(
            f"{model} is of type {model_type!r}, which needs the code that comes with it; "
            "read that code and add --trust_remote_code"
        )
    raise ConfigError(
        f"{model}: model type {model_type!r} is not one of transformers {version('transformers')}; "
        f"{near_matches(model_type, CONFIG_MAPPING)}"
    )


def build_on_meta(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a configuration, without weights.

    Args:
        config: as `load_config` gives it.
        trust_remote_code: run the code that comes with the model, if it has some.

    Raises:
        MoeExtError: its class is not known, or refuses the configuration.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from trl_moe_ext.experts.census.model_class import model_class

    own_code = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    try:
        with torch.device("meta"):
            for auto_class in (AutoModelForCausalLM, AutoModel):
                if auto_class.__name__ in own_code:
                    return auto_class.from_config(config, trust_remote_code=True)
            return (_named_class(config) or model_class(config))(config)
    except Exception as error:  # of the class of the model, which may miss anything: an attribute, a library
        raise MoeExtError(
            f"the model of type {config.model_type!r} cannot be built from its config.json: {_in_short(error)}"
        ) from error


def _named_class(config: Any) -> Any:
    """The class that the checkpoint names, which is what TRL trains, if it takes this config."""
    import transformers

    found = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    return found if getattr(found, "config_class", None) is type(config) else None


def _not_found(model: str, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    path = Path(model)
    if path.is_dir():
        return f"{model} has no config.json that can be read: {_in_short(error)}"
    if path.exists():
        return f"{model} is not a config.json that can be read: {_in_short(error)}"
    tried = "HF_HUB_OFFLINE is set: only the cache was looked through" if HF_HUB_OFFLINE else _in_short(error)
    return (
        f"no configuration of {model}: {path.absolute()} does not exist, and no model of this name was found in the "
        f"cache or on the Hub ({tried}). Give a directory, a config.json, or the name of a model on the Hub; without "
        "a network, download its config.json first. A private or gated model needs `hf auth login`"
    )


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
