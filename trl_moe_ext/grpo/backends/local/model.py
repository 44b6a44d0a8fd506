"""The generator's model: that of the trainer, with the same adapter in it and nothing that is trained."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import peft
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

# Makes MOE_LORA known to PEFT, also where autoload is switched off: what the trainer sends may need it.
from trl_moe_ext import MoeLoraConfig as MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.export.base_config import base_config
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.local.wire import Setup
from trl_moe_ext.grpo.travelling import adapter_tensors

__all__ = ["AdaptedModel"]

# What transformers' continuous batching can run. The trainer may use others, of which sdpa is the equivalent.
_ATTENTION = ("sdpa", "eager", "paged|eager", "flash_attention_2", "flash_attention_3")


class AdaptedModel:
    """A model with an adapter whose weights can be exchanged.

    Attributes:
        language_model: what generates; the adapter is in its layers.
    """

    def __init__(self, setup: Setup) -> None:
        model = _load(setup)
        try:
            config = pickle.loads(setup.peft_config)
        except (AttributeError, ImportError) as error:
            raise ConfigError(
                f"the class of peft_config can't be imported in the generator's process ({error}): it has to be in an "
                "installed module, not in the training script"
            ) from error
        self._peft_model = peft.get_peft_model(model, config).eval().requires_grad_(False)
        # The factors are created where the base weights are, except those of plug-ins that do not care.
        self._peft_model.to(setup.device)
        self._shapes = _shapes(adapter_tensors(self._peft_model, "default"))
        self.language_model: PreTrainedModel = self._peft_model.get_base_model()

    def put(self, adapter: AdapterSnapshot) -> None:
        """Compute with these weights from now on.

        Raises:
            ConfigError: they are not those of this adapter, one for one.
        """
        wrong = _differences(_shapes(adapter.tensors), self._shapes)
        if wrong:
            raise ConfigError(
                f"version {adapter.version} of the adapter is not for the generator's model: {'; '.join(wrong)}. The "
                "trainer and the generator should have the same model and peft_config"
            )
        result = peft.set_peft_model_state_dict(self._peft_model, dict(adapter.tensors))
        assert not result.unexpected_keys, f"PEFT left out {result.unexpected_keys[:3]}"


def _load(setup: Setup) -> PreTrainedModel:
    """As TRL loads the model that it trains: by the class that its config names."""
    transformers.utils.logging.disable_progress_bar()  # it would fill the log
    kwargs = dict(setup.model_init_kwargs)
    kwargs.pop("device_map", None)
    if kwargs.get("attn_implementation") not in _ATTENTION:
        kwargs["attn_implementation"] = "sdpa"
    names = base_config(setup.model_path, kwargs).architectures or [""]
    architecture = getattr(transformers, names[0], AutoModelForCausalLM)
    if torch.device(setup.device).type != "cpu":
        kwargs["device_map"] = setup.device
    return architecture.from_pretrained(setup.model_path, **kwargs)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Clauses of an error message: what is missing, what is too much, and what has another shape."""
    missing, unknown = sorted(expected.keys() - found), sorted(found.keys() - expected)
    other = [name for name in sorted(found.keys() & expected) if found[name] != expected[name]]
    clauses = []
    if missing:
        clauses.append(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if unknown:
        clauses.append(f"{len(unknown)} are unknown, such as {unknown[0]}")
    if other:
        name = other[0]
        clauses.append(f"{len(other)} have another shape, such as {name}, {found[name]} instead of {expected[name]}")
    return clauses
