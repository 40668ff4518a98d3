"""Python in two gloo processes, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Said(NamedTuple):
    """What a process wrote to its standard streams."""

    output: str
    errors: str


def in_two_processes(arguments: Callable[[int], Sequence[str]]) -> list[Said]:
    """Run Python twice at once, as ranks 0 and 1 of one group, and return what each process said.

    Args:
        arguments: `rank -> arguments` of the interpreter.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments(rank)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [Said(*process.communicate(timeout=120)) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return said
