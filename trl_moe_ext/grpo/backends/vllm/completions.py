"""One completion as vLLM's `/v1/completions` is asked for it, and as it answers."""

from __future__ import annotations

from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.errors import BackendDeadError, BackendError, BackendOutOfMemoryError
from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest, Sampling, Segment
from trl_moe_ext.grpo.backends.vllm.http import Reply, VllmHttp

__all__ = ["complete", "completion_body"]


def complete(client: VllmHttp, model: str, version: int, request: GenerationRequest, sampling: Sampling) -> Generation:
    """Ask for a completion by the adapter `model`, and wait for it.

    Raises:
        BackendError: the server can't go on, or answered something else.
        ConfigError: it will never answer this request, such as for a prompt that is too long.
    """
    reply = client.post("/v1/completions", completion_body(model, request, sampling))
    if not reply.ok:
        raise _failure(reply, model, request)
    try:
        choice = reply.body["choices"][0]
        token_ids = tuple(int(token) for token in choice["token_ids"])
        log_probs = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"the vLLM server answered without token_ids or logprobs ({error!r}): return_token_ids needs vLLM 0.11 or "
            "newer"
        ) from error
    if not token_ids or len(token_ids) != len(log_probs):
        raise BackendError(f"request {request.id}: {len(token_ids)} tokens with {len(log_probs)} log-probabilities")
    return Generation(request.id, token_ids, log_probs, (Segment(version, len(token_ids)),))


def completion_body(model: str, request: GenerationRequest, sampling: Sampling) -> dict[str, Any]:
    """Everything that shapes the distribution is said: a server has defaults of its own."""
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": sampling.max_completion_length,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.eos_token_ids),
        "seed": request.seed,
        "logprobs": 0,  # of the token that was drawn, and of no others
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def _failure(reply: Reply, model: str, request: GenerationRequest) -> Exception:
    if reply.status == 404:
        return BackendDeadError(f"the vLLM server knows {model} no more, as one that was restarted: {reply.message}")
    if reply.status < 500:
        return ConfigError(
            f"the vLLM server refuses a request with {len(request.prompt_ids)} tokens of prompt: {reply.message}"
        )
    error = BackendOutOfMemoryError if "out of memory" in reply.message.lower() else BackendDeadError
    return error(f"the vLLM server failed at a completion: {reply.message}")
