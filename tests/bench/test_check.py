"""`--check` passes what is right and names what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trl_moe_ext.bench import check
from trl_moe_ext.bench.cases import CASES, make_call
from trl_moe_ext.bench.check import YARDSTICK, Finding, check_kernels
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.kernels.registry import Kernel
from trl_moe_ext.plugins import host


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], list[Finding]]:
    """Check one kernel of a plug-in, beside the reference."""

    def run(function: Callable[..., Tensor]) -> list[Finding]:
        records = {name: Kernel(name, "", function) for name in ("mine", YARDSTICK)}
        monkeypatch.setattr(host(), "records", lambda hook: records)
        return check_kernels("cpu")

    return run


def test_the_kernels_of_the_package_pass() -> None:
    findings = check_kernels("cpu")
    names = [name for name in host().records("register_kernels") if name != YARDSTICK]
    assert [(f.kernel, f.dtype) for f in findings] == [(n, d) for n in names for d in (torch.float32, torch.bfloat16)]
    for found in findings:
        assert found.is_ok, found
        assert found.error, "an error of exactly zero: nothing was compared"


def test_a_scaling_that_is_off_by_a_percent_is_found(only) -> None:
    def wrong(*args, up_updates, **kwargs):
        updates = tuple(u._replace(scaling=1.01 * u.scaling) for u in up_updates)
        return experts_mlp(*args, up_updates=updates, **kwargs)

    in_float32 = only(wrong)[0]
    assert not in_float32.is_ok
    assert 1e-3 < in_float32.error < 1e-1


def test_a_kernel_that_ignores_one_layout_is_found(only) -> None:
    def wrong(*args, **kwargs):
        hidden, index, weights, frozen = args
        return experts_mlp(hidden, index, weights, frozen._replace(weights_on_input=False), **kwargs)

    assert ["weights on the input" in found.where for found in only(wrong)] == [True, True]


def test_a_gradient_that_is_missing_is_found(only) -> None:
    def wrong(hidden, index, weights, frozen, **updates):
        return experts_mlp(hidden, index, weights.detach(), frozen, **updates)

    for found in only(wrong):
        assert (found.is_ok, found.error) == (False, None)
        assert found.where.startswith("gradient of routing weights")
        assert found.where.endswith(": there is none")


def test_numbers_that_are_not_finite_are_found(only) -> None:
    assert not any(found.is_ok for found in only(lambda *args, **kwargs: experts_mlp(*args, **kwargs) * float("nan")))


def test_a_kernel_that_fails_is_found(only) -> None:
    def fails(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("no such device")

    assert {found.where for found in only(fails)} == {f"{CASES[0].name}: RuntimeError: no such device"}


def test_an_output_of_another_shape_is_found(only) -> None:
    found = only(lambda *args, **kwargs: experts_mlp(*args, **kwargs).repeat(1, 1)[:-1])[0]
    assert not found.is_ok


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_the_same_at_each_call_and_tests_every_tensor(case) -> None:
    first, second = (make_call(case, torch.float32, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first.hidden_states, second.hidden_states)
    output, gradients = first.double().run(check.experts_mlp_reference)
    for name, tensor in {"output": output, **gradients}.items():
        assert tensor is not None
        assert tensor.norm() > 0, name
