"""Short names for routers, to be read in a log: the number of the layer, and no more than that needs to be unique."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<number>\d+)(?:\.(?P<rest>.*))?")


def short_labels(names: Sequence[str]) -> dict[str, str]:
    """Label of each module.

    The first number of a name is that of its layer. Before it stands the stack of layers where there are several
    (``encoder.3``), behind it what tells the routers of a layer apart (``3.self_attention``).

    Args:
        names: of modules, each once.
    """
    layers: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        match = _LAYER.fullmatch(name)
        stack, number = (match["stack"] or "", match["number"]) if match else ("", name)
        layers[stack][number].append(name)
    stacks = _tell_apart(list(layers))
    labels: dict[str, str] = {}
    for stack, numbers in layers.items():
        for number, inside in numbers.items():
            label = f"{stacks[stack]}.{number}".lstrip(".")
            rest = _tell_apart([(match["rest"] or "") if (match := _LAYER.fullmatch(n)) else n for n in inside])
            for name, end in zip(inside, rest.values(), strict=True):
                labels[name] = f"{label}.{end}" if end else label
    return {name: labels[name] for name in names}


def _tell_apart(paths: Sequence[str]) -> dict[str, str]:
    """The first part in which all dotted `paths` differ, the whole paths if there is none, "" for a single one."""
    if len(paths) == 1:
        return {paths[0]: ""}
    for parts in zip_longest(*(path.split(".") for path in paths), fillvalue=""):
        if len({*parts}) == len(paths) and all(parts):
            return dict(zip(paths, parts, strict=True))
    return {path: path for path in paths}
