"""The files of an adapter for vLLM: its weights and its config, written as often as there are versions of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from trl_moe_ext._version import __version__
from trl_moe_ext.errors import AdapterFileError, some_of
from trl_moe_ext.export.vllm_layers import AdaptedLayers, read_layers
from trl_moe_ext.export.vllm_tensors import PREFIX, vllm_tensors
from trl_moe_ext.files import write_atomically

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "VllmAdapterWriter"]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


class VllmAdapterWriter:
    """Writes versions of one adapter.

    Args:
        model: with the adapter; only its structure is used, so it may be on the meta device.

    Attributes:
        rank: the largest rank in the files.
        has_experts: whether routed experts are adapted.

    Raises:
        ConfigError: the layout can't hold the adapter; what it can't hold is named.
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default") -> None:
        self._layers: AdaptedLayers = read_layers(model, adapter_name)
        self._base_model = model.peft_config[adapter_name].base_model_name_or_path
        self.rank: int = self._layers.rank
        self.has_experts = bool(self._layers.experts)

    def write(self, state: Mapping[str, Tensor], folder: str | Path) -> None:
        """Write `state`, named as `peft.get_peft_model_state_dict` does, into `folder`; the config, read first, last.

        Raises:
            AdapterFileError: tensors are missing, unknown, of another shape or not finite.
            OSError: the folder can't be written.
        """
        self._check(state)
        tensors = {f"{PREFIX}{name}.weight": tensor for name, tensor in vllm_tensors(self._layers, state)}
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG_FILE).unlink(missing_ok=True)  # an old one would describe the new weights
        unfinished = target / f".{WEIGHTS_FILE}.{os.getpid()}"
        try:
            save_file(tensors, unfinished, metadata={"format": "pt", "layout": "vllm-2d", "saved_with": _saved_with()})
            os.replace(unfinished, target / WEIGHTS_FILE)
        finally:
            unfinished.unlink(missing_ok=True)
        write_atomically(target / CONFIG_FILE, json.dumps(self._config(), indent=2) + "\n")

    def _config(self) -> dict[str, Any]:
        hub = self._layers.names
        names = [*(hub.linears[path] for path in self._layers.linears), *hub.experts.values()]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._base_model,
            "r": self.rank,
            "lora_alpha": self._layers.scaling * self.rank,
            "target_modules": sorted({name.rpartition(".")[2] for name in names}),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "inference_mode": True,
            "saved_with": _saved_with(),
        }

    def _check(self, state: Mapping[str, Tensor]) -> None:
        expected = {PREFIX + key: shape for key, shape in self._layers.shapes.items()}
        problems = [f"{key} is missing" for key in expected.keys() - state.keys()]
        problems += [f"{key} is unknown" for key in state.keys() - expected.keys()]
        for key in expected.keys() & state.keys():
            if tuple(state[key].shape) != expected[key]:
                problems.append(f"{key} is {tuple(state[key].shape)} instead of {expected[key]}")
            elif not torch.isfinite(state[key]).all():
                problems.append(f"{key} holds NaN or infinite values")
        problems += self._other_experts(state)
        if problems:
            raise AdapterFileError(
                f"these are not the weights of an adapter of this model: {some_of(sorted(problems), '; ')}. "
                "Give all tensors of one adapter, as it was saved"
            )

    def _other_experts(self, state: Mapping[str, Tensor]) -> list[str]:
        """What the file says of the experts that its factors are of, where the model has others."""
        return [
            f"{key} is {state[key].tolist()} instead of {[*experts]}"
            for path, stack in self._layers.experts.items()
            for name, experts in stack.indices.items()
            if (key := f"{PREFIX}{path}.{name}") in state and state[key].tolist() != [*experts]
        ]


def _saved_with() -> str:
    return f"trl_moe_ext {__version__}"
