"""Folders: what is a class, what is an image, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.data.folders import class_names_of, read_folder
from setar_peft.data.images import ImageSource


def fill(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (4, 4)).save(path)
        else:
            path.write_bytes(b"no image")
    return root


def test_images_are_read_in_sorted_order(tmp_path: Path) -> None:
    folder = fill(tmp_path, "cat/b.png", "cat/a.png", "cat/more/c.png", "dog/a.png")
    files = read_folder(folder, labelled=True)
    assert [str(path.relative_to(folder)) for path in files.paths] == [
        "cat/a.png",
        "cat/b.png",
        "cat/more/c.png",
        "dog/a.png",
    ]
    assert files.labels == ["cat", "cat", "cat", "dog"]
    assert files.of([3, 0]) == ([files.paths[3], files.paths[0]], ["dog", "cat"])
    assert read_folder(folder, labelled=False) == (files.paths, None)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    folder = fill(
        tmp_path,
        *("cat/a.png", "dog/a.png", ".git/x.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", ".DS_Store"),
        *("cat/.ipynb_checkpoints/a.png", "cat/._a.png", "cat/labels.txt", "README"),
    )
    assert class_names_of(folder, None).names == ("cat", "dog")
    assert read_folder(folder, labelled=True).labels == ["cat", "dog"]
    assert len(read_folder(folder, labelled=False).paths) == 2


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = fill(tmp_path, "cat/a.png", "cat/b.heic", "cat/c.HEIC", "dog/a.png", "dog/d.avif")
    with pytest.warns(
        UserWarning, match=r"not read as images and are left out: 1 \.avif, 2 \.heic \(the first is .*b.heic"
    ):
        assert len(read_folder(folder, labelled=True).paths) == 2
    with pytest.warns(UserWarning, match=r"2 \.heic"):
        read_folder(folder, labelled=False)
    loose = fill(tmp_path / "loose", "cat/a.png", "dog/a.png", "x.png", "y.heic", "notes.txt")
    with pytest.warns(
        UserWarning, match=r"2 images in .*loose lie in no class folder and are left out: x\.png, y\.heic"
    ):
        assert len(read_folder(loose, labelled=True).paths) == 2


def test_an_image_without_a_suffix_is_said_to_be_left_out(tmp_path: Path) -> None:
    folder = fill(tmp_path, "cat/a.png", "dog/a.png", "cat/README", "LICENSE")
    assert len(read_folder(folder, labelled=True).paths) == 2
    Image.new("RGB", (2, 2)).save(folder / "dog" / "0a1b2c", "png")
    with pytest.warns(UserWarning, match=r"left out: 1 without a suffix \(the first is .*0a1b2c\)"):
        assert len(read_folder(folder, labelled=True).paths) == 2


def test_links_are_followed_and_loops_are_said(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "cat/a.png")
    elsewhere = fill(tmp_path / "elsewhere", "b.png")
    (folder / "dog").symlink_to(elsewhere)
    assert read_folder(folder, labelled=True).labels == ["cat", "dog"]
    (folder / "cat" / "again").symlink_to(folder)
    (folder / "cat" / "broken.png").symlink_to(folder / "cat" / "broken.png")
    with pytest.warns(UserWarning, match=r"left out: 1 \.png, 1 folder that is a loop"):
        assert read_folder(folder, labelled=False).paths[0].name == "a.png"


def test_folders_that_do_not_fit_get_a_sentence(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "cat/a.png", "dog/a.png")
    with pytest.raises(ValueError, match="nowhere is no folder"):
        read_folder(tmp_path / "nowhere", labelled=False)
    with pytest.raises(ValueError, match="has no class folders; give the folder that has one subfolder of images a cl"):
        read_folder(folder / "cat", labelled=True)
    (folder / "frog").mkdir()
    (folder / "bird").mkdir()
    with pytest.raises(ValueError, match=r"the class folders bird, frog hold no images \(.bmp, .*Fill them, or take"):
        read_folder(folder, labelled=True)
    with pytest.raises(ValueError, match=r"frog holds no images \(.bmp, "):
        read_folder(folder / "frog", labelled=False)


@pytest.mark.parametrize(
    ("folders", "names", "labels"),
    [
        (["cat", "dog", "fish"], ["Cat", "Fish", "Dog"], [0, 2, 1]),
        (["red_car", "tree-frog"], ["tree frog", "red car"], [1, 0]),
        (["0", "1", "10", "2"], ["0", "1", "2", "10"], [0, 1, 3, 2]),
        (["n1", "n2"], {"n2": "tench", "n1": "shark"}, [1, 0]),
        (["a", "b"], ["c", "b", "a"], [2, 1]),
    ],
)
def test_class_folders_are_matched_by_name(
    tmp_path: Path, folders: list[str], names: list[str] | dict[str, str], labels: list[int]
) -> None:
    root = fill(tmp_path, *(f"{name}/a.png" for name in folders))
    source = ImageSource(CLIPImageProcessorPil(), root, class_names=names)
    assert source.labels.tolist() == labels
    in_order = list(names.values()) if isinstance(names, dict) else names
    assert source.matched == {name: in_order[label] for name, label in zip(folders, labels, strict=True)}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["n01440764", "n01443537"], ["goldfish", "tench"]),
        (["0", "1"], ["cat", "dog"]),
        (["cat", "dog", "frog"], ["cat", "dog"]),
        (["cat", "dog"], ["cat", "bird"]),
    ],
)
def test_nothing_is_matched_by_position(tmp_path: Path, folders: list[str], names: list[str]) -> None:
    root = fill(tmp_path, *(f"{name}/a.png" for name in folders))
    with pytest.raises(ValueError, match=r"The folders of .* do not match the class names") as error:
        ImageSource(CLIPImageProcessorPil(), root, class_names=names)
    assert ", ".join(folders) in str(error.value)
    assert ", ".join(names) in str(error.value)


def test_class_names_come_from_a_file_the_model_or_the_subfolders(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", *(f"{number}/a.png" for number in range(12)))
    assert class_names_of(folder, None).names == tuple(map(str, range(12)))
    named = fill(tmp_path / "named", "golden_retriever/a.png", "T-shirt/a.png")
    assert class_names_of(named, None).names == ("T-shirt", "golden retriever")
    file = tmp_path / "names.json"
    file.write_text(json.dumps(["a", "b", "c"]))
    assert class_names_of(folder, file).names == ("a", "b", "c")
    file.write_text(json.dumps({"x": "dog", "y": "cat"}))
    assert class_names_of(folder, file).keys == ("x", "y")
    own = {0: "cat", 1: "Dog"}
    assert class_names_of(folder, None, own).names == ("cat", "Dog")
    assert class_names_of(folder, file, own).keys == ("y", "x")
    file.write_text(json.dumps(["dog", "Cat"]))
    with pytest.warns(
        UserWarning, match=r"names\.json lists the model's classes in another order; they are numbered as"
    ):
        assert class_names_of(folder, file, own).names == ("cat", "Dog")
    file.write_text(json.dumps({"x": "dog", "y": "cat"}))
    unnamed = {0: "LABEL_0", 1: "LABEL_1"}
    assert class_names_of(folder, file, unnamed).names == ("dog", "cat")
    with pytest.raises(ValueError, match=r"does not name its 2 classes \(LABEL_0, .*give --classes, a JSON list"):
        class_names_of(folder, None, unnamed)
    for content, pieces in {
        "[1]": "holds no list of names",
        '{"a": 1}': "holds no list of names",
        "{": "cannot be read as JSON",
        '{"a": "hat", "b": "cat"}': "'hat' fits none",
    }.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=pieces):
            class_names_of(folder, file, own)
    with pytest.raises(ValueError, match="one subfolder of images a class"):
        class_names_of(tmp_path / "nowhere", None)
