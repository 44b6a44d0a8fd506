"""An adapted model without its weights: what tells names, shapes and scalings where only files are at hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_moe_ext.export.base_config import base_config

__all__ = ["adapted_skeleton", "give_factors"]


def adapted_skeleton(
    model_path: str, peft_config: PeftConfig, model_init_kwargs: dict[str, Any] | None = None
) -> PeftModel:
    """The model of `model_path` with a new adapter, on the meta device.

    Args:
        model_path: folder or Hub id; nothing but its config is read.
        peft_config: of the adapter; it is copied.
        model_init_kwargs: of `from_pretrained`; what the config depends on is taken from it.
    """
    kwargs = model_init_kwargs or {}
    config = base_config(model_path, kwargs)
    with torch.device("meta"):
        model = _model(config, trust_remote_code=bool(kwargs.get("trust_remote_code")))
    return get_peft_model(model, copy.deepcopy(peft_config))


def give_factors(skeleton: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Put factors, named as `peft.get_peft_model_state_dict` does, in the places of those that have no data.

    PEFT's own `set_peft_model_state_dict` takes factors to the device of their layer, where they would lose theirs.
    """
    named = {re.sub(r"\.lora_(A|B|selected)\.", r".lora_\1.default.", key): tensor for key, tensor in state.items()}
    unknown = skeleton.load_state_dict(named, strict=False, assign=True).unexpected_keys
    assert not unknown, f"{unknown[:3]} have no place"


def _model(config: Any, trust_remote_code: bool) -> PreTrainedModel:
    # The class that TRL takes for a path: the one that the config names.
    architecture = next(iter(config.architectures or ()), "")
    model: PreTrainedModel
    if hasattr(transformers, architecture) and not trust_remote_code:
        model = getattr(transformers, architecture)(config)
    else:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model
