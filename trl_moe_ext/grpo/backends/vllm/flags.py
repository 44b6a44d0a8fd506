"""The command line of a vLLM server that serves versions of an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from trl_moe_ext.errors import ConfigError

__all__ = ["HOST", "RUNTIME_UPDATES", "ServerOptions", "allowed_rank", "lora_flags", "server_command"]

HOST = "127.0.0.1"  # what a server of ours listens on
RUNTIME_UPDATES = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # environment variable that opens /v1/load_lora_adapter
# vLLM 0.32, `MaxLoRARanks` of config/lora.py.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def allowed_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that holds `rank`.

    Raises:
        ConfigError: there is none.
    """
    for allowed in _RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(f"an adapter of rank {rank} is too large for vLLM, which takes ranks up to {_RANKS[-1]}")


@dataclass(frozen=True)
class ServerOptions:
    """What the command line of a server depends on.

    Attributes:
        rank: of the adapter.
        max_loras: versions of the adapter that are in use at the same time.
        has_experts: whether it adapts routed experts.
        dtype: that the trainer computes in, as vLLM spells it; None for that of the checkpoint.
        extra: further arguments, which win over the others.
    """

    model: str
    port: int
    rank: int
    max_loras: int
    has_experts: bool
    dtype: str | None = None
    extra: tuple[str, ...] = ()


def server_command(options: ServerOptions) -> list[str]:
    """The arguments of `python` that start such a server."""
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    command += ["--host", HOST, "--port", str(options.port)]
    command += [*lora_flags(options.rank, options.max_loras, options.has_experts)]
    # Sampling is what a request says, and nothing from the checkpoint's generation_config.json.
    command += ["--generation-config", "vllm"]
    if options.dtype is not None:
        command += ["--dtype", options.dtype]
    return [*command, *options.extra]


def lora_flags(rank: int, max_loras: int, has_experts: bool) -> list[str]:
    """The flags that a server needs for our adapters, whoever starts it."""
    flags = ["--enable-lora", "--max-lora-rank", str(allowed_rank(rank)), "--max-loras", str(max_loras)]
    if has_experts:  # models whose experts vLLM keeps stacked then take files with a pair for each expert too
        flags += ["--enable-mixed-moe-lora-format"]
    # Log-probabilities of the distribution that tokens are drawn from: after temperature, top-k and the like.
    return [*flags, "--logprobs-mode", "processed_logprobs"]
