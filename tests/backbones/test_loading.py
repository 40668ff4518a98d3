"""Precisions by name: the dtype, and torch's setting for the length of a piece of work; and processors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from setar_peft.backbones.loading import load_model, load_processor, precision
from tests.conftest import GOLDEN


@pytest.fixture(params=["highest", "medium"])
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_products_in_float32_are_what_torch_is_set_to(setting: str) -> None:
    with precision("float32") as dtype:
        assert (dtype, torch.get_float32_matmul_precision()) == (torch.float32, setting)


@pytest.mark.parametrize("name", ["tf32", "bfloat16", "float16"])
def test_elsewhere_they_may_be_rounded_until_the_end(setting: str, name: str) -> None:
    seen = []

    def interrupted() -> None:
        with precision(name) as dtype:
            seen.append((dtype, torch.get_float32_matmul_precision()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [(torch.float32 if name == "tf32" else getattr(torch, name), "high")]
    assert torch.get_float32_matmul_precision() == setting


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'fp8'; give one of float32, tf32, bfloat16, float16"), precision("fp8"):
        pass


def test_an_image_processor_that_is_made_up_is_said() -> None:
    folder = str(GOLDEN / "cases" / "clip_tiny")
    with pytest.warns(
        UserWarning, match=r"clip_tiny has no image processor, so that images are scaled as OpenAI's CLIPs"
    ):
        processor = load_processor(folder, load_model(folder))
    assert processor.image_processor.crop_size["height"] == 32
