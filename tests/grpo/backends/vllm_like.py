"""A small HTTP server that behaves like vLLM's: what it is asked has to be what vLLM 0.32 documents."""

from __future__ import annotations

import json
import math
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trl_moe_ext.export.vllm_decoder import read_deltas

# Fields of CompletionRequest that we send, with what JSON gives for them.
COMPLETION = {
    "model": str,
    "prompt": list,
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "stop_token_ids": list,
    "seed": int,
    "logprobs": int,
    "return_token_ids": bool,
    "skip_special_tokens": bool,
}


def fingerprint(folder: str | Path) -> float:
    """A negative number that tells an adapter from another: a stand-in for the log-probabilities it leads to."""
    return -math.log1p(sum(delta.abs().sum().item() for delta in read_deltas(folder).values()))


class VllmLike:
    """The server and what it holds.

    Attributes:
        adapters: name -> folder, of those that are loaded.
        gate: completions are answered while it is set.
        unloading: the same for adapters that are to be unloaded.
        asked: bodies of the completions.
    """

    def __init__(
        self, model: str, *, max_lora_rank: int = 16, max_loras: int = 8, key: str | None = None, **options: Any
    ) -> None:
        self.model = model
        self.key = key
        self.lora = {"max_lora_rank": max_lora_rank, "max_loras": max_loras}
        self.options = {"updates": True, "lora": True, "info": False, "processed": True, "max_model_len": 64} | options
        self.adapters: dict[str, Path] = {}
        self.unloaded: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.failures: list[int] = []  # statuses for the next completions
        self.gate = threading.Event()
        self.gate.set()
        self.unloading = threading.Event()
        self.unloading.set()
        self.arrived = threading.Semaphore(0)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"vllm": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.gate.set()
        self.unloading.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            base = {
                "id": self.model,
                "root": self.model,
                "parent": None,
                "max_model_len": self.options["max_model_len"],
            }
            loras = [{"id": n, "root": str(p), "parent": self.model} for n, p in self.adapters.items()]
            return 200, {"object": "list", "data": [base, *loras]}
        if path == "/server_info?config_format=json" and self.options["info"]:
            config = {"lora_config": self.lora if self.options["lora"] else None}
            env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": self.options["updates"]}
            return 200, {"vllm_config": config, "vllm_env": env}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            return self._complete(body)
        if path == "/v1/load_lora_adapter" and self.options["updates"]:
            return self._load(body)
        if path == "/v1/unload_lora_adapter" and self.options["updates"]:
            self.unloading.wait(30)
            self.unloaded.append(body["lora_name"])
            return (200, "Success") if self.adapters.pop(body["lora_name"], None) else _error(404, "cannot be found")
        return 404, {"detail": "Not Found"}

    def _load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if not self.options["lora"]:
            return _error(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not folder.is_dir():
            return _error(404, f"No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.lora["max_lora_rank"]:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.lora['max_lora_rank']}.")
        fingerprint(folder)
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(body)
        self.arrived.release()
        if self.failures:
            return _error(self.failures.pop(0), "asked to fail")
        if body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        wrong = {k: v for k, v in body.items() if k not in COMPLETION or not isinstance(v, COMPLETION[k])}
        if wrong and body.get("top_k") != 1:  # the probe of a start
            self.problems.append(f"not documented: {wrong}")
        if len(body["prompt"]) + body["max_tokens"] > self.options["max_model_len"]:
            return _error(400, "This model's maximum context length is 64 tokens.")
        folder = self.adapters[body["model"]]
        self.gate.wait(30)
        # An adapter that is unloaded is read again from its folder while requests name it.
        log_prob = fingerprint(folder)
        if body["top_k"] == 1:
            log_prob = 0.0 if self.options["processed"] else -0.7
        tokens = [body.get("seed", 0), *body["prompt"][:2]][: body["max_tokens"]]
        choice = {"index": 0, "finish_reason": "length", "logprobs": {"token_logprobs": [log_prob] * len(tokens)}}
        return 200, {"choices": [choice | ({"token_ids": tokens} if body.get("return_token_ids") else {})]}


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "Error", "code": status}}


class _Handler(BaseHTTPRequestHandler):
    vllm: VllmLike

    def do_GET(self) -> None:
        self._answer(lambda: self.vllm.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(lambda: self.vllm.post(self.path, body))

    def _answer(self, make: Any) -> None:
        if (
            self.vllm.key
            and self.path.startswith("/v1")
            and self.headers["Authorization"] != f"Bearer {self.vllm.key}"
        ):
            status, body = 401, {"error": "Unauthorized"}
        else:
            try:
                status, body = make()
            except Exception as error:
                if not self._left():  # vLLM drops the requests of those who left
                    self.vllm.problems.append(repr(error))
                status, body = _error(500, repr(error))
        data = json.dumps(body).encode()
        with suppress(OSError):  # who asked may have left
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _left(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def log_message(self, *args: Any) -> None:
        pass
