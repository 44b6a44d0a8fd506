"""Every kernel, those of plug-ins too, against the reference in float64, on the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from trl_moe_ext.bench.cases import CASES, Case, make_call
from trl_moe_ext.bench.tolerances import RELATIVE_ERROR, relative_error
from trl_moe_ext.kernels.reference import experts_mlp_reference
from trl_moe_ext.kernels.registry import Kernel
from trl_moe_ext.plugins import host

YARDSTICK = "reference"
_IN_WORDS = {"hidden_states": "tokens", "top_k_weights": "routing weights"}
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Finding:
    """The comparison of one kernel in one dtype that came out worst, measured by its limit.

    Attributes:
        where: the tensor and the case.
        error: relative; None if there was nothing to compare, for which `where` has the reason.
        limit: for an error of that kind of tensor.
    """

    kernel: str
    dtype: torch.dtype
    where: str
    error: float | None
    limit: float

    @property
    def is_ok(self) -> bool:
        """Whether the error is a number within its limit."""
        return self.error is not None and self.error <= self.limit

    @property
    def severity(self) -> float:
        """The error in units of its limit; infinite for one that is missing or not a number."""
        return self.error / self.limit if self.error is not None and self.error == self.error else float("inf")


def check_kernels(device: str) -> list[Finding]:
    """The worst finding of each registered kernel and dtype."""
    kernels: list[Kernel] = [k for k in host().records("register_kernels").values() if k.name != YARDSTICK]
    return [
        max(_findings(kernel, dtype, torch.device(device)), key=lambda finding: finding.severity)
        for kernel in kernels
        for dtype in _DTYPES
    ]


def check_view(findings: list[Finding], device: str) -> Table:
    """The findings as a table, a row each."""
    title = f"Kernels against the reference in float64, on {device}: {len(CASES)} cases, outputs and every gradient"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("kernel", "dtype", "largest error", "limit", "result", "where"):
        table.add_column(column, justify="right" if column in ("largest error", "limit") else "left")
    for found in findings:
        error, limit = "-" if found.error is None else f"{found.error:.1e}", f"{found.limit:.0e}"
        dtype, result = str(found.dtype).removeprefix("torch."), "ok" if found.is_ok else "DIFFERS"
        table.add_row(found.kernel, dtype, error, limit, result, found.where)
    return table


def _findings(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> Iterator[Finding]:
    ways: dict[str, Callable[..., Tensor]] = {"": kernel.experts_mlp}
    if kernel.chooses_activations:
        ways[", nothing saved"] = partial(kernel.experts_mlp, save_activations="none")
    for way, experts_mlp in ways.items():
        for case in CASES:
            for found in _of_case(kernel.name, experts_mlp, case, dtype, device):
                yield replace(found, where=f"{found.where}{way}")


def _of_case(
    name: str, experts_mlp: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: torch.device
) -> Iterator[Finding]:
    call = make_call(case, dtype, device)
    limits = dict(zip(("output", "gradient"), RELATIVE_ERROR[dtype], strict=True))
    expected = _by_name(call.double().run(experts_mlp_reference))
    try:
        found = _by_name(call.run(experts_mlp))
    except Exception as error:  # of a kernel that anyone may have written
        yield Finding(name, dtype, f"{case.name}: {type(error).__name__}: {error}", None, limits["output"])
        return
    for tensor, right in expected.items():
        limit = limits.get(tensor, limits["gradient"])
        what = tensor if tensor == "output" else f"gradient of {tensor}"
        size, reason = _compare(found[tensor], right)
        yield Finding(name, dtype, f"{what}, {case.name}{reason}", size, limit)


def _by_name(results: tuple[Tensor, dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """Output and gradients under names for people."""
    output, gradients = results
    return {"output": output, **{_IN_WORDS.get(name, name): gradient for name, gradient in gradients.items()}}


def _compare(found: Tensor | None, right: Tensor | None) -> tuple[float | None, str]:
    """The relative error, or None and the reason."""
    assert right is not None, "the reference computes every gradient"
    if found is None:
        return None, ": there is none"
    try:
        return relative_error(found, right), ""
    except ValueError as error:
        return None, f": {error}"
