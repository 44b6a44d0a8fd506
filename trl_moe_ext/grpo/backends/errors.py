"""What a rollout backend raises when it can't go on."""

from __future__ import annotations

from trl_moe_ext.errors import MoeExtError

__all__ = ["BackendDeadError", "BackendError", "BackendHungError", "BackendOutOfMemoryError"]


class BackendError(MoeExtError):
    """The backend can't go on; its caller may start it again."""


class BackendDeadError(BackendError):
    """The process or the server is gone."""


class BackendHungError(BackendError):
    """It is there, has work, and has not been heard of for too long."""


class BackendOutOfMemoryError(BackendError):
    """It ran out of memory; asked for less at a time it may go on."""
