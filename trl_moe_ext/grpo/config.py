"""The options of an async GRPO run: TRL's, with those of the generator, the rewards and the correction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl_moe_ext.grpo.config_checks import check_config
from trl_moe_ext.grpo.loss.importance import ImportanceCorrection
from trl_moe_ext.grpo.trl_async import AsyncGRPOConfig

__all__ = ["AsyncMoeGRPOConfig"]


@dataclass
class AsyncMoeGRPOConfig(AsyncGRPOConfig):  # type: ignore[misc]
    """Options of `AsyncMoeGRPOTrainer`; all of TRL's `AsyncGRPOConfig`, and the following.

    Raises:
        ConfigError: an option is unknown, out of its range or without effect.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *AsyncGRPOConfig._VALID_DICT_FIELDS,
        "transformers_continuous_batching_config",
    ]

    token_budget: int | None = field(
        default=-1,
        metadata={
            "help": "Largest number of tokens in one forward of the trainer, which then ends at it or at "
            "per_device_train_batch_size samples, whichever comes first; -1 for no limit.",
        },
    )
    heartbeat_stale_after_s: float = field(
        default=120.0,
        metadata={
            "help": "Seconds without a sign of life after which a generator that has work is taken for hung and "
            "restarted.",
        },
    )

    # The generator
    rollout_backend: str = field(
        default="local",
        metadata={
            "help": "Where completions come from: 'local' (a process of its own), 'vllm' (a server), or that of "
            "a plug-in.",
        },
    )
    rollout_device: str = field(
        default="auto",
        metadata={
            "help": "Device of the local generator, such as 'cuda:1' or 'cpu'. 'auto' takes the first GPU that "
            "no rank of the trainer uses, else the one of the trainer.",
        },
    )
    rollout_num_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of a local generator on a CPU; the trainer takes the other cores. By default half "
            "of the cores.",
        },
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of transformers' ContinuousBatchingConfig for the local generator. By default a "
            "cache that holds what max_inflight_tasks completions of full length need.",
        },
    )
    max_rollout_restarts: int = field(
        default=5,
        metadata={
            "help": "Restarts of the generator in a row, without a completion in between, after which the run "
            "gives up.",
        },
    )

    # Rewards
    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weight of each reward function; 1 by default.",
        },
    )
    reward_timeout_s: float = field(
        default=60.0,
        metadata={
            "help": "Seconds that one call of a reward function may take; then its completions have no reward of it.",
        },
    )
    reward_concurrency: int = field(
        default=8,
        metadata={
            "help": "Calls of reward functions that run at the same time.",
        },
    )
    reward_pool: str = field(
        default="thread",
        metadata={
            "help": "What reward functions run in. 'thread': of the trainer's process, for any callable. "
            "'process': for functions that compute for long or may have to be killed; they must be "
            "importable.",
            "choices": ["thread", "process"],
        },
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={
            "help": "Leave out groups whose completions all have the same reward: nothing is learned from them.",
        },
    )

    # The loss
    importance_correction: str = field(
        default="tis",
        metadata={
            "help": "How tokens are weighted that another policy drew than the one that is trained. 'tis': their "
            "ratio, truncated. 'mis': their ratio, and tokens out of its range are left out. 'none': "
            "TRL's loss, with PPO's clipping.",
            "choices": ["tis", "mis", "none"],
        },
    )
    importance_level: str = field(
        default="token",
        metadata={
            "help": "What a ratio is of: each 'token', a whole 'sequence', or 'geometric': the mean of a sequence.",
            "choices": ["token", "sequence", "geometric"],
        },
    )
    importance_cap: float = field(
        default=3.0,
        metadata={
            "help": "Largest ratio: larger ones are truncated ('tis') or left out ('mis').",
        },
    )
    importance_floor: float = field(
        default=0.0,
        metadata={
            "help": "Smallest ratio that 'mis' does not leave out.",
        },
    )
    routing_replay: bool = field(
        default=False,
        metadata={
            "help": "Send each token to the experts that the generator sent it to (R3, arXiv 2510.11370).",
        },
    )

    # vLLM
    vllm_api_key: str | None = field(
        default=None,
        metadata={
            "help": "API key of the vLLM server. Without it, the environment variable VLLM_API_KEY is read.",
        },
    )
    start_vllm: bool = field(
        default=False,
        metadata={
            "help": "Start the vLLM server, on this machine, and stop it at the end of the run.",
        },
    )
    vllm_server_args: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the vLLM server that start_vllm starts, such as '--enforce-eager'. "
            "One word may hold several, separated by spaces.",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self)

    @property
    def correction(self) -> ImportanceCorrection | None:
        """The correction that the options ask for; None for TRL's own loss."""
        if self.importance_correction == "none":
            return None
        return ImportanceCorrection(
            level=self.importance_level,  # type: ignore[arg-type]
            mode=self.importance_correction,  # type: ignore[arg-type]
            cap=self.importance_cap,
            floor=self.importance_floor,
        )
