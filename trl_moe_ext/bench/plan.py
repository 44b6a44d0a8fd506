"""What is asked for, as a whole and of one process."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["experts", "layer", "step"]

# Random, but the same for every peer: with more tokens the float64 reference would be what takes the time.
ACCURACY_TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """What one process does.

    Attributes:
        kind: ``experts`` alone, one decoder ``layer``, or a training ``step`` of a checkpoint.
        source: name of a shape, or for a step the directory of the checkpoint.
        peer: how the model is adapted.
        tokens: of each step, in one sequence.
        dtype: of the weights, a name in torch.
        rank: of all low-rank factors.
        steps: how many steps are timed, after those that warm up.
        device: ``cpu`` or a CUDA device.
        gradient_checkpointing: of a step.
    """

    kind: Kind
    source: str
    peer: str
    tokens: int
    dtype: str
    rank: int
    steps: int
    device: str
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Request:
    """What the user asks for; attributes are those of `Plan`, and `rounds`, how often each peer gets a new process."""

    kind: Kind
    source: str
    peers: tuple[str, ...]
    tokens: tuple[int, ...]
    dtype: str
    rank: int
    rounds: int
    steps: int
    device: str
    gradient_checkpointing: bool = False

    def plan(self, peer: str, tokens: int) -> Plan:
        """What one process does for one peer and number of tokens."""
        return Plan(
            self.kind,
            self.source,
            peer,
            tokens,
            self.dtype,
            self.rank,
            self.steps,
            self.device,
            self.gradient_checkpointing,
        )

    @property
    def command(self) -> str:
        """The command line that asks for the same, every option in it."""
        source = [self.source] if self.kind == "step" else ["--shape", self.source]
        checkpointing = f"--{'' if self.gradient_checkpointing else 'no-'}gradient_checkpointing"
        return shlex.join(
            [
                *("trl-moe", "bench", self.kind, *source),
                *("--tokens", _listed(self.tokens), "--dtype", self.dtype, "--rank", str(self.rank)),
                *("--peers", _listed(self.peers), "--rounds", str(self.rounds), "--steps", str(self.steps)),
                *("--device", self.device, *([checkpointing] if self.kind == "step" else [])),
            ]
        )


def _listed(values: Iterable[object]) -> str:
    return ",".join(map(str, values))
