"""Can this server do what a run needs? Asked when it starts, so that the answer is the flag that is missing."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.errors import BackendError
from trl_moe_ext.grpo.backends.generation import Sampling
from trl_moe_ext.grpo.backends.vllm.flags import RUNTIME_UPDATES, lora_flags
from trl_moe_ext.grpo.backends.vllm.http import Reply, VllmHttp

__all__ = ["ServerNeeds", "check_log_probs", "check_server", "refuse_load"]


@dataclass(frozen=True)
class ServerNeeds:
    """What a run needs of its server.

    Attributes:
        rank: of the adapter.
        max_loras: versions of it that are in use at the same time.
        longest_prompt: in tokens.
    """

    model: str
    rank: int
    max_loras: int
    has_experts: bool
    sampling: Sampling
    longest_prompt: int = 1

    @property
    def command(self) -> str:
        """That starts a server which has it all."""
        flags = [*lora_flags(self.rank, self.max_loras, self.has_experts), "--generation-config", "vllm"]
        return f"{RUNTIME_UPDATES}=1 vllm serve {shlex.quote(self.model)} {' '.join(flags)}"

    def refuse(self, what: str) -> ConfigError:
        """The error that says so."""
        return ConfigError(f"{what}. Start the server with: {self.command}")


def check_server(client: VllmHttp, needs: ServerNeeds) -> None:
    """Compare what a server tells of itself with what is needed; the rest shows when an adapter is loaded.

    Raises:
        ConfigError: it lacks something.
        BackendError: it does not answer.
    """
    reply = client.get("/v1/models")
    if not reply.ok or not isinstance(reply.body, dict):
        raise BackendError(f"{client.base_url}/v1/models answered {reply.status}: {reply.message}")
    cards = [card for card in reply.body["data"] if not card.get("parent")]
    _check_model([str(card.get(key)) for card in cards for key in ("root", "id")], needs.model)
    room = min((card["max_model_len"] for card in cards if card.get("max_model_len")), default=None)
    if room is not None and room < needs.longest_prompt + needs.sampling.max_completion_length:
        raise ConfigError(
            f"max_completion_length={needs.sampling.max_completion_length} leaves no room for a prompt of "
            f"{needs.longest_prompt} tokens: the server takes {room} tokens of both. Start it with a larger "
            "--max-model-len, ask for shorter completions, or leave long prompts out"
        )
    info = client.get("/server_info?config_format=json")  # where VLLM_SERVER_DEV_MODE=1
    if info.ok and isinstance(info.body, dict):
        _check_info(info.body, needs)


def _check_model(served: list[str], model: str) -> None:
    if PurePath(model).name not in {PurePath(name).name for name in served}:
        warnings.warn(
            f"the vLLM server serves {', '.join(sorted(set(served)))}, and the model that is trained is {model}: an "
            "adapter is of use on its own base model only",
            stacklevel=2,
        )


def _check_info(info: dict[str, Any], needs: ServerNeeds) -> None:
    if (info.get("vllm_env") or {}).get(RUNTIME_UPDATES) is False:
        raise needs.refuse(f"the vLLM server does not load adapters at run time: {RUNTIME_UPDATES} is not set there")
    config = info.get("vllm_config")
    if not isinstance(config, dict) or "lora_config" not in config:
        return
    lora = config["lora_config"]
    if not lora:
        raise needs.refuse("the vLLM server runs without --enable-lora")
    for flag, needed in (("max_lora_rank", needs.rank), ("max_loras", needs.max_loras)):
        if lora.get(flag, needed) < needed:
            raise needs.refuse(f"the vLLM server has --{flag.replace('_', '-')} {lora[flag]}, and {needed} is needed")


def refuse_load(reply: Reply, needs: ServerNeeds, path: str) -> Exception:
    """The error for a refused ``/v1/load_lora_adapter``."""
    message = reply.message
    if isinstance(reply.body, dict) and reply.body.get("detail") == "Not Found":  # there is no such route
        return needs.refuse(f"the vLLM server does not load adapters at run time: {RUNTIME_UPDATES} is not set there")
    if "not enabled" in message.lower():
        return needs.refuse("the vLLM server runs without --enable-lora")
    if "max_lora_rank" in message:
        return needs.refuse(f"the adapter has rank {needs.rank}: {message}")
    if reply.status == 404 or "no adapter found" in message.lower():
        return ConfigError(
            f"the vLLM server does not find {path}: {message}. It reads adapters from the disk: run it where "
            "output_dir is, or put output_dir on storage that both see under the same path"
        )
    if reply.status < 500 or "target modules" in message:
        return needs.refuse(f"the vLLM server refuses the adapter in {path}: {message}")
    return BackendError(f"the vLLM server did not load {path}: {message}")


def check_log_probs(client: VllmHttp, needs: ServerNeeds, model: str) -> None:
    """Ask whether log-probabilities are those that tokens are drawn with, where the sampling makes a difference.

    With top-k of 1 a token has probability 1 in the distribution that it is drawn from, and less in the model's.

    Raises:
        ConfigError: they are the model's own.
    """
    if _is_plain(needs.sampling):
        return
    body = {"model": model, "prompt": [0, 0], "max_tokens": 4, "top_k": 1, "temperature": 1.0, "logprobs": 0}
    reply = client.post("/v1/completions", body)
    if not reply.ok:
        raise BackendError(f"{client.base_url}/v1/completions answered {reply.status}: {reply.message}")
    if min(reply.body["choices"][0]["logprobs"]["token_logprobs"]) < -1e-3:
        raise needs.refuse(
            "the vLLM server gives log-probabilities from before temperature, top-k, top-p, min-p and penalties, and "
            "this run uses them"
        )


def _is_plain(sampling: Sampling) -> bool:
    """Whether tokens are drawn from the model's own distribution."""
    shaped = sampling.top_p < 1 or sampling.top_k > 0 or bool(sampling.min_p) or sampling.repetition_penalty != 1
    return sampling.temperature == 1 and not shaped
