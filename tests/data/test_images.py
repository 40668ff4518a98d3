"""Images from folders, data sets, sequences and tensors: the same batches from each; a sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.data.folders import class_names_of, read_folder
from setar_peft.data.images import ImageSource

NAMES = ["cat", "dog", "frog"]
SIDE = 16


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Two pictures a class, of other sizes than the model's, one of them grey and one with transparency."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    return [pictures[0].convert("L"), pictures[1].convert("RGBA"), *pictures[2:]]


LABELS = [0, 0, 1, 1, 2, 2]


@pytest.fixture
def folder(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    """One subfolder a class, with a file beside the images that is none."""
    for index, (picture, label) in enumerate(zip(pictures, LABELS, strict=True)):
        place = tmp_path / "images" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{index}.png")
        (place / "notes.txt").write_text("no image")
    return tmp_path / "images"


def whole(source: ImageSource) -> tuple[Tensor, Tensor]:
    """All pixel values and labels of a source."""
    batches = list(source.batches())
    return torch.cat([pixels for pixels, _ in batches]), torch.cat([labels for _, labels in batches])


def expected(processor: Any, pictures: list[Image.Image]) -> Tensor:
    """What the processor itself makes of the pictures, one by one."""
    return torch.cat(
        [torch.as_tensor(processor([p.convert("RGB")], return_tensors="pt")["pixel_values"]) for p in pictures]
    )


def test_every_kind_of_source_gives_the_same_batches(processor: Any, pictures: list[Image.Image], folder: Path) -> None:
    pixels = expected(processor, pictures)
    table = datasets.Dataset.from_dict(
        {"id": range(6), "image": pictures, "label": LABELS},
        features=datasets.Features(
            {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
        ),
    )
    renamed = table.rename_columns({"image": "photograph", "label": "kind"})
    sources = [
        ImageSource(processor, folder, class_names=NAMES, batch_size=4),
        ImageSource(processor, str(folder), class_names=["x", "y", "z"], batch_size=4),
        ImageSource(processor, pictures, LABELS, class_names=NAMES, batch_size=4),
        ImageSource(processor, table, class_names=NAMES, batch_size=4),
        ImageSource(
            processor, renamed, class_names=NAMES, batch_size=4, image_column="photograph", label_column="kind"
        ),
        ImageSource(None, pixels, np.array(LABELS), class_names=NAMES, batch_size=4),
    ]
    for source in sources:
        assert len(source) == 6
        assert [len(labels) for _, labels in source.batches()] == [4, 2]
        found, labels = whole(source)
        assert torch.equal(found, pixels)
        assert labels.tolist() == LABELS
        # Again, in the same order: a search goes over its images more than once.
        assert torch.equal(whole(source)[0], pixels)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_shards_together_are_the_whole(processor: Any, pictures: list[Image.Image], folder: Path, count: int) -> None:
    table = read_folder(folder, NAMES)
    for source in (
        ImageSource(processor, table, class_names=NAMES),
        ImageSource(None, expected(processor, pictures), LABELS, class_names=NAMES),
    ):
        shards = [source.shard(index, count) for index in range(count)]
        assert sorted(map(len, shards)) == sorted(6 // count + (index < 6 % count) for index in range(count))
        for index, shard in enumerate(shards):
            assert shard.labels.tolist() == LABELS[index::count]
            if len(shard):
                assert torch.equal(whole(shard)[0], whole(source)[0][index::count])


def test_images_without_classes_may_lie_anywhere(folder: Path, processor: Any) -> None:
    source = ImageSource(processor, folder)
    assert len(source) == 6
    assert whole(source)[1].tolist() == [-1] * 6


def test_class_names_come_from_a_file_or_the_subfolders(folder: Path, tmp_path: Path) -> None:
    assert class_names_of(folder, None) == NAMES
    file = tmp_path / "names.json"
    file.write_text(json.dumps(["a", "b", "c"]))
    assert class_names_of(folder, file) == ["a", "b", "c"]
    for content, pieces in {"[1]": "holds no list of names", "{": "cannot be read as JSON"}.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=pieces):
            class_names_of(folder, file)
    with pytest.raises(ValueError, match="one subfolder of images a class"):
        class_names_of(tmp_path / "nowhere", None)


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        ({"labels": None}, "no labels; give labels"),
        ({"labels": [0, 1]}, r"labels has shape \(2,\).* for 6 images"),
        ({"labels": [0.0] * 6}, r"dtype torch.float32 for 6 images"),
        ({"labels": [0, 0, 1, 1, 2, 3]}, r"labels holds 3, but there are 3 classes \(0 to 2\)"),
        ({"labels": [0, 0, 1, 1, 2, -1]}, "labels holds -1"),
        ({"batch_size": 0}, "batch_size is 0; give an integer of 1 or more"),
        ({"dataset": torch.zeros(6, 3, 4, 4, dtype=torch.uint8)}, "dtype torch.uint8; give processed pixel values"),
        ({"dataset": torch.zeros(3, 4, 4)}, r"shape \(3, 4, 4\)"),
        ({"dataset": [], "labels": []}, "no images in the data set"),
        ({"processor": None}, "processor is a NoneType, which cannot process images"),
    ],
)
def test_wrong_input_gets_a_sentence(
    processor: Any, pictures: list[Image.Image], change: dict[str, Any], pieces: str
) -> None:
    settings = {"processor": processor, "dataset": pictures, "labels": LABELS, "class_names": NAMES, **change}
    with pytest.raises(ValueError, match=pieces):
        ImageSource(**settings)


def test_folders_that_do_not_fit_get_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 subfolders for 2 classes; frog fit no class name"):
        read_folder(folder, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"subfolders for 3 classes; frog fit no class name"):
        read_folder(folder, ["cat", "dog", "bird"])
    with pytest.raises(ValueError, match="is no folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no images \(.bmp, "):
        read_folder(tmp_path / "empty")
    table = datasets.Dataset.from_dict({"a": [1], "b": [2]})
    with pytest.raises(ValueError, match="columns a, b; say with image_column which holds the images"):
        ImageSource(CLIPImageProcessorPil(), table)
