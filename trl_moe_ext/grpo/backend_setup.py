"""From the options of a run to the backend that makes its completions."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftConfig

from trl_moe_ext.grpo.backends.generation import Sampling
from trl_moe_ext.grpo.backends.protocol import BackendContext, RolloutBackend
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.plugins import host

__all__ = ["make_backend"]


def make_backend(
    args: AsyncMoeGRPOConfig,
    *,
    model_path: str,
    peft_config: PeftConfig,
    eos_token_ids: Sequence[int],
    pad_token_id: int | None,
) -> RolloutBackend:
    """The backend that `args.rollout_backend` names, which is not started yet.

    Raises:
        ConfigError: it can't be had with these options.
        PluginError: there is none of that name.
    """
    sampling = Sampling(
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        eos_token_ids=tuple(eos_token_ids),
    )
    assert not isinstance(args.model_init_kwargs, str), "parsed by the options themselves"
    # As TRL loads the model that is trained.
    options = {"trust_remote_code": args.trust_remote_code, "dtype": args.dtype, **(args.model_init_kwargs or {})}
    context = BackendContext(
        model_path=model_path,
        model_init_kwargs=options,
        peft_config=peft_config,
        sampling=sampling,
        args=args,
        output_dir=args.output_dir,
        record_routes=args.routing_replay,
        pad_token_id=pad_token_id,
    )
    backend: RolloutBackend = host().lookup("register_rollout_backends", args.rollout_backend).make(context)
    return backend
