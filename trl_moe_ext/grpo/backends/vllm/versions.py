"""The versions of the adapter that a server holds: the newest, and older ones for as long as they are used."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_moe_ext.export.vllm import VllmAdapterWriter
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.errors import BackendError
from trl_moe_ext.grpo.backends.vllm.capabilities import ServerNeeds, refuse_load
from trl_moe_ext.grpo.backends.vllm.http import VllmHttp

__all__ = ["AdapterVersions"]

logger = logging.getLogger(__name__)

_UNLOAD_SECONDS = 5.0  # an adapter that stays in the server costs memory there and nothing else


class AdapterVersions:
    """Loads and unloads versions of one adapter.

    `load` and `remove_all` are called from one thread, `use` from any.

    Args:
        writer: of the files.
        folder: for the files; the server has to see it under the same path.
        name: of this run of the backend, unlike that of any other run: a server that goes on running may hold the
            versions of an earlier one, and what it has cached for them.
    """

    def __init__(
        self, client: VllmHttp, writer: VllmAdapterWriter, folder: Path, name: str, needs: ServerNeeds
    ) -> None:
        self._client = client
        self._writer = writer
        self._folder = folder.absolute()
        self._name = name
        self._needs = needs
        self._lock = threading.Lock()
        self._users: Counter[int] = Counter()
        self._loaded: list[int] = []

    def model(self, version: int) -> str:
        """What a request calls a version."""
        return f"{self._name}-v{version}"

    def load(self, adapter: AdapterSnapshot) -> None:
        """Write and load a version, and give it to all requests that begin from now on; older ones may then go.

        Raises:
            ConfigError: this server will never load it.
            BackendError: it could not.
            AdapterFileError: the weights are not those of the adapter, or not finite.
        """
        if self._loaded and adapter.version == self._loaded[-1]:
            return
        path = self._folder / self.model(adapter.version)
        try:
            self._writer.write(adapter.tensors, path)
            reply = self._client.post(
                "/v1/load_lora_adapter", {"lora_name": self.model(adapter.version), "lora_path": str(path)}
            )
            # A request that was sent again may find that the first one had arrived.
            if not reply.ok and "already been loaded" not in reply.message:
                raise refuse_load(reply, self._needs, str(path))
            self._verify(adapter.version, path)
        except Exception:
            shutil.rmtree(path, ignore_errors=True)
            raise
        with self._lock:
            self._loaded.append(adapter.version)
        self._retire()

    def _verify(self, version: int, path: Path) -> None:
        reply = self._client.get("/v1/models")
        cards = reply.body.get("data", []) if isinstance(reply.body, dict) else []
        if not any(card.get("id") == self.model(version) and card.get("root") == str(path) for card in cards):
            raise BackendError(f"the vLLM server accepted {path}, but does not list {self.model(version)}")

    @contextmanager
    def use(self) -> Iterator[int]:
        """The newest version, which stays for as long as the context does."""
        with self._lock:
            version = self._loaded[-1]
            self._users[version] += 1
        try:
            yield version
        finally:
            with self._lock:
                self._users[version] -= 1

    def _retire(self) -> None:
        """Unload the versions before the newest that no request uses, and remove their files.

        What fails is tried again with the next version: it is no reason to give up what is being generated.
        """
        with self._lock:
            idle = [version for version in self._loaded[:-1] if not self._users[version]]
        for version in idle:
            try:
                self._remove(self._client, version)
            except BackendError as error:
                logger.warning("the vLLM server keeps %s for now: %s", self.model(version), error)
                return
            with self._lock:
                self._loaded.remove(version)

    def remove_all(self, client: VllmHttp | None) -> None:
        """Remove the files of all versions, and unload them through `client`, if it is given.

        Raises:
            BackendError: the server can't be reached; the files are gone.
        """
        for version in self._loaded:
            shutil.rmtree(self._folder / self.model(version), ignore_errors=True)
        while client is not None and self._loaded:
            self._remove(client, self._loaded.pop())

    def _remove(self, client: VllmHttp, version: int) -> None:
        # Not known there any more is as good as unloaded: the answer does not matter.
        client.post("/v1/unload_lora_adapter", {"lora_name": self.model(version)}, patience=_UNLOAD_SECONDS)
        shutil.rmtree(self._folder / self.model(version), ignore_errors=True)
