"""An adapter's directory, looked through for mistakes, and the adapter on its base model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import AdapterFileError, ConfigError

__all__ = ["base_model_of", "load_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def base_model_of(adapter: Path) -> str:
    """Directory, or name on the Hub, of the model that an adapter is for.

    Args:
        adapter: directory with the adapter's configuration and weights.

    Raises:
        ConfigError: there is no such directory, or the adapter is for a model that does not write.
        AdapterFileError: a file is missing or damaged.
    """
    if not adapter.is_dir():
        raise ConfigError(f"{adapter} is not a directory; give the output_dir of a training run")
    file = adapter / CONFIG_FILE
    if not file.is_file():
        raise AdapterFileError(f"{adapter} has no {CONFIG_FILE}, so it is not an adapter; {_elsewhere(adapter)}")
    try:
        config = json.loads(file.read_text())
        base, task = config["base_model_name_or_path"], config.get("task_type")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{file} is damaged ({error!r}); {_elsewhere(adapter)}") from error
    if not base:
        raise AdapterFileError(f"{file} does not say which base model it is for; set base_model_name_or_path in it")
    if task not in (None, "CAUSAL_LM"):
        raise ConfigError(f"{adapter} is an adapter for {task}, which does not answer in words; CAUSAL_LM is needed")
    if not (adapter / WEIGHTS_FILE).is_file():
        raise AdapterFileError(f"{adapter} has a {CONFIG_FILE} but no {WEIGHTS_FILE}; {_elsewhere(adapter)}")
    return str(base)


def _elsewhere(adapter: Path) -> str:
    """Where an adapter is, if not in `adapter` itself: its newest checkpoint that is complete, if there is one."""
    complete = [file.parent for file in adapter.glob(f"checkpoint-*/{WEIGHTS_FILE}")]
    newest = max(complete, key=lambda directory: directory.stat().st_mtime, default=None)
    return f"did you mean {newest}?" if newest else "give the output_dir of a training run that has ended"


def load_adapter(adapter: Path, base: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Load a base model with an adapter on it.

    Args:
        adapter: directory of the adapter.
        base: directory of the base model, or its name on the Hub.
        dtype: of the base model: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for that of its files.
        device: of the model; all GPUs, or the CPU, if None.

    Returns:
        The `PeftModel`, and the tokenizer: the one saved with the adapter, else that of the base model.

    Raises:
        ConfigError: the base model is not found or cannot be read, or there is no such device.
        AdapterFileError: the adapter's weights are damaged or for another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from trl_moe_ext.hosts.peft import register

    register()  # done already unless autoload is off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what the host libraries have to tell each other
        model, tokenizer = _load_base(adapter, base, {"dtype": dtype, "device_map": device_map_of(device)})
        try:
            return PeftModel.from_pretrained(model, adapter).eval(), tokenizer
        except SafetensorError as error:  # of stock LoRA; adapters of ours are checked where they are read
            raise AdapterFileError(f"{adapter / WEIGHTS_FILE} is damaged ({error}); {_elsewhere(adapter)}") from error


def _load_base(adapter: Path, base: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(base)
        model = _architecture(config).from_pretrained(base, **options, **unpacked(config))
        own_tokenizer = (adapter / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter if own_tokenizer else base)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(adapter, base, error)) from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # training had added tokens, such as those of a chat template
    return model, tokenizer


def device_map_of(device: str | None) -> Any:
    import torch

    if device is None:
        return "auto" if torch.cuda.is_available() else {"": "cpu"}
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ConfigError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return {"": device}


def _architecture(config: Any) -> Any:
    """The class of the checkpoint, as TRL's trainers take it: composite models are not all in an auto class."""
    import transformers

    name = (config.architectures or [""])[0]
    return getattr(transformers, name, transformers.AutoModelForCausalLM)


def unpacked(config: Any) -> dict[str, Any]:
    """Experts in MXFP4 were trained unpacked, and an adapter fits them only so."""
    from transformers import Mxfp4Config

    stored = getattr(config, "quantization_config", None) or {}
    return {"quantization_config": Mxfp4Config(dequantize=True)} if stored.get("quant_method") == "mxfp4" else {}


def _not_loaded(adapter: Path, base: str, error: Exception) -> str:
    if Path(base).is_dir():
        return f"the base model {base} of {adapter} cannot be loaded: {str(error).splitlines()[0]}"
    return (
        f"the base model {base} of {adapter} was not found: {Path(base).absolute()} is not a directory, and no model "
        "of this name is in the cache or on the Hub. A relative path starts at the current directory: run the command "
        f"where training was started, or correct base_model_name_or_path in {adapter / CONFIG_FILE}"
    )
