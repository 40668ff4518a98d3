"""Where patches lie: an image that is odd at one place is odd there, and nowhere else, in the map of its patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from setar_peft.backbones import backbone_of
from setar_peft.backbones.grid import PatchGrid, image_pixels
from tests.backbones import checks

WIDTHS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TOWER = {**WIDTHS, "num_hidden_layers": 2}
TEXT = {**TOWER, "vocab_size": 40, "max_position_embeddings": 12}
STAGES = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [2, 2, 4], "window_size": 2}

# Family, its configuration, height and width of the images, and the grid that they have.
FIXED: list[tuple[str, dict[str, Any], tuple[int, int], PatchGrid]] = [
    ("CLIPModel", {"image_size": 32, "patch_size": 8}, (32, 32), PatchGrid(4, 4, 8, 8)),
    ("CLIPModel", {"image_size": 30, "patch_size": 7}, (30, 30), PatchGrid(4, 4, 7, 7)),
    ("SiglipModel", {"image_size": 32, "patch_size": 8}, (32, 32), PatchGrid(4, 4, 8, 8)),
    ("ViTForImageClassification", {"image_size": (16, 40), "patch_size": 8}, (16, 40), PatchGrid(2, 5, 8, 8)),
    ("ViTForImageClassification", {"image_size": (24, 24), "patch_size": (4, 8)}, (24, 24), PatchGrid(6, 3, 4, 8)),
    ("DeiTForImageClassification", {"image_size": (40, 16), "patch_size": 8}, (40, 16), PatchGrid(5, 2, 8, 8)),
    ("Dinov2ForImageClassification", {"image_size": 28, "patch_size": 7}, (21, 35), PatchGrid(3, 5, 7, 7)),
    ("Dinov2ForImageClassification", {"image_size": 28, "patch_size": 7}, (40, 17), PatchGrid(5, 2, 7, 7)),
    ("Dinov2WithRegistersForImageClassification", {"image_size": 28, "patch_size": 7}, (14, 35), PatchGrid(2, 5, 7, 7)),
    ("SwinForImageClassification", {"image_size": 64, **STAGES}, (64, 64), PatchGrid(4, 4, 16, 16)),
    ("SwinForImageClassification", {"image_size": 64, **STAGES}, (80, 48), PatchGrid(5, 3, 16, 16)),
    ("SwinForImageClassification", {"image_size": 64, **STAGES}, (37, 83), PatchGrid(3, 6, 16, 16)),
    ("Swinv2ForImageClassification", {"image_size": 64, **STAGES}, (48, 80), PatchGrid(3, 5, 16, 16)),
    ("Swinv2ForImageClassification", {"image_size": 64, **STAGES}, (71, 50), PatchGrid(5, 4, 16, 16)),
]


def made(name: str, settings: dict[str, Any]) -> Any:
    kind = getattr(transformers, name)
    if name.endswith("ForImageClassification"):
        widths = {} if name.startswith("Swin") else TOWER
        config = kind.config_class(**widths, **settings, num_labels=len(checks.CLASSES))
    else:
        config = kind.config_class(vision_config={**TOWER, **settings}, text_config=TEXT)
    return checks.randomised(kind(config))


def oddest_patches(model: Any, plain: dict[str, Tensor], odd: dict[str, Tensor]) -> list[int]:
    """Of each odd image, the patch whose local features are farthest from those of the plain one."""
    before, after = (checks.features_of(model, inputs) for inputs in (plain, odd))
    there = 1 if after.mask is None else after.mask
    return ((after.local - before.local).norm(dim=-1) * there).argmax(-1).tolist()


@pytest.mark.parametrize(("name", "settings", "size", "grid"), FIXED)
def test_an_odd_place_is_odd_there(name: str, settings: dict[str, Any], size: tuple[int, int], grid: PatchGrid) -> None:
    if name.startswith("Dinov2") and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18):
        pytest.skip("transformers before 5.18 has another DINOv2")
    model, image = made(name, settings), checks.random_images(1, 3, *size)
    inputs = {"pixel_values": image}
    assert backbone_of(model).patch_grid(image) == backbone_of(model).patch_grid(inputs) == grid
    assert checks.features_of(model, image).local.shape[1] == grid.rows * grid.columns
    odd = image.repeat(grid.rows * grid.columns, 1, 1, 1)
    for number in range(len(odd)):
        row, column = divmod(number, grid.columns)
        top, left = row * grid.height, column * grid.width
        odd[number, :, top : top + grid.height, left : left + grid.width] += 3
    assert oddest_patches(model, inputs, {"pixel_values": odd}) == list(range(len(odd)))
    assert torch.equal(image_pixels(inputs, grid), image[0])


@pytest.mark.parametrize("shape", [(4, 4), (2, 7), (5, 3)])
def test_a_flexible_image_has_the_grid_of_its_shape(shape: tuple[int, int]) -> None:
    model = made("Siglip2Model", {"num_patches": 16, "patch_size": 4})
    rows, columns = shape
    picture = checks.random_images(3, rows * 4, columns * 4)
    inputs = flexible(picture)
    grid = backbone_of(model).patch_grid(inputs)
    assert grid == PatchGrid(rows, columns, 4, 4)
    assert torch.equal(image_pixels(inputs, grid), picture)
    for number in range(rows * columns):
        odd = picture.clone()
        row, column = divmod(number, columns)
        odd[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 3
        assert oddest_patches(model, inputs, flexible(odd)) == [number]


def flexible(picture: Tensor) -> dict[str, Tensor]:
    """An image as the processor of SigLIP 2 lays it out, padded to 16 patches."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    patches = torch.from_numpy(convert_image_to_patches(picture.numpy(), 4))
    pixels = torch.zeros(1, 16, 48)
    pixels[0, : len(patches)] = patches
    mask = torch.arange(16)[None] < len(patches)
    shape = torch.tensor([[picture.shape[1] // 4, picture.shape[2] // 4]])
    return {"pixel_values": pixels, "pixel_attention_mask": mask.int(), "spatial_shapes": shape}


def test_several_grids_are_refused() -> None:
    model = made("Siglip2Model", {"num_patches": 16, "patch_size": 4})
    inputs = [flexible(checks.random_images(3, *size)) for size in ((16, 16), (8, 28))]
    both = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
    with pytest.raises(ValueError, match=r"several grids \(2 x 7, 4 x 4\); ask for one image's at a time"):
        backbone_of(model).patch_grid(both)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_the_tokens_of_a_text_are_one_row(name: str) -> None:
    kind = getattr(transformers, name)
    model = checks.randomised(kind(kind.config_class(**TOWER, vocab_size=60, max_position_embeddings=20)))
    ids = torch.arange(3, 10)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert backbone_of(model).patch_grid(inputs) == PatchGrid(1, 6, 1, 1)
    odd = ids.repeat(6, 1)
    odd[torch.arange(6), torch.arange(1, 7)] = 50
    assert oddest_patches(model, inputs, {"input_ids": odd, "attention_mask": torch.ones_like(odd)}) == list(range(6))


def test_images_that_the_model_does_not_take_have_no_grid() -> None:
    model = made("CLIPModel", {"image_size": 32, "patch_size": 8})
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32, 40\).*\(images, 3, 32, 32\)"):
        backbone_of(model).patch_grid(checks.random_images(1, 3, 32, 40))
