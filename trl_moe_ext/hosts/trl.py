"""TRL: its argument parser, `get_peft_config`, and the callbacks of the trainer that a training script builds.

Functions of this module change globals of trl and transformers; everything else is in the `trl_*` modules beside it.
They import what they need when called: the first of them may run in the middle of `import torch`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import HostVersionError
from trl_moe_ext.hosts.seams import find_seam, missing_seam

__all__ = ["add_run_summary", "install_parser", "install_peft_config", "training_script", "use_moe_sft_trainer"]


def install_parser() -> None:
    """Make `TrlParser(dataclasses)` a `MoeTrlParser` when `ModelConfig` is one of the dataclasses.

    `__new__` is replaced, on the class itself, because scripts may hold the class already. Classes derived from
    TrlParser are left alone.

    Raises:
        HostVersionError: `TrlParser` or `ModelConfig` is not as we know it.
    """
    parser = find_seam("trl.scripts.utils:TrlParser")
    find_seam("trl.scripts.utils:TrlParser.__init__", parameters=("dataclass_types",))
    for method in ("parse_args_into_dataclasses", "parse_dict", "parse_known_args", "set_defaults_with_config"):
        find_seam(f"trl.scripts.utils:TrlParser.{method}")
    model_config = find_seam("trl.trainer.model_config:ModelConfig")
    _check_fields(model_config)

    def new(cls: type, dataclass_types: Any = None, **kwargs: Any) -> Any:
        given = dataclass_types if isinstance(dataclass_types, list | tuple) else (dataclass_types,)
        if cls is parser and model_config in given:
            from trl_moe_ext.hosts.trl_parser import MoeTrlParser

            cls = MoeTrlParser
        return super(parser, cls).__new__(cls)

    parser.__new__ = new


def install_peft_config() -> None:
    """Wrap `get_peft_config`, and what gives the model to be trained its fused output layer; again it does nothing.

    Raises:
        HostVersionError: one of them is not where we know it, or takes something else.
    """
    stock = find_seam("trl.trainer.utils:get_peft_config", parameters=("model_args",))
    add_fused_lm_head = find_seam("trl.trainer.utils:add_fused_lm_head", parameters=("model",))
    if hasattr(stock, "trl_moe_ext"):
        return

    @functools.wraps(stock)
    def get_peft_config(model_args: Any) -> Any:
        from trl_moe_ext.hosts.trl_arguments import MoeModelConfig
        from trl_moe_ext.hosts.trl_peft_config import adapter_config

        if isinstance(model_args, MoeModelConfig) and model_args.is_ours:
            return adapter_config(model_args)
        return stock(model_args)

    get_peft_config.trl_moe_ext = True  # type: ignore[attr-defined]
    sys.modules["trl.trainer.utils"].__dict__["get_peft_config"] = get_peft_config
    # The trainers' modules, which are imported after this one, take it from here.
    sys.modules["trl.trainer.utils"].__dict__["add_fused_lm_head"] = _completed(add_fused_lm_head)
    # trl's packages are lazy modules that keep an attribute once it was asked for.
    for package in ("trl", "trl.trainer"):
        attributes = sys.modules[package].__dict__
        if attributes.get("get_peft_config") is stock:
            attributes["get_peft_config"] = get_peft_config


def _completed(stock: Any) -> Any:
    @functools.wraps(stock)
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        from trl_moe_ext.hosts.tuner_types import OUR_TYPES

        forward = model.forward
        stock(model, *args, **kwargs)
        if any(config.peft_type in OUR_TYPES for config in getattr(model, "peft_config", {}).values()):
            from trl_moe_ext.hosts.trl_fused_head import complete_fused_head

            complete_fused_head(model, forward)

    return add_fused_lm_head


def add_run_summary() -> None:
    """The trainer that a TRL script builds reports at its end; called after a parse that asked for an adapter of ours.

    Only in the process of the script: nobody's own Python session gets a callback that was not asked for.
    """
    if training_script() is None:
        return
    from trl_moe_ext.reporting.callback import RunSummaryCallback
    from trl_moe_ext.reporting.record_callback import RunRecordCallback

    try:
        callbacks = find_seam("transformers.trainer:DEFAULT_CALLBACKS")
        if not isinstance(callbacks, list):
            raise missing_seam("transformers.trainer:DEFAULT_CALLBACKS", "is not a list")
    except HostVersionError as error:
        warnings.warn(f"{error} The run goes on without a summary at its end.", RuntimeWarning, stacklevel=2)
        return
    callbacks += [callback for callback in (RunRecordCallback, RunSummaryCallback) if callback not in callbacks]


def use_moe_sft_trainer() -> None:
    """The script `sft` builds a `MoeSFTTrainer`; called after a parse that asked for an adapter of ours.

    Only in the process of that script, which takes the name from `trl` when it needs it; nobody's own Python session
    gets another trainer than it asked for.
    """
    if training_script() == "sft":
        find_seam("trl:SFTTrainer")
        from trl_moe_ext.sft.trainer import MoeSFTTrainer

        # Into the dictionary: trl is a lazy module, whose own attribute is looked up only where there is none.
        sys.modules["trl"].__dict__["SFTTrainer"] = MoeSFTTrainer


def training_script() -> str | None:
    """Name of the TRL training script, such as ``sft``, that this process was started to run, else None."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    scripts = sys.modules.get("trl.scripts")
    if main is None or scripts is None or scripts.__file__ is None:
        return None
    path = Path(main).resolve()
    return path.stem if path.parent == Path(scripts.__file__).resolve().parent else None


def _check_fields(model_config: Any) -> None:
    """That the stock options which we read exist, and that none has the name of one of ours."""
    names = {option.name for option in fields(model_config)}
    needed = {"use_peft", "lora_task_type", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
    needed |= {"lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora"}
    if not needed <= names:
        raise missing_seam("trl.trainer.model_config:ModelConfig", f"lacks {', '.join(sorted(needed - names))}")
    taken = sorted(name for name in names if name == "peft_type" or name.startswith("moe_"))
    if taken:
        raise missing_seam("trl.trainer.model_config:ModelConfig", f"has {', '.join(taken)} of its own")
