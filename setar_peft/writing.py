"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, whose file takes its place when the block ends without an error, and is removed otherwise.

    Args:
        path: The file, which is replaced if it is there.

    Raises:
        ValueError: If its folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(
            f"There is no folder {target.parent} to write {target.name} to; make it, or give another path."
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
