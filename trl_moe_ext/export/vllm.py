"""An adapter as vLLM reads it: a plain LoRA with a pair of factors for each projection of each expert ("2D").

    model.layers.0.mlp.experts.7.gate_proj.lora_A.weight   (r, in)
    model.layers.0.mlp.experts.7.gate_proj.lora_B.weight   (out, r)

under PEFT's ``base_model.model.``. vLLM knows one scaling, ``lora_alpha / r`` of the config, and takes factors of any
rank up to its ``--max-lora-rank``. So the config has the largest rank and the scaling of the experts, and layers with
another scaling have the difference in their B. Patterns of ranks and scalings, which newer versions read and older
ones pass over in silence, are not used.

It stacks the factors of all experts of a module: experts that are not adapted have zeros, and where ranks differ
zeros fill them up to the largest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_moe_ext._version import __version__
from trl_moe_ext.errors import AdapterFileError, some_of
from trl_moe_ext.experts.layout import Projection
from trl_moe_ext.export.skeleton import adapted_skeleton, give_factors
from trl_moe_ext.export.vllm_check import verify_export
from trl_moe_ext.export.vllm_layers import AdaptedLayers, AdaptedStack, read_layers, split_rows
from trl_moe_ext.files import write_atomically

__all__ = ["VllmAdapterWriter", "convert_adapter", "export_adapter"]

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def export_adapter(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", *, verify: bool = True
) -> VllmAdapterWriter:
    """Write an adapter of `model` into `folder`, and return what wrote it: its `rank` is what vLLM has to allow.

    Args:
        verify: read the folder back and compare it with the model, see `verify_export`.

    Raises:
        ConfigError: the layout can't hold the adapter.
        AdapterFileError: its weights are not finite, or what was written is not the adapter.
    """
    writer = VllmAdapterWriter(model, adapter_name)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    writer.write(state, folder)
    if verify:
        _verify(folder, model, adapter_name)
    return writer


def convert_adapter(
    source: str | Path, folder: str | Path, model_init_kwargs: dict[str, Any] | None = None, *, verify: bool = True
) -> VllmAdapterWriter:
    """The same for an adapter that PEFT saved in `source`; of its base model only the config is read.

    Raises:
        ConfigError: the layout can't hold the adapter.
        AdapterFileError: tensors are missing, not of the model, of another shape or not finite, or what was written is
            not the adapter.
    """
    config = PeftConfig.from_pretrained(str(source))
    skeleton = adapted_skeleton(config.base_model_name_or_path, config, model_init_kwargs)
    writer = VllmAdapterWriter(skeleton)
    state = load_file(Path(source, _WEIGHTS))
    writer.write(state, folder)
    if verify:
        give_factors(skeleton, state)
        _verify(folder, skeleton, "default")
    return writer


def _verify(folder: str | Path, model: PeftModel, adapter_name: str) -> None:
    try:
        verify_export(folder, model, adapter_name)
    except AdapterFileError:
        Path(folder, _CONFIG).unlink()  # nobody is to load it
        raise


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
        tensors = {f"{_PREFIX}{name}.weight": tensor for name, tensor in self._tensors(state)}
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / _CONFIG).unlink(missing_ok=True)  # an old one would describe the new weights
        unfinished = target / f".{_WEIGHTS}.{os.getpid()}"
        try:
            save_file(tensors, unfinished, metadata={"format": "pt", "layout": "vllm-2d", "saved_with": _saved_with()})
            os.replace(unfinished, target / _WEIGHTS)
        finally:
            unfinished.unlink(missing_ok=True)
        write_atomically(target / _CONFIG, json.dumps(self._config(), indent=2) + "\n")

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
        expected = {_PREFIX + key: shape for key, shape in self._layers.shapes.items()}
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

    def _tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name without ``.weight``, and factor."""
        layers = self._layers
        for path, scaling in layers.linears.items():
            name = layers.names.linears[path]
            yield f"{name}.lora_A", state[f"{_PREFIX}{path}.lora_A.weight"].clone()
            B = _scaled(state[f"{_PREFIX}{path}.lora_B.weight"], scaling / layers.scaling)
            yield f"{name}.lora_B", B.clone(memory_format=torch.contiguous_format)
        for path, stack in layers.experts.items():
            for projection in stack.layout.projections:
                A, B = self._of_all_experts(state, path, stack, projection)
                for part, rows in split_rows(B, projection, stack.layout):
                    for expert in range(stack.layout.num_experts):
                        name = layers.names.experts[path, expert, part]
                        yield f"{name}.lora_A", A[expert].clone()
                        yield f"{name}.lora_B", rows[expert].clone(memory_format=torch.contiguous_format)

    def _of_all_experts(
        self, state: Mapping[str, Tensor], path: str, stack: AdaptedStack, projection: Projection
    ) -> tuple[Tensor, Tensor]:
        """``(E, r, in)`` and ``(E, out, r)``, with zeros where nothing is adapted, and up to the largest rank."""
        E, rows, columns = stack.layout.num_experts, projection.out_features, projection.in_features
        found = []
        for rank_class, scaling in stack.classes:
            A, B = (state.get(f"{_PREFIX}{path}.lora_{side}.{rank_class.factors_of(projection)}") for side in "AB")
            if A is not None and B is not None:
                found.append(([*rank_class.experts(E)], A, _scaled(B, scaling / self._layers.scaling)))
        if not found:
            return torch.zeros(E, 1, columns), torch.zeros(E, rows, 1)
        all_a = torch.zeros(E, stack.rank, columns, dtype=found[0][1].dtype)
        all_b = torch.zeros(E, rows, stack.rank, dtype=reduce(torch.promote_types, (B.dtype for *_, B in found)))
        for experts, A, B in found:
            all_a[experts, : A.shape[1]] = A.cpu()
            all_b[experts, :, : B.shape[2]] = B.to("cpu", all_b.dtype)
        return all_a, all_b

    def _other_experts(self, state: Mapping[str, Tensor]) -> list[str]:
        """What the file says of the experts that its factors are of, where the model has others."""
        return [
            f"{key} is {state[key].tolist()} instead of {[*experts]}"
            for path, stack in self._layers.experts.items()
            for name, experts in stack.indices.items()
            if (key := f"{_PREFIX}{path}.{name}") in state and state[key].tolist() != [*experts]
        ]


def _scaled(B: Tensor, factor: float) -> Tensor:
    """In float32 if numbers change, so that nothing is rounded twice."""
    return B if factor == 1 else B.float() * factor


def _saved_with() -> str:
    return f"trl_moe_ext {__version__}"
