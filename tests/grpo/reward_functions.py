"""Reward functions that another process can import."""

from __future__ import annotations

import os
import time


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def hang(completions, **kwargs):
    if "hang" in completions:
        time.sleep(3600)
    return [1.0] * len(completions)


def raise_for_bad(completions, **kwargs):
    if "bad" in completions:
        raise ValueError("that is bad")
    return [1.0] * len(completions)


def die(completions, **kwargs):
    os._exit(7)


def process_id(completions, **kwargs):
    return [float(os.getpid())] * len(completions)
