"""Files are there together or not at all, also where something fails while they are moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from setar_peft.writing import whole_files


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_files_are_replaced_added_and_removed(tmp_path: Path) -> None:
    for name in ("a", "b", "old.bin", "mine.txt"):
        (tmp_path / name).write_text("before")
    with whole_files(tmp_path, ["old.*", "a", "none"]) as unfinished:
        (unfinished / "a").write_text("after")
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "c").write_text("new")
        assert contents(tmp_path)["a"] == "before"
    assert contents(tmp_path) == {"a": "after", "b": "before", "mine.txt": "before", "sub/c": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "mine.txt", "sub"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_nothing_is_there(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")

    def half_written(folder: Path) -> None:
        with whole_files(folder, ["a"]) as unfinished:
            (unfinished / "b").write_text("half")
            raise error

    for folder in (tmp_path, tmp_path / "new" / "deep"):
        with pytest.raises(error):
            half_written(folder)
    assert contents(tmp_path) == {"a": "before"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("fails_at", range(6))
def test_an_error_while_moving_is_taken_back(fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "stale"):
        (tmp_path / name).write_text("before")
    calls = 0
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)

    def written() -> None:
        with whole_files(tmp_path, ["stale"]) as unfinished:
            for name in ("a", "b", "c"):
                (unfinished / name).write_text("after")

    with pytest.raises(OSError, match="the disk is gone"):
        written()
    assert contents(tmp_path) == {"a": "before", "b": "before", "stale": "before"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "stale"]


def test_a_file_in_the_folder_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(ValueError, match="a is a file; give the name of a folder"), whole_files(tmp_path / "a"):
        pass
