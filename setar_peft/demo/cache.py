"""A folder of things that take a while to make, each written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root(cache: str | Path | None = None) -> Path:
    """The folder that the package keeps its files in: `cache`, or `setar_peft` in the user's cache folder.

    The user's cache folder is `XDG_CACHE_HOME` where that is set, else `~/.cache`.
    """
    if cache is not None:
        return Path(cache)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "setar_peft"


def cached_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """A folder that is made once: filled under another name, and renamed when it is complete.

    Args:
        folder: The folder. If it exists, it is complete.
        write: Fills an empty folder; only called if `folder` does not exist.

    Returns:
        `folder`.

    Raises:
        ValueError: If the folder cannot be created.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"No folder can be made in {folder.parent} ({error}); name another with --cache.") from error
    try:
        write(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was as quick; its folder is as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
