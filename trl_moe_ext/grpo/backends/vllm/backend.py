"""Completions from a vLLM server, which is given each version of the adapter as files.

The server is the user's, or one that is started for the run. A completion that is under way when a new version arrives
ends with the version that it began with: requests name theirs, and vLLM serves several side by side.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.export.skeleton import adapted_skeleton
from trl_moe_ext.export.vllm import VllmAdapterWriter
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.errors import BackendDeadError, BackendError
from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest
from trl_moe_ext.grpo.backends.protocol import BackendContext, RolloutBackend
from trl_moe_ext.grpo.backends.vllm.capabilities import ServerNeeds, check_log_probs, check_server
from trl_moe_ext.grpo.backends.vllm.completions import complete
from trl_moe_ext.grpo.backends.vllm.flags import ServerOptions
from trl_moe_ext.grpo.backends.vllm.http import VllmHttp, wait_until_ready
from trl_moe_ext.grpo.backends.vllm.request_threads import RequestThreads
from trl_moe_ext.grpo.backends.vllm.server import VllmServer, check_ours
from trl_moe_ext.grpo.backends.vllm.versions import AdapterVersions

__all__ = ["VllmBackend"]

_JOIN_SECONDS = 5.0  # for threads whose connection was closed


class VllmBackend(RolloutBackend):
    """A vLLM server as a generator.

    Raises:
        ConfigError: the adapter has something that vLLM's layout can't hold, or the options can't be served.
    """

    def __init__(self, context: BackendContext) -> None:
        args = context.args
        if context.record_routes:
            raise ConfigError(
                "rollout_backend='vllm' does not record routes: leave routing_replay out, or use 'local'"
            )
        self._args = args
        self._sampling = context.sampling
        self._folder = Path(context.output_dir, "rollout")
        self._api_key: str | None = args.vllm_api_key or os.environ.get("VLLM_API_KEY")
        self._writer = VllmAdapterWriter(
            adapted_skeleton(context.model_path, context.peft_config, context.model_init_kwargs)
        )
        # The newest, max_staleness older ones that are being finished, and one that is arriving.
        max_loras = args.max_staleness + 2
        rank, has_experts = self._writer.rank, self._writer.has_experts
        self._needs = ServerNeeds(context.model_path, rank, max_loras, has_experts, context.sampling)
        self._server = self._own_server(context) if args.start_vllm else None
        self._aborted = threading.Event()
        self._client = self._connect()  # says what is wrong with the address and the key
        self._requests: RequestThreads | None = None
        self._versions: AdapterVersions | None = None

    def _own_server(self, context: BackendContext) -> VllmServer:
        # Other users of this machine can reach its loopback: a server of ours always has a key.
        self._api_key = self._api_key or secrets.token_hex(16)
        client = self._connect()
        check_ours(client.host)
        options = ServerOptions(
            model=context.model_path,
            port=client.port,
            rank=self._needs.rank,
            max_loras=self._needs.max_loras,
            has_experts=self._needs.has_experts,
            dtype=_dtype(context.model_init_kwargs.get("dtype")),
            extra=tuple(word for given in context.args.vllm_server_args or () for word in shlex.split(given)),
        )
        return VllmServer(options, self._api_key, self._folder / "vllm.log")

    def _connect(self, timeout: float | None = None, retried: bool = True) -> VllmHttp:
        return VllmHttp(
            self._args.vllm_server_base_url,
            self._api_key,
            timeout=timeout or self._args.request_timeout,
            is_alive=lambda: retried and (self._server is None or self._server.pid is not None),
        )

    @property
    def pid(self) -> int | None:
        """Of the server, if it is ours."""
        return self._server.pid if self._server is not None else None

    def expect_prompts(self, longest: int) -> None:
        """The next start raises a ConfigError if the server has no room for such prompts."""
        self._needs = replace(self._needs, longest_prompt=longest)

    def start(self, adapter: AdapterSnapshot) -> None:
        """Start the server if it is ours to start, wait until it is ready, and load `adapter`."""
        self.stop()
        self._client = self._connect()
        try:
            if self._aborted.is_set():  # while there was another client to close
                raise BackendDeadError("the start of the vLLM backend was aborted")
            if self._server is not None:
                self._server.start()
            wait_until_ready(self._client, self._args.vllm_server_timeout, self._check_process)
            check_server(self._client, self._needs)
            folder = self._folder / "adapters"
            shutil.rmtree(folder, ignore_errors=True)  # of a trainer that was killed
            name = f"policy-{secrets.token_hex(4)}"
            self._versions = AdapterVersions(self._client, self._writer, folder, name, self._needs)
            self._versions.load(adapter)
            check_log_probs(self._client, self._needs, self._versions.model(adapter.version))
        except BaseException:
            self.stop()
            raise
        count = self._args.max_inflight_tasks if self.max_in_flight is None else self.max_in_flight
        self._requests = RequestThreads(partial(self._complete, self._client, self._versions), count)

    def _complete(self, client: VllmHttp, versions: AdapterVersions, request: GenerationRequest) -> Generation:
        with versions.use() as version:
            return complete(client, versions.model(version), version, request, self._sampling)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue the requests: `max_in_flight` of them are at the server at a time."""
        assert self._requests is not None, "submit comes after start"
        self._check_process()
        self._requests.submit(requests)

    def collect(self, timeout: float) -> list[Generation]:
        """What has been finished; raises what a request failed with when what was finished has been handed over."""
        assert self._requests is not None, "collect comes after start"
        try:
            found = self._requests.collect(timeout)
        except Exception:
            self._check_process()  # knows more of a server that died than who was cut off by it
            raise
        if not found:
            self._check_process()
        return found

    def load_adapter(self, adapter: AdapterSnapshot) -> None:
        """Load a version for the requests that begin from now on."""
        assert self._versions is not None, "load_adapter comes after start"
        self._check_process()
        self._versions.load(adapter)

    def abort(self) -> None:
        """Give up waiting for the server, and end it at once if it is ours."""
        self._aborted.set()
        self._client.close()
        if self._server is not None:
            self._server.kill()

    def stop(self) -> None:
        """Give up what is under way, remove the files of the adapter, and end the server if it is ours."""
        self._client.close()
        if self._requests is not None:
            self._requests.stop(_JOIN_SECONDS)
        if self._server is not None:
            self._server.stop()
        if self._versions is not None:
            # A server of the user's goes on: leave nothing of this run in it, if it is still there.
            client = self._connect(timeout=_JOIN_SECONDS, retried=False) if self._server is None else None
            with suppress(BackendError, ConfigError):
                self._versions.remove_all(client)
        self._requests = self._versions = None

    def _check_process(self) -> None:
        if self._server is not None:
            self._server.check()


def _dtype(dtype: Any) -> str | None:
    """As vLLM spells it."""
    return None if dtype is None else str(dtype).removeprefix("torch.")
