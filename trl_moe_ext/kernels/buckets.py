"""Row counts that a CPU's bfloat16 products are rounded up to."""

from __future__ import annotations

# oneDNN compiles one primitive for each new (rows, in, out) in bfloat16, and routing makes new row counts in every
# step: its cache of 1024 thrashes and time goes to compiling. So row counts are rounded up to these, then to steps.
_BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_STEP = 16


def rounded(rows: int) -> int:
    """The bucket that holds `rows` rows; at most 15 more."""
    return next((size for size in _BUCKETS if size >= rows), -(-rows // _STEP) * _STEP)


def coarsely_rounded(rows: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that holds `rows` rows: fewer than half of them more."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power
