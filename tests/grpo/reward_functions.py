"""Reward functions that another process can import."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor


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


def sandbox(completions, pid_file, **kwargs):
    """Runs what never ends, and leaves word of which process that is."""
    process = subprocess.Popen(["sleep", "3600"])
    with open(pid_file[0], "w", encoding="utf-8") as file:
        file.write(str(process.pid))
    process.wait()


def in_processes(completions, **kwargs):
    with ProcessPoolExecutor(1) as pool:
        return list(pool.map(float, range(len(completions))))


_ONE_AT_A_TIME = asyncio.Semaphore(1)


async def limited(completions, **kwargs):
    """Shares what belongs to an event loop from its first use on."""
    async with _ONE_AT_A_TIME:
        await asyncio.sleep(0.05)
    return [1.0] * len(completions)
