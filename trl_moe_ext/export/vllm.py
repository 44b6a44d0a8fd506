"""An adapter as vLLM reads it: from a model, or from the files that PEFT wrote; what was written is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from trl_moe_ext.errors import AdapterFileError
from trl_moe_ext.export.skeleton import adapted_skeleton, give_factors
from trl_moe_ext.export.vllm_check import verify_export
from trl_moe_ext.export.vllm_writer import CONFIG_FILE, WEIGHTS_FILE, VllmAdapterWriter

__all__ = ["VllmAdapterWriter", "convert_adapter", "export_adapter"]


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
    state = load_file(Path(source, WEIGHTS_FILE))
    writer.write(state, folder)
    if verify:
        give_factors(skeleton, state)
        _verify(folder, skeleton, "default")
    return writer


def _verify(folder: str | Path, model: PeftModel, adapter_name: str) -> None:
    try:
        verify_export(folder, model, adapter_name)
    except AdapterFileError:
        Path(folder, CONFIG_FILE).unlink()  # nobody is to load it
        raise
