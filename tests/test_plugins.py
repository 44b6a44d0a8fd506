"""The plug-in host: what it takes, what it leaves out, and what it says about it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.grpo.fakes import FakeBackend
from trl_moe_ext import __version__, hookspecs, plugins
from trl_moe_ext.errors import PluginError
from trl_moe_ext.experts.registry import ExpertsFamily
from trl_moe_ext.grpo.backends.protocol import RegisteredBackend
from trl_moe_ext.hookspecs import hookimpl
from trl_moe_ext.kernels.registry import Kernel
from trl_moe_ext.plugins import PluginHost, PluginWarning
from trl_moe_ext.router.losses import RouterLoss

HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")]


def kernel(name: str) -> Kernel:
    return Kernel(name, f"the kernel {name}", lambda *args: args)


def providing(result: object) -> ModuleType:
    """A plug-in module whose `register_kernels` returns `result`, or raises it if it is an exception."""

    @hookimpl
    def register_kernels() -> object:
        if isinstance(result, Exception):
            raise result
        return result

    return with_functions(register_kernels)


def with_functions(*functions: Callable[..., object]) -> ModuleType:
    module = ModuleType("fake_plugin")
    for function in functions:
        setattr(module, function.__name__, function)
    return module


@dataclass
class FakeEntryPoint:
    name: str
    distribution: str
    loads: object
    version: str = "1.0"
    times_loaded: int = 0

    @property
    def dist(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.distribution, version=self.version)

    def load(self) -> object:
        self.times_loaded += 1
        if isinstance(self.loads, Exception):
            raise self.loads
        return self.loads


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PluginHost]:
    """Puts fake entry points in place of the installed ones and returns a fresh host with one built-in, `loop`."""

    def put(*entry_points: FakeEntryPoint) -> PluginHost:
        def installed(*, group: str) -> list[Any]:
            assert group == "trl_moe_ext"
            return list(entry_points)

        monkeypatch.setattr(importlib.metadata, "entry_points", installed)
        monkeypatch.setitem(sys.modules, "fake_builtin", providing([kernel("loop")]))
        return PluginHost(builtins=[("fake_kernels", "fake_builtin")])

    return put


GOOD = FakeEntryPoint("good", "z-good-dist", providing([kernel("good")]))


def test_register_kernels(install: Callable[..., PluginHost]) -> None:
    record = kernel("fast")
    host = install(FakeEntryPoint("fast", "fast-dist", providing((record,)), version="2.1"))
    assert list(host.records("register_kernels")) == ["loop", "fast"]
    assert host.lookup("register_kernels", "fast") is record
    assert [(p.name, p.distribution, p.version, p.hooks, p.records, p.status) for p in host.status()][1:] == [
        ("fast", "fast-dist", "2.1", ["register_kernels"], {"register_kernels": ["fast"]}, "ok")
    ]


def test_register_experts_families(install: Callable[..., PluginHost]) -> None:
    record = ExpertsFamily("tomorrow", "a family of tomorrow", read_layout=lambda module: None)
    plug_in = with_functions(renamed(hookimpl(lambda: [record]), "register_experts_families"))
    host = install(FakeEntryPoint("tomorrow", "tomorrow-dist", plug_in))
    assert host.lookup("register_experts_families", "tomorrow") is record


def test_register_router_losses(install: Callable[..., PluginHost]) -> None:
    record = RouterLoss("tomorrow", "a loss of tomorrow", function=lambda routed: routed.logits.sum())
    plug_in = with_functions(renamed(hookimpl(lambda: [record]), "register_router_losses"))
    host = install(FakeEntryPoint("tomorrow", "tomorrow-dist", plug_in))
    assert host.lookup("register_router_losses", "tomorrow") is record


def test_register_rollout_backends(install: Callable[..., PluginHost]) -> None:
    record = RegisteredBackend("tomorrow", "completions of tomorrow", make=lambda context: FakeBackend())
    plug_in = with_functions(renamed(hookimpl(lambda: [record]), "register_rollout_backends"))
    host = install(FakeEntryPoint("tomorrow", "tomorrow-dist", plug_in))
    assert host.lookup("register_rollout_backends", "tomorrow") is record


def test_every_hook_has_a_test_and_a_record_type() -> None:
    assert list(hookspecs.RECORD_TYPES) == HOOKS
    assert not [hook for hook in HOOKS if f"test_{hook}" not in globals()]


def test_the_builtins_come_through_the_hook() -> None:
    assert {"grouped", "reference"} <= set(PluginHost().records("register_kernels"))
    assert {"load_balancing", "z_loss", "drift_kl"} <= set(PluginHost().records("register_router_losses"))
    assert {"local", "vllm"} <= set(PluginHost().records("register_rollout_backends"))


def renamed(hook: Callable[..., object], name: str) -> Callable[..., object]:
    hook.__name__ = name
    return hook


NOT_TAKEN = {
    "import error": (ImportError("No module named 'nothing'"), "ImportError: No module named 'nothing'"),
    "hook raises": (providing(OSError("no device")), "OSError: no device"),
    "hook returns nothing": (providing(None), "must return one sequence of Kernel, not NoneType"),
    "hook returns a string": (providing("kernel"), "must return one sequence of Kernel, not str"),
    "hook returns one record": (providing(kernel("one")), "must return one sequence of Kernel, not Kernel"),
    "hook returns other records": (providing(["kernel"]), "with a name each, not of 'kernel'"),
    "record without a name": (providing([Kernel(7, "", len)]), "with a name each, not of Kernel(name=7"),  # type: ignore[arg-type]
    "unknown hook": (
        with_functions(renamed(hookimpl(lambda: ()), "register_kernel")),
        "register_kernel is not a hook; did you mean register_kernels",
    ),
    "unknown argument": (with_functions(renamed(hookimpl(lambda device: ()), "register_kernels")), "device"),
    "no hook": (len, "it implements no hook"),
    "undecorated hook": (with_functions(renamed(lambda: (), "register_kernels")), "it implements no hook"),
}


@pytest.mark.parametrize(("loads", "reason"), NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_a_broken_plug_in_is_reported_once_and_the_others_go_on(
    install: Callable[..., PluginHost], loads: object, reason: str
) -> None:
    host = install(FakeEntryPoint("bad", "bad-dist", loads, version="0.3"), GOOD)
    with pytest.warns(PluginWarning) as caught:
        assert list(host.records("register_kernels")) == ["loop", "good"]
    [report] = [str(warning.message) for warning in caught]
    assert report.startswith("plug-in bad (bad-dist 0.3) was left out: ")
    assert reason in report
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [plugin.status for plugin in host.status()] == ["ok", "error", "ok"]
        with pytest.raises(PluginError) as error:
            host.lookup("register_kernels", "goood")
    assert "did you mean good?" in str(error.value)
    assert "plug-in bad (bad-dist 0.3): " in str(error.value)
    assert reason in str(error.value)


def test_a_name_that_is_taken_is_refused_and_the_other_records_are_not(install: Callable[..., PluginHost]) -> None:
    late = FakeEntryPoint("late", "b-dist", providing([kernel("loop"), kernel("shared"), kernel("own")]))
    early = FakeEntryPoint("early", "a-dist", providing([kernel("shared")]))
    host = install(late, early)
    with pytest.warns(PluginWarning) as caught:
        records = host.records("register_kernels")
    assert list(records) == ["loop", "shared", "own"]
    assert records["shared"] is early.loads.register_kernels()[0]  # type: ignore[attr-defined]
    assert [str(warning.message).partition(": ")[2] for warning in caught] == [
        f"register_kernels: the name 'loop' is taken by fake_kernels (trl_moe_ext {__version__})",
        "register_kernels: the name 'shared' is taken by early (a-dist 1.0)",
    ]


def test_one_object_under_two_names_is_registered_once(install: Callable[..., PluginHost]) -> None:
    host = install(FakeEntryPoint("first", "a-dist", GOOD.loads), FakeEntryPoint("second", "b-dist", GOOD.loads))
    with pytest.warns(PluginWarning, match="the same object is registered as a-dist:first"):
        assert list(host.records("register_kernels")) == ["loop", "good"]


def test_an_optional_hook_of_another_version_is_no_error(install: Callable[..., PluginHost]) -> None:
    later = renamed(hookimpl(optionalhook=True)(lambda: ()), "register_something_new")
    host = install(FakeEntryPoint("newer", "a-dist", with_functions(GOOD.loads.register_kernels, later)))  # type: ignore[attr-defined]
    assert [plugin.status for plugin in host.status()] == ["ok", "ok"]
    assert "good" in host.records("register_kernels")


def test_an_error_of_a_builtin_is_raised() -> None:
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        PluginHost(builtins=[("broken", "not_there")]).records("register_kernels")


def test_what_a_record_does_is_not_guarded(install: Callable[..., PluginHost]) -> None:
    def fails(*args: object) -> Any:
        raise FloatingPointError("in training")

    host = install(FakeEntryPoint("fails", "a-dist", providing([Kernel("fails", "", fails)])))
    with pytest.raises(FloatingPointError, match="in training"):
        host.lookup("register_kernels", "fails").experts_mlp()


def test_an_unknown_hook_has_near_matches(install: Callable[..., PluginHost]) -> None:
    with pytest.raises(PluginError, match="did you mean register_kernels"):
        install().records("register_kernal")


def test_plug_ins_load_at_the_first_question_and_once(install: Callable[..., PluginHost]) -> None:
    entry_point = FakeEntryPoint("counted", "a-dist", GOOD.loads)
    host = install(entry_point)
    assert entry_point.times_loaded == 0
    for _ in range(2):
        host.records("register_kernels").clear()
        host.status()
    assert entry_point.times_loaded == 1
    assert "good" in host.records("register_kernels"), "a caller changed the host's own records"


def test_the_host_of_the_process_can_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plugins.host()
    assert plugins.host() is before
    plugins.host.cache_clear()
    assert plugins.host() is not before


def test_importing_the_host_imports_no_torch() -> None:
    program = "import sys, trl_moe_ext.plugins; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
