"""What the trainer hears of a generator that dies, hangs or runs out of memory, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.grpo.backends.local_runs import (
    Alive,
    ask,
    collect,
    context,
    save_model,
    snapshot,
    trainer_model,
)
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.local.backend import LocalBackend
from trl_moe_ext.grpo.backends.local.process import _last_words
from trl_moe_ext.grpo.backends.protocol import (
    BackendDeadError,
    BackendError,
    BackendHungError,
    BackendOutOfMemoryError,
    Generation,
)

ROOT = Path(__file__).parents[3]
LONG = 4000


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model_path: str) -> AdapterSnapshot:
    return snapshot(trainer_model(model_path))


@pytest.fixture
def backend(model_path: str, tmp_path: Path) -> Iterator[LocalBackend]:
    """Two long completions at a time; taken for hung after two seconds."""
    options = {"max_completion_length": LONG, "heartbeat_stale_after_s": 2.0, "max_inflight_tasks": 2}
    made = LocalBackend(context(model_path, tmp_path, **options))
    made.patience = (0.5, 0.5)  # type: ignore[misc]
    yield made
    made.stop()


def collect_for(backend: LocalBackend, seconds: float) -> list[Generation]:
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        found += backend.collect(0.2)
    return found


def handles() -> set[str]:
    """What the open file descriptors of this process are of."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def test_a_killed_generator_is_told_of_and_can_be_started_again(
    backend: LocalBackend, adapter: AdapterSnapshot, tmp_path: Path
) -> None:
    backend.start(adapter)
    ask(backend, 2)
    assert collect_for(backend, 0.5) == []
    first = backend.pid
    assert first is not None
    os.kill(first, signal.SIGINT)  # as Ctrl-C does to a whole terminal: the trainer decides
    assert collect_for(backend, 0.5) == []
    os.kill(first, signal.SIGKILL)
    for _ in range(2):  # it stays dead
        with pytest.raises(BackendDeadError, match=rf"pid {first}.*exit code -9"):
            collect_for(backend, 10)
    backend.start(adapter)
    assert not Path(f"/proc/{first}").exists()  # no zombie either
    ask(backend, 2)
    assert collect_for(backend, 0.5) == []
    assert backend.pid != first


def test_a_hung_generator_is_told_of_and_ended(backend: LocalBackend, adapter: AdapterSnapshot) -> None:
    backend.start(adapter)
    pid = backend.pid
    assert pid is not None
    ask(backend, 2)
    assert collect_for(backend, 3.0) == []  # longer than the time after which it counts as hung
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(BackendHungError, match=rf"pid {pid}.*generate 2 completions.*heartbeat_stale_after_s"):
        collect_for(backend, 10)
    with pytest.raises(BackendHungError, match="load an adapter"):
        backend.load_adapter(adapter)
    backend.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert backend.pid is None


def test_an_idle_generator_is_not_taken_for_hung(backend: LocalBackend, adapter: AdapterSnapshot) -> None:
    backend.start(adapter)
    assert collect_for(backend, 3.0) == []


@pytest.mark.parametrize("delay", [0.0, 1.0], ids=["at once", "while it loads"])
def test_an_abort_ends_a_start(
    backend: LocalBackend, adapter: AdapterSnapshot, monkeypatch: pytest.MonkeyPatch, delay: float
) -> None:
    """A generator that takes for ever to load, as a large model from a slow disk."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    backend.module = "tests.grpo.backends.loading_process"  # type: ignore[misc]
    threading.Timer(delay, backend.abort).start()
    began = time.monotonic()
    with pytest.raises(BackendDeadError, match="aborted"):
        backend.start(adapter)
    assert time.monotonic() - began < delay + 2
    assert backend.pid is None
    backend.abort()
    backend.stop()


def test_a_message_that_can_not_be_sent_is_told_to_who_sends_it(
    backend: LocalBackend, adapter: AdapterSnapshot
) -> None:
    backend.start(adapter)
    with pytest.raises(Exception, match="pickle"):
        backend._running().send(lambda: None)  # type: ignore[arg-type]
    backend.load_adapter(adapter)  # the link goes on


def test_nothing_is_left_after_a_stop(backend: LocalBackend, adapter: AdapterSnapshot) -> None:
    handles_before, threads_before = handles(), threading.active_count()
    backend.start(adapter)
    pid = backend.pid
    ask(backend, 2)
    backend.stop()
    backend.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert handles() == handles_before
    assert threading.active_count() == threads_before
    with pytest.raises(BackendError, match="call start first"):
        backend.collect(0.0)


def test_it_ends_with_a_parent_that_is_killed(model_path: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.grpo.backends.local_parent", model_path, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        generator, fork = map(int, parent.stdout.readline().split())
        try:
            assert Alive(generator)
            parent.kill()
            assert Alive(generator).ends(seconds=8)
        finally:
            os.kill(fork, signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("memory", BackendOutOfMemoryError, "DefaultCPUAllocator"),
        ("other", BackendError, "ValueError: something else"),
    ],
)
def test_an_error_while_generating_is_reported(
    backend: LocalBackend,
    adapter: AdapterSnapshot,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    error: type[BackendError],
    message: str,
) -> None:
    monkeypatch.setenv("GENERATOR_FAILS_WITH", how)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    backend.module = "tests.grpo.backends.failing_process"  # type: ignore[misc]
    backend.start(adapter)
    ask(backend, 2)
    with pytest.raises(BackendError, match=message) as caught:
        collect_for(backend, 10)
    assert type(caught.value) is error
    assert "Traceback" in backend_log(backend)
    pid = backend.pid
    assert pid is not None
    assert Alive(pid).ends(5)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (MemoryError(), "memory"),
        (ConfigError("no such thing"), "config"),
        (RuntimeError("can't allocate a name"), "error"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_last_words(error: Exception, kind: str) -> None:
    words = _last_words(error)
    assert words.kind == kind
    assert str(error) in words.message


def backend_log(backend: LocalBackend) -> str:
    return (Path(backend._context.output_dir) / "rollout" / "generator.log").read_text()


def test_what_was_finished_before_a_death_is_not_lost(
    model_path: str, adapter: AdapterSnapshot, tmp_path: Path
) -> None:
    backend = LocalBackend(context(model_path, tmp_path))
    try:
        backend.start(adapter)
        ask(backend, 4)
        time.sleep(1.0)
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert len(collect(backend, 4)) == 4
        with pytest.raises(BackendDeadError):
            backend.collect(1.0)
    finally:
        backend.stop()


def test_a_generator_that_can_not_start_says_why(adapter: AdapterSnapshot, tmp_path: Path) -> None:
    backend = LocalBackend(context(str(tmp_path / "absent"), tmp_path))
    with pytest.raises(BackendError, match="absent"):
        backend.start(adapter)
    assert backend.pid is None


def test_a_cache_that_does_not_fit_is_an_error_by_name(
    model_path: str, adapter: AdapterSnapshot, tmp_path: Path
) -> None:
    backend = LocalBackend(context(model_path, tmp_path, max_completion_length=10**9))
    with pytest.raises(ConfigError, match="max_completion_length"):
        backend.start(adapter)
