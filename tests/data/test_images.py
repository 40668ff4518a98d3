"""Images from folders, data sets, sequences and tensors: the same batches from each; a sentence for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.data.images import ImageSource, picture_of

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


class Pairs(torch.utils.data.Dataset[Any]):
    """A data set as torchvision makes them, with its classes in another order."""

    classes = ("frog", "dog", "cat")

    def __init__(self, pictures: list[Image.Image]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> Any:
        return self.pictures[number], torch.tensor(2 - LABELS[number])


class Named(Pairs):
    classes = None

    def __getitem__(self, number: int) -> Any:
        return {"image": self.pictures[number], "label": NAMES[LABELS[number]]}


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, pictures: list[Image.Image]) -> None:
        self.pictures = pictures

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(self.pictures, LABELS, strict=True))


def iterable(pictures: list[Image.Image]) -> datasets.IterableDataset:
    """A streamed data set that knows nothing of its columns."""

    def rows() -> Iterator[dict[str, Any]]:
        for picture, label in zip(pictures, LABELS, strict=True):
            yield {"img": picture, "labels": NAMES[label]}

    return datasets.IterableDataset.from_generator(rows)


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
    paths = sorted(folder.rglob("*.png"))
    settings: dict[str, Any] = {"class_names": NAMES, "batch_size": 4}
    sources = [
        ImageSource(processor, folder, **settings),
        ImageSource(processor, str(folder), class_names={"frog": "z", "dog": "y", "cat": "x"}, batch_size=4),
        ImageSource(processor, pictures, LABELS, **settings),
        ImageSource(processor, pictures, [NAMES[label] for label in LABELS], **settings),
        ImageSource(processor, paths, LABELS, **settings),
        ImageSource(processor, list(map(str, paths)), LABELS, **settings),
        ImageSource(processor, [np.asarray(picture.convert("RGB")) for picture in pictures], LABELS, **settings),
        ImageSource(processor, table, **settings),
        ImageSource(processor, table.with_format("torch"), **settings),
        ImageSource(processor, table["image"], table["label"], **settings),
        ImageSource(processor, renamed, image_column="photograph", label_column="kind", **settings),
        ImageSource(processor, table.to_iterable_dataset(), **settings),
        ImageSource(processor, iterable(pictures), **settings),
        ImageSource(processor, Pairs(pictures), **settings),
        ImageSource(processor, torch.utils.data.Subset(Pairs(pictures), range(6)), **settings),
        ImageSource(processor, Named(pictures), **settings),
        ImageSource(processor, Stream(pictures), **settings),
        ImageSource(None, pixels, np.array(LABELS), **settings),
    ]
    for source in sources:
        assert len(source) == 6
        assert [len(labels) for _, labels in source.batches()] == [4, 2]
        found, labels = whole(source)
        assert torch.equal(found, pixels)
        mirrored = source.matched.get("frog") == "z"
        assert labels.tolist() == ([2 - label for label in LABELS] if mirrored else LABELS)
        # Again, in the same order: a search goes over its images more than once.
        assert torch.equal(whole(source)[0], pixels)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_shards_together_are_the_whole(processor: Any, pictures: list[Image.Image], folder: Path, count: int) -> None:
    for source in (
        ImageSource(processor, folder, class_names=NAMES, batch_size=2),
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


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        ({"labels": None}, "no labels; give labels"),
        ({"labels": [0, 1]}, "There are 2 labels for 6 inputs"),
        ({"labels": [0.0] * 6}, r"dtype torch.float32 for 6 inputs"),
        ({"labels": [0, 0, 1, 1, 2, 3]}, r"labels holds 3, but there are 3 classes \(0 to 2\)"),
        ({"labels": [0, 0, 1, 1, 2, -1]}, "labels holds -1"),
        ({"batch_size": 0}, "batch_size is 0; give an integer of 1 or more"),
        ({"dataset": torch.zeros(6, 3, 4, 4, dtype=torch.uint8)}, "dtype torch.uint8; give processed pixel values"),
        ({"dataset": torch.zeros(3, 4, 4)}, r"shape \(3, 4, 4\)"),
        ({"dataset": [], "labels": []}, "no images in the data set"),
        ({"labels": ["cat"] * 5 + ["bird"]}, r"The labels do not match the class names: 'bird' fits none"),
        ({"labels": [0, 0, 1, 1, 2, None]}, "1 of 6 inputs have None for a label"),
        ({"class_names": set(NAMES)}, "class_names is a set"),
        ({"dataset": map(str, [])}, "The images are a builtins.map; give a list of them"),
        ({"dataset": 3}, "The images are a builtins.int"),
        ({"processor": None}, "processor is a NoneType, which cannot process images"),
    ],
)
def test_wrong_input_gets_a_sentence(
    processor: Any, pictures: list[Image.Image], change: dict[str, Any], pieces: str
) -> None:
    settings = {"processor": processor, "dataset": pictures, "labels": LABELS, "class_names": NAMES, **change}
    with pytest.raises(ValueError, match=pieces):
        ImageSource(**settings)


def test_data_sets_that_do_not_fit_get_a_sentence(processor: Any, pictures: list[Image.Image], folder: Path) -> None:
    table = datasets.Dataset.from_dict({"image": pictures, "label": LABELS}).cast_column("image", datasets.Image())
    loader: Any = torch.utils.data.DataLoader(Pairs(pictures))
    other = table.cast_column("label", datasets.ClassLabel(names=["cat", "dog", "bird"]))
    cases: dict[str, Any] = {
        r"splits 'train', 'test'; give one of them, such as dataset\['train'\]": datasets.DatasetDict(
            train=table, test=table
        ),
        "DataLoader; give its data set": loader,
        "has a transform .*with_format": table.with_transform(lambda rows: rows),
        "columns a, b, but no image, label; say with image_column and label_column": datasets.Dataset.from_dict(
            {"a": [1], "b": [2]}
        ),
        "'bird' fits none. The labels: cat, dog, bird. Class names: cat, dog, frog": other,
        "items are Images without labels": Unlabelled(pictures),
    }
    for pieces, dataset in cases.items():
        with pytest.raises(ValueError, match=pieces):
            ImageSource(processor, dataset, class_names=NAMES)
    with pytest.raises(ValueError, match=r"Item 3 \(from 0\) of 6 in the data set cannot be read: damaged"):
        ImageSource(processor, Damaged(pictures), class_names=NAMES)
    assert whole(ImageSource(processor, Unlabelled(pictures)))[1].tolist() == [-1] * 6
    with pytest.raises(ValueError, match="labels beside a folder: its subfolders are its classes"):
        ImageSource(processor, folder, LABELS, class_names=NAMES)


class Damaged(Pairs):
    def __getitem__(self, number: int) -> Any:
        if number == 3:
            raise OSError("damaged")
        return super().__getitem__(number)


class Unlabelled(Pairs):
    def __getitem__(self, number: int) -> Any:
        return self.pictures[number]


def test_class_labels_in_another_order_are_matched_by_name(processor: Any, pictures: list[Image.Image]) -> None:
    table = datasets.Dataset.from_dict({"image": pictures, "label": LABELS}).cast_column("image", datasets.Image())
    table = table.cast_column("label", datasets.ClassLabel(names=["Frog", "cat", "dog"]))
    for dataset in (table, table.to_iterable_dataset()):
        source = ImageSource(processor, dataset, class_names=NAMES)
        assert source.labels.tolist() == [2, 2, 0, 0, 1, 1]
        assert source.matched == {"Frog": "frog", "cat": "cat", "dog": "dog"}


def test_indices_beside_data_that_number_their_classes_otherwise_are_refused(
    processor: Any, pictures: list[Image.Image]
) -> None:
    """Most likely they are the data set's own, `dataset["label"]` or `dataset.targets`."""
    table = datasets.Dataset.from_dict({"image": pictures, "label": LABELS}).cast_column("image", datasets.Image())
    named = table.cast_column("label", datasets.ClassLabel(names=["frog", "dog", "cat"]))
    for dataset in (named, Pairs(pictures), torch.utils.data.Subset(Pairs(pictures), range(6)), Unlabelled(pictures)):
        with pytest.raises(ValueError, match=r"otherwise than class_names: frog, dog, cat\. Class names: cat"):
            ImageSource(processor, dataset, LABELS, class_names=NAMES)
        by_name = ImageSource(processor, dataset, [NAMES[label] for label in LABELS], class_names=NAMES)
        assert by_name.labels.tolist() == LABELS
    same = table.cast_column("label", datasets.ClassLabel(names=["Cat", "dog", "frog"]))
    for dataset in (table, same):
        assert ImageSource(processor, dataset, LABELS, class_names=NAMES).labels.tolist() == LABELS


class Other(Pairs):
    classes = ("lake", "road", "hill")


def test_data_sets_of_different_classes_may_be_one_ood_set(processor: Any, pictures: list[Image.Image]) -> None:
    joined = torch.utils.data.ConcatDataset([Pairs(pictures), Other(pictures)])
    assert len(ImageSource(processor, joined)) == 12
    assert ImageSource(processor, joined, 2 * LABELS, class_names=NAMES).labels.tolist() == 2 * LABELS
    with pytest.raises(ValueError, match="name their classes differently; give labels"):
        ImageSource(processor, joined, class_names=NAMES)


def test_labels_mean_nothing_without_class_names(processor: Any, pictures: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="labels and no class_names; say which classes they are"):
        ImageSource(processor, pictures, LABELS)


def test_a_torch_data_sets_names_are_not_those_of_transformed_labels(
    processor: Any, pictures: list[Image.Image]
) -> None:
    data = Pairs(pictures)
    data.classes, data.target_transform = ["frog", "cat", "dog"], lambda label: 2 - label
    with pytest.raises(ValueError, match="has a target_transform, so that its labels are not the numbers"):
        ImageSource(processor, data, class_names=["frog", "cat", "dog"])
    assert len(ImageSource(processor, data)) == len(pictures)


@pytest.mark.parametrize(
    ("damage", "reason"), [("empty", "cannot identify"), ("cut", "truncated"), ("gone", "No such")]
)
def test_an_image_that_cannot_be_read_is_named(processor: Any, folder: Path, damage: str, reason: str) -> None:
    file = folder / "dog" / "3.png"
    if damage == "gone":
        source = ImageSource(processor, folder, class_names=NAMES, batch_size=2)
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -500])
        source = ImageSource(processor, folder, class_names=NAMES, batch_size=2)
    batches = source.batches()
    assert len(next(batches)[1]) == 2
    with pytest.raises(ValueError, match=rf"dog/3\.png cannot be read: .*{reason}.*\. 3 of 6 images come before it"):
        next(batches)
    shard = source.shard(1, 2)
    with pytest.raises(ValueError, match=r"dog/3\.png cannot be read.* 1 of 3 images come before it"):
        list(shard.batches())


def test_an_image_without_a_file_is_numbered(processor: Any, pictures: list[Image.Image], folder: Path) -> None:
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    arrays[4] = arrays[4] * 1.0
    with pytest.raises(ValueError, match=r"Image 4 \(from 0\) cannot be read: it holds floating-point values"):
        list(ImageSource(processor, arrays).batches())
    encoded = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(folder.rglob("*.png"))]
    encoded[2]["bytes"] = b"no image"
    table = datasets.Dataset.from_dict({"image": encoded}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"^2\.png cannot be read"):
        list(ImageSource(processor, table).batches())
    with Image.open(folder / "cat" / "0.png") as whole_picture, Image.open(folder / "cat" / "1.png") as picture:
        # One picture opened and not yet read, many times over: threads must not read it at once.
        same = whole(ImageSource(processor, [picture] * 32 + [whole_picture]))[0]
        assert torch.equal(same[:32], same[:1].expand(32, -1, -1, -1))


def test_images_of_different_shapes_get_a_sentence(pictures: list[Image.Image]) -> None:
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    wide = [pictures[0], pictures[1].resize((10, 10))]
    with pytest.raises(ValueError, match=r"different shapes, \(3, 10, 10\) and \(3, 20, 24\); set its do_resize"):
        list(ImageSource(processor, wide).batches())


@pytest.mark.parametrize("converts", [True, False])
def test_a_model_of_one_channel_gets_grey_images(pictures: list[Image.Image], folder: Path, converts: bool) -> None:
    processor = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[0.5], image_std=[0.5], do_convert_rgb=converts
    )
    found, _ = whole(ImageSource(processor, folder, class_names=NAMES))
    grey = np.stack([np.asarray(picture.convert("L"), dtype=np.float32) for picture in pictures])
    assert found.shape == (6, 1, 20, 24)
    assert torch.allclose(found[:, 0], torch.as_tensor(grey / 255 * 2 - 1), atol=1e-6)


def test_nothing_imports_datasets_before_one_is_used(folder: Path) -> None:
    script = f"""
import sys
from setar_peft import ImageSource, LoCoOpObjective, PatchMetricObjective, evaluate
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
source = ImageSource(CLIPImageProcessorPil(), {str(folder)!r}, class_names={NAMES})
assert next(source.batches())[0].shape == (6, 3, 224, 224)
assert "datasets" not in sys.modules
import datasets
assert "datasets" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pixel_values_are_a_picture_again() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    values = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert np.abs(np.asarray(picture_of(values, processor)).astype(int) - pixels).max() <= 1
    grey = picture_of(torch.linspace(-2, 5, 12).view(1, 3, 4))
    assert (grey.mode, grey.size, grey.getextrema()) == ("RGB", (4, 3), ((0, 255),) * 3)
    assert picture_of(torch.full((3, 2, 2), 0.7)).getextrema() == ((0, 0),) * 3
