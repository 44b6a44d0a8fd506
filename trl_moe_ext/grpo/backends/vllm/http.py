"""Requests to a vLLM server: JSON over HTTP, retried, bounded in time, and given up when the backend stops."""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.errors import BackendDeadError, BackendError, BackendHungError

__all__ = ["Reply", "VllmHttp", "is_loopback", "wait_until_ready"]

# Seconds between attempts at a server that can't be reached or is too busy: 6.2 in all.
_PAUSES = (0.2, 0.4, 0.8, 1.6, 3.2)
_BUSY = (429, 503)


@dataclass(frozen=True)
class Reply:
    """What a server answered; `body` is decoded JSON, or text where it is none."""

    status: int
    body: Any

    @property
    def ok(self) -> bool:
        """Whether the request was carried out."""
        return self.status < 400

    @property
    def message(self) -> str:
        """Of an error."""
        error = self.body.get("error", self.body) if isinstance(self.body, dict) else self.body
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def is_loopback(host: str) -> bool:
    """Whether `host` can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class VllmHttp:
    """A client of one server. Any thread may ask; `close` makes those that wait return at once.

    Proxies of the environment are not used: the server is near, and the loopback is none of their business.

    Args:
        base_url: such as ``http://localhost:8000``.
        api_key: sent with every request.
        timeout: seconds that a request may take.
        is_alive: asked before another attempt: a process of our own that has ended needs none.

    Raises:
        ConfigError: the address is not one of HTTP, or is open to others without a key.
    """

    def __init__(
        self, base_url: str, api_key: str | None, timeout: float, is_alive: Callable[[], bool] = lambda: True
    ) -> None:
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(f"vllm_server_base_url={base_url!r} is not an address like http://localhost:8000")
        if not api_key and not is_loopback(address.hostname):
            raise ConfigError(
                f"vllm_server_base_url={base_url!r} is not on this machine, and there is no API key: who reaches "
                "such a server can have it load any file. Start it with --api-key, and give the key as vllm_api_key "
                "or in VLLM_API_KEY"
            )
        self.base_url = base_url.rstrip("/")
        self.host: str = address.hostname
        self.port: int = address.port or (443 if address.scheme == "https" else 80)
        self._path = address.path.rstrip("/")
        self._connection = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._is_alive = is_alive
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()

    def get(self, path: str) -> Reply:
        """GET; raises as `post`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any], patience: float | None = None) -> Reply:
        """POST `body`, again if the server can't be reached.

        Args:
            patience: seconds for a single attempt, in the place of `timeout` and several.

        Raises:
            BackendDeadError: it can't be reached, or the client was closed.
            BackendHungError: it did not answer in time.
            ConfigError: the key is not its key.
        """
        return self._ask("POST", path, json.dumps(body).encode(), patience)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def reachable(self) -> bool:
        """Whether the server says that it is ready; one attempt."""
        try:
            return self._once("GET", "/health", None, timeout=5).ok
        except (OSError, http.client.HTTPException):
            return False

    def close(self) -> None:
        """Give up all requests that are under way; later ones fail."""
        self._closed.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):  # the other side may have closed it
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: bytes | None, patience: float | None = None) -> Reply:
        failure: object = "the backend was stopped"
        timeout = self._timeout if patience is None else patience
        for pause in (*(_PAUSES if patience is None else ()), None):
            if self._closed.is_set():
                break
            try:
                reply = self._once(method, path, body, timeout)
            except TimeoutError as error:
                option = " (request_timeout)" if patience is None else ""
                raise BackendHungError(f"{self.base_url}{path} did not answer in {timeout:g} s{option}") from error
            except (OSError, http.client.HTTPException) as error:
                failure = error
            else:
                if reply.status in (401, 403):
                    raise ConfigError(f"{self.base_url} refuses the API key: set vllm_api_key, or VLLM_API_KEY")
                if reply.status not in _BUSY:
                    return reply
                failure = reply.message
            if pause is None or not self._is_alive() or self._closed.wait(pause):
                break
        raise BackendDeadError(f"the vLLM server at {self.base_url} can't be reached: {failure}")

    def _once(self, method: str, path: str, body: bytes | None, timeout: float) -> Reply:
        connection = self._connection(self.host, self.port, timeout=timeout)
        try:
            connection.connect()
            with self._lock:  # `close` has either been here, or finds this connection
                if self._closed.is_set():
                    raise ConnectionAbortedError("the backend was stopped")
                self._open.add(connection)
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        try:
            return Reply(response.status, json.loads(data))
        except ValueError:
            return Reply(response.status, data.decode(errors="replace"))


def wait_until_ready(client: VllmHttp, timeout: float, check: Callable[[], None] = lambda: None) -> None:
    """Return when the server is ready.

    Args:
        check: called between attempts; raises if there is nothing to wait for any more.

    Raises:
        BackendError: it is not ready after `timeout` seconds, or the client was closed.
    """
    deadline = time.monotonic() + timeout
    while not client.reachable():
        check()
        if client.closed:
            raise BackendDeadError(f"waiting for the vLLM server at {client.base_url} was given up")
        if time.monotonic() > deadline:
            raise BackendError(
                f"no vLLM server is ready at {client.base_url} after {timeout:g} s (vllm_server_timeout). Start one, "
                "see docs/vllm.md, or set start_vllm"
            )
        time.sleep(0.2)
