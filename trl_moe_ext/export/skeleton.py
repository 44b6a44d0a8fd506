"""An adapted model without its weights: what tells names, shapes and scalings where only files are at hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["adapted_skeleton"]

_OF_THE_CONFIG = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only")


def adapted_skeleton(
    model_path: str, peft_config: PeftConfig, model_init_kwargs: dict[str, Any] | None = None
) -> PeftModel:
    """The model of `model_path` with a new adapter, on the meta device.

    Args:
        model_path: folder or Hub id; nothing but its config is read.
        peft_config: of the adapter; it is copied.
        model_init_kwargs: of `from_pretrained`; what the config depends on is taken from it.
    """
    kwargs = {name: value for name, value in (model_init_kwargs or {}).items() if name in _OF_THE_CONFIG}
    config = AutoConfig.from_pretrained(model_path, **kwargs)
    with torch.device("meta"):
        model = _model(config, trust_remote_code=bool(kwargs.get("trust_remote_code")))
    return get_peft_model(model, copy.deepcopy(peft_config))


def _model(config: Any, trust_remote_code: bool) -> PreTrainedModel:
    # The class that TRL takes for a path: the one that the config names.
    architecture = next(iter(config.architectures or ()), "")
    model: PreTrainedModel
    if hasattr(transformers, architecture) and not trust_remote_code:
        model = getattr(transformers, architecture)(config)
    else:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model
