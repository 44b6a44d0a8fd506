"""The rollout backends that come with the package, registered through the hook that third parties use."""

from __future__ import annotations

from collections.abc import Sequence

from trl_moe_ext.grpo.backends.protocol import BackendContext, RegisteredBackend, RolloutBackend
from trl_moe_ext.hookspecs import hookimpl


def _local(context: BackendContext) -> RolloutBackend:
    from trl_moe_ext.grpo.backends.local.backend import LocalBackend

    return LocalBackend(context)


def _vllm(context: BackendContext) -> RolloutBackend:
    from trl_moe_ext.grpo.backends.vllm.backend import VllmBackend

    return VllmBackend(context)


@hookimpl
def register_rollout_backends() -> Sequence[RegisteredBackend]:
    """A process of its own, and a vLLM server."""
    return (
        RegisteredBackend(
            "local", "a process of its own, generating with transformers on a CPU or GPU", _local, records_routes=True
        ),
        RegisteredBackend("vllm", "a vLLM server, given the adapter by /v1/load_lora_adapter", _vllm),
    )
