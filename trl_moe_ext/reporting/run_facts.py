"""Facts about a run that are asked once: versions, machine, memory, and the options that matter for its result."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl_moe_ext._version import __version__
from trl_moe_ext.machine import processor, usable_cores

__all__ = ["machine", "memory", "model_name", "peak_memory", "settings", "versions"]

# What of `TrainingArguments` and the trainers' own configs shapes the result; never all of it: some hold tokens.
_TRAINING = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("max_length", "packing", "padding_free", "assistant_only_loss", "completion_only_loss", "loss_type"),
    *("beta", "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "reward_weights"),
    *("rollout_backend", "max_staleness", "weight_sync_steps", "max_inflight_tasks", "importance_correction"),
    *("importance_level", "importance_cap", "routing_replay", "label_smoothing_factor", "neftune_noise_alpha"),
    *("bf16", "fp16", "gradient_checkpointing", "torch_compile", "use_liger_kernel", "seed"),
)
# Always worth a line, also at their default; the other options of an adapter are told when they are not.
_ADAPTER = ("peft_type", "r", "lora_alpha", "lora_dropout", "moe_target", "kernel")
_LONGEST = 200  # characters of a value that is told in full
_NOT_AN_OPTION = ("base_model_name_or_path", "saved_with", "inference_mode", "auto_mapping", "runtime_config")


def versions() -> dict[str, str]:
    """Of the libraries that compute, and of Python."""
    hosts = ("trl", "peft", "transformers", "accelerate", "torch")
    return {"trl_moe_ext": __version__, **{name: version(name) for name in hosts}, "python": platform.python_version()}


def machine(processes: int) -> dict[str, Any]:
    """What the run was on.

    Args:
        processes: how many train together.
    """
    count = torch.cuda.device_count()
    return {
        "processor": processor(),
        "devices": [torch.cuda.get_device_name(index) for index in range(count)],
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def peak_memory() -> dict[str, int]:
    """Most bytes that this process held: of its resident memory (VmHWM), and of torch's allocator on each GPU in use.

    Without ``process`` where the system does not tell (it does on Linux).
    """
    peaks = {"process": resident} if (resident := _kilobytes(Path("/proc/self/status"), "VmHWM")) else {}
    used = {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
    return peaks | {device: held for device, held in used.items() if held}


def memory() -> dict[str, int]:
    """Bytes of memory that the machine (``process``) and each of its GPUs has."""
    total = {"process": main} if (main := _kilobytes(Path("/proc/meminfo"), "MemTotal")) else {}
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return total | {f"cuda:{index}": size for index, size in enumerate(sizes)}


def model_name(model: nn.Module) -> dict[str, str]:
    """``name``, where it was loaded from, and ``class`` of the model under its adapter."""
    adapted: Any = model
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    return {"name": str(getattr(base, "name_or_path", "") or ""), "class": type(base).__name__}


def settings(model: nn.Module, args: Any) -> dict[str, dict[str, Any]]:
    """Options of the adapters, of the router and of training.

    Args:
        model: with its adapters, if it has some.
        args: of the trainer.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    groups = {f"adapter {name}" if len(configs) > 1 else "adapter": _options(c) for name, c in configs.items()}
    given = vars(args)
    groups["router"] = {name: value for name, value in given.items() if name.startswith("router_")}
    groups["training"] = {name: given[name] for name in _TRAINING if given.get(name) is not None}
    return {group: options for group, options in groups.items() if options}


def _options(config: Any) -> dict[str, Any]:
    """Options of an adapter that are always told or are not at their default."""
    told = {}
    for option in fields(config):
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        value = getattr(config, option.name)
        if option.name not in _NOT_AN_OPTION and (option.name in _ADAPTER or value != default):
            told[option.name] = f"{len(value)} entries" if _is_long(value) else value
    return dict(sorted(told.items(), key=lambda item: _ADAPTER.index(item[0]) if item[0] in _ADAPTER else 99))


def _is_long(value: Any) -> bool:
    """Such as the chosen experts of every layer, or the ranks of each of them."""
    return isinstance(value, Mapping) and len(str(value)) > _LONGEST


def _kilobytes(file: Path, name: str) -> int | None:
    """Bytes of the line `name` of one of Linux's files; None where there is no such file or line."""
    if not file.exists():
        return None
    lines = file.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
