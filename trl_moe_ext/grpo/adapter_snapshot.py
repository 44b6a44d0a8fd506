"""The adapter at one moment: the only weights that travel from the trainer to a generator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trl_moe_ext.errors import MoeExtError

__all__ = ["AdapterSnapshot"]


@dataclass(frozen=True, eq=False)
class AdapterSnapshot:
    """The weights of one version, apart from those that go on being trained.

    Attributes:
        version: 0 for the untrained adapter; each sync has the next.
        tensors: as `peft.get_peft_model_state_dict` names them, on the CPU, in the dtype that they are trained in.
    """

    version: int
    tensors: Mapping[str, Tensor]

    @cached_property
    def payload(self) -> bytes:
        """The tensors in the format of safetensors."""
        data: bytes = save({name: tensor.contiguous() for name, tensor in self.tensors.items()})
        return data

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the payload, in hexadecimal digits."""
        return hashlib.sha256(self.payload).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return len(self.payload)

    @classmethod
    def from_payload(cls, version: int, payload: bytes, checksum: str) -> AdapterSnapshot:
        """What was sent, verified.

        Raises:
            MoeExtError: the bytes are not those that were sent.
        """
        found = hashlib.sha256(payload).hexdigest()
        if found != checksum:
            raise MoeExtError(
                f"version {version} of the adapter arrived damaged: {len(payload)} bytes with checksum {found[:12]}, "
                f"sent with {checksum[:12]}. Send it again"
            )
        try:
            return cls(version, load(payload))
        except SafetensorError as error:
            raise MoeExtError(f"version {version} of the adapter can't be read: {error}") from error
