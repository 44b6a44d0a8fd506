"""A vLLM server of our own: started for a run, bound to the loopback, and gone with whoever started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends import die_with_parent
from trl_moe_ext.grpo.backends.errors import BackendDeadError, BackendOutOfMemoryError
from trl_moe_ext.grpo.backends.vllm.flags import HOST, RUNTIME_UPDATES, ServerOptions, server_command
from trl_moe_ext.grpo.backends.vllm.http import is_loopback

__all__ = ["PYTHON_VARIABLE", "VllmServer", "check_ours"]

# vLLM pins other versions than those that we train with, so that it often lives in an environment of its own.
PYTHON_VARIABLE = "TRL_MOE_VLLM_PYTHON"
_STOP_SECONDS = 20.0  # for the server to end by itself
_GROUP_SECONDS = 2.0  # for the system to end the rest
_TAIL = 2000  # characters of the log in an error


class VllmServer:
    """The process of a server. Not thread-safe, but `kill`.

    Args:
        options: of its command line.
        api_key: that it is to ask for.
        log: file that its output is added to.
    """

    def __init__(self, options: ServerOptions, api_key: str, log: Path) -> None:
        self._options = options
        self._api_key = api_key
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the process; the server is ready later.

        Raises:
            ConfigError: vLLM is not installed, or the port is taken.
        """
        self.stop()
        python = os.environ.get(PYTHON_VARIABLE) or sys.executable
        _check_installed(python)
        _check_port(self._options.port)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = _spawn([python, *server_command(self._options)], self._environment(), log)

    def _environment(self) -> Mapping[str, str]:
        # The key goes through the environment: other users can read command lines.
        return os.environ | {RUNTIME_UPDATES: "1", "VLLM_API_KEY": self._api_key}

    def check(self) -> None:
        """Raise what the server died of, if it did.

        Raises:
            BackendOutOfMemoryError: its log says that memory was short.
            BackendDeadError: anything else.
        """
        if self._process is None or self._process.poll() is None:
            return
        tail = self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip() if self._log.exists() else ""
        error = BackendOutOfMemoryError if "out of memory" in tail.lower() else BackendDeadError
        raise error(f"the vLLM server ended with code {self._process.returncode}; the end of {self._log}:\n{tail}")

    def kill(self) -> None:
        """Make the process and all that it started end now, from any thread; `stop` is still needed."""
        pid = self.pid
        if pid is not None:
            _signal(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process and all that it started; again it does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        _signal(process.pid, signal.SIGKILL)  # the group may outlive its first process
        process.wait()
        deadline = time.monotonic() + _GROUP_SECONDS
        while _signal(process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.02)


def _spawn(command: list[str], environment: Mapping[str, str], log: IO[Any]) -> subprocess.Popen[bytes]:
    watched = [sys.executable, str(Path(die_with_parent.__file__)), str(os.getpid()), *command]
    return subprocess.Popen(
        watched,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, to be signalled as a whole; Ctrl-C is for the trainer alone
    )


def _signal(group: int, number: int) -> bool:
    """Whether there was anyone to get it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _check_installed(python: str) -> None:
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        missing = subprocess.run([python, "-c", find], capture_output=True, timeout=120).returncode != 0
    except OSError as error:
        raise ConfigError(f"{PYTHON_VARIABLE}={python!r} can't be run: {error}") from error
    if missing:
        raise ConfigError(
            f"start_vllm needs vLLM, which {python} does not have. Install it in an environment of its own (pip "
            f"install vllm), and name its interpreter in {PYTHON_VARIABLE}; or start a server yourself, see "
            "docs/vllm.md"
        )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise ConfigError(
                f"port {port} of this machine is taken: stop what listens there, or change vllm_server_base_url"
            )


def check_ours(host: str) -> None:
    """Refuse to start a server that others could reach.

    Raises:
        ConfigError: `host` is another machine or another interface.
    """
    if not is_loopback(host):
        raise ConfigError(
            f"start_vllm starts a server for this machine alone: vllm_server_base_url names {host}; use "
            "http://127.0.0.1:8000, or start the server yourself, with an API key"
        )
