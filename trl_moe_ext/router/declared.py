"""What transformers declares of a family's routers: the modules that `output_router_logits` records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

_KEY = "router_logits"
# Where transformers looks in an output if a declaration names a class and nothing else.
_DEFAULT_INDEX = 1


def declared_routers(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Names of the modules whose output holds router logits -> their position in it, if it is a tuple.

    As in transformers, a declaration holds for the modules of its own model and not for those of a model inside it.

    Args:
        modules: of a model by name, parents before children, the model itself as ``""``.
    """
    owners: dict[str, PreTrainedModel | None] = {}
    found: dict[str, int] = {}
    for name, module in modules.items():
        owner = module if isinstance(module, PreTrainedModel) else owners.get(name.rpartition(".")[0])
        owners[name] = owner
        for recorder in _recorders(owner):
            if _is_recorded(recorder, name, module):
                found[name] = recorder.index
    return found


def _recorders(owner: PreTrainedModel | None) -> Iterator[OutputRecorder]:
    declared: Any = (getattr(owner, "_can_record_outputs", None) or {}).get(_KEY, [])
    for spec in declared if isinstance(declared, list) else [declared]:
        if isinstance(spec, OutputRecorder):
            yield spec
        elif isinstance(spec, str):
            yield OutputRecorder(None, index=_DEFAULT_INDEX, class_name=spec)
        else:
            yield OutputRecorder(spec, index=_DEFAULT_INDEX)


def _is_recorded(recorder: OutputRecorder, name: str, module: nn.Module) -> bool:
    is_class = recorder.target_class is not None and isinstance(module, recorder.target_class)
    if not is_class and not (recorder.class_name and name.endswith(recorder.class_name)):
        return False
    return recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
