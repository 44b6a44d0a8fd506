"""A routing record as bytes, to travel between processes and machines.

A CRC-32 of all that follows, 4 bytes, little-endian; then the tensors in the format of safetensors, each under the
label of its router and the number of its experts: ``3/128``.
"""

from __future__ import annotations

import zlib

from safetensors import SafetensorError
from safetensors.torch import load, save

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.router.record import RoutingRecord

__all__ = ["record_from_bytes", "record_to_bytes"]

_CHECKSUM = 4


def record_to_bytes(record: RoutingRecord) -> bytes:
    """The record, whatever device it is on."""
    tensors = {
        f"{label}/{record.num_experts[label]}": index.cpu().contiguous() for label, index in record.experts.items()
    }
    payload: bytes = save(tensors)
    return zlib.crc32(payload).to_bytes(_CHECKSUM, "little") + payload


def record_from_bytes(data: bytes) -> RoutingRecord:
    """What `record_to_bytes` was given, on the CPU.

    Raises:
        MoeExtError: the bytes were damaged on their way, or are no record.
    """
    checksum, payload = data[:_CHECKSUM], data[_CHECKSUM:]
    if zlib.crc32(payload).to_bytes(_CHECKSUM, "little") != checksum:
        raise MoeExtError(f"a routing record of {len(data)} bytes is damaged: its checksum is wrong. Send it again")
    try:
        tensors = load(payload)
        sizes = {name: int(name.rpartition("/")[2]) for name in tensors}
        labels = {name: name.rpartition("/")[0] for name in tensors}
        return RoutingRecord.of({labels[n]: tensors[n] for n in tensors}, {labels[n]: sizes[n] for n in tensors})
    except (SafetensorError, ValueError) as error:
        raise MoeExtError(
            f"{len(data)} bytes are no routing record ({error}); both ends should run the same version"
        ) from error
