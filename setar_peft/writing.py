"""Writing a file, files into a folder, or a new folder so that nobody ever sees half of it."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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


@contextmanager
def whole_files(folder: str | Path, outdated: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write into, whose files go where they belong when the context ends without an error.

    Files of the same names are replaced, and others stay. After an error everything is as it was before, also where it
    came while the files were moved.

    Args:
        folder: Where the files belong; it is made where it is missing.
        outdated: Patterns of files that are no longer true: those that are there and were not written anew are removed.

    Raises:
        ValueError: If there is a file of the folder's name.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the name of a folder to write into.")
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    # Beside what it replaces, so that moving is renaming.
    work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    new, old = work / "new", work / "old"
    new.mkdir()
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        moved.append((source, target))

    try:
        yield new
        names = [path.relative_to(new) for path in sorted(new.rglob("*")) if path.is_file()]
        stale = {path.relative_to(folder) for pattern in outdated for path in folder.glob(pattern) if path.is_file()}
        for name in sorted({*names, *stale}):
            if (folder / name).exists():
                move(folder / name, old / name)
        for name in names:
            move(new / name, folder / name)
    except BaseException:
        for source, target in reversed(moved):
            target.rename(source)
        shutil.rmtree(work, ignore_errors=True)
        for parent in missing:
            parent.rmdir()
        raise
    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end, or vanishes if writing fails.

    Raises:
        ValueError: If `folder` exists and holds files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give a new one, so that no file is overwritten.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    unfinished.mkdir()
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
