"""The config of a base model, read as `from_pretrained` reads it: from the same place, with the same rights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

__all__ = ["base_config"]

# Arguments of `from_pretrained` that say where a model is and who asks for it. Others would change the config itself.
_WHERE_AND_WHO = (
    "revision",
    "code_revision",
    "trust_remote_code",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "proxies",
)


def base_config(model_path: str, model_init_kwargs: Mapping[str, Any]) -> PretrainedConfig:
    """The config of the model that ``from_pretrained(model_path, **model_init_kwargs)`` loads.

    Args:
        model_path: folder or Hub id.

    Raises:
        OSError: there is none, or it may not be read.
    """
    kwargs = {name: model_init_kwargs[name] for name in _WHERE_AND_WHO if name in model_init_kwargs}
    config: PretrainedConfig = AutoConfig.from_pretrained(model_path, **kwargs)
    return config
