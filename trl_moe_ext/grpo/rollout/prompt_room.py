"""How long a prompt may be, for its completion to fit beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

__all__ = ["room_for_prompts"]


def room_for_prompts(
    args: AsyncMoeGRPOConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> int | None:
    """Tokens that a prompt may have; None for any number.

    Args:
        max_length: tokens of prompt and completion that the model can take, None if nobody knows.

    Raises:
        ConfigError: completions leave no room at all.
    """
    # transformers gives a tokenizer without a limit one of 1e30.
    limits = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < 1e12 else []
    limits += [max_length] if max_length is not None else []
    limits += [args.token_budget] if args.token_budget is not None and args.token_budget > 0 else []
    if not limits:
        return None
    room: int = min(limits) - args.max_completion_length
    if room < 1:
        raise ConfigError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt within {min(limits)} "
            "tokens, the least of what the model, its tokenizer and token_budget allow; lower it"
        )
    return room
