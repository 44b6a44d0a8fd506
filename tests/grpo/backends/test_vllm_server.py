"""A server of our own, played by a script that takes vLLM's place: its command line, its end, and what it died of."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.protocol import BackendDeadError, BackendOutOfMemoryError
from trl_moe_ext.grpo.backends.vllm.flags import ServerOptions, allowed_rank, server_command
from trl_moe_ext.grpo.backends.vllm.server import PYTHON_VARIABLE, VllmServer, check_ours

# Stands for the interpreter: it "has" vLLM, tells what it was started with, starts a child as vLLM does, and waits.
INTERPRETER = """#!{python}
import os, subprocess, sys, time
if sys.argv[1] == "-c":
    sys.exit({missing})
print("argv", sys.argv[1:], flush=True)
print("key", os.environ["VLLM_API_KEY"], os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], flush=True)
if {dies!r}:
    sys.exit({dies!r})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    def make(missing: bool = False, dies: str = "") -> None:
        file = tmp_path / "python"
        file.write_text(INTERPRETER.format(python=sys.executable, missing=missing, dies=dies))
        file.chmod(0o755)
        monkeypatch.setenv(PYTHON_VARIABLE, str(file))

    return make


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def server(tmp_path, port) -> Iterator[VllmServer]:
    options = ServerOptions("some/model", port, 20, 6, True, "bfloat16", ("--enforce-eager",))
    server = VllmServer(options, "a key", tmp_path / "run" / "vllm.log")
    yield server
    server.stop()


def log_line(tmp_path: Path, word: str) -> str:
    return until(
        lambda: next(
            (line for line in (tmp_path / "run" / "vllm.log").read_text().splitlines() if line.startswith(word)), None
        )
    )


def until(answer, seconds: float = 10.0):
    deadline = time.monotonic() + seconds
    while not (found := answer()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_command_line_has_all_that_the_adapter_needs(port):
    command = " ".join(server_command(ServerOptions("some/model", 8000, 20, 6, True, "bfloat16", ("--seed", "1"))))
    assert command == (
        "-m vllm.entrypoints.openai.api_server --model some/model --host 127.0.0.1 --port 8000 --enable-lora "
        "--max-lora-rank 32 --max-loras 6 --enable-mixed-moe-lora-format --logprobs-mode processed_logprobs "
        "--generation-config vllm --dtype bfloat16 --seed 1"
    )
    assert "moe" not in " ".join(server_command(ServerOptions("some/model", 8000, 20, 6, False)))


def test_ranks_are_those_that_vllm_takes():
    assert [allowed_rank(rank) for rank in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(ConfigError, match="rank 513 is too large"):
        allowed_rank(513)


def test_it_is_started_with_its_key_and_ends_with_all_its_processes(interpreter, server, tmp_path):
    interpreter()
    server.start()
    pid = server.pid
    assert "--host', '127.0.0.1'" in log_line(tmp_path, "argv")
    assert "a key" not in log_line(tmp_path, "argv")  # where other users would see it
    assert log_line(tmp_path, "key") == "key a key 1"
    child = int(log_line(tmp_path, "child").split()[1])
    server.check()
    server.stop()
    server.stop()
    assert server.pid is None
    assert until(lambda: gone(pid))
    assert until(lambda: gone(child))


@pytest.mark.parametrize(
    ("dies", "error"),
    [("no such model", BackendDeadError), ("torch.OutOfMemoryError: CUDA out of memory", BackendOutOfMemoryError)],
)
def test_what_it_died_of_is_told(dies, error, interpreter, server, tmp_path):
    interpreter(dies=dies)
    server.start()
    until(lambda: server.pid is None)
    with pytest.raises(error, match=f"ended with code 1; the end of .*vllm.log:(?s:.*){dies}"):
        server.check()


def test_without_vllm_it_says_what_to_install(interpreter, server, monkeypatch):
    interpreter(missing=True)
    with pytest.raises(ConfigError, match=r"pip install vllm.*TRL_MOE_VLLM_PYTHON"):
        server.start()
    monkeypatch.setenv(PYTHON_VARIABLE, "/no/such/python")
    with pytest.raises(ConfigError, match="can't be run"):
        server.start()


def test_a_port_that_is_taken_is_named(interpreter, server, port):
    interpreter()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=f"port {port} .* is taken"):
        server.start()


def test_a_server_of_ours_is_for_this_machine_alone():
    check_ours("localhost")
    with pytest.raises(ConfigError, match="for this machine alone"):
        check_ours("0.0.0.0")


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_it_does_not_outlive_a_trainer_that_is_killed(interpreter, tmp_path, port):
    interpreter()
    script = f"""
import time
from pathlib import Path
from trl_moe_ext.grpo.backends.vllm.flags import ServerOptions
from trl_moe_ext.grpo.backends.vllm.server import VllmServer
server = VllmServer(ServerOptions("m", {port}, 8, 2, False), "key", Path({str(tmp_path)!r}, "run", "vllm.log"))
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        log_line(tmp_path, "child")
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    try:
        assert until(lambda: gone(pid))
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
        child = int(log_line(tmp_path, "child").split()[1])
        if not gone(child):  # of the script that plays vLLM, which ends it itself
            os.kill(child, signal.SIGKILL)
