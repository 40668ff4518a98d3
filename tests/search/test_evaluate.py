"""Out of memory halves the batch and changes no decision."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, search_rank_ratios
from setar_peft.search.evaluate import ReplayEvaluator

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]


def _short_of_memory(objective: LoCoOpObjective, fits: int, after: int) -> LoCoOpObjective:
    class ShortOfMemory(LoCoOpObjective):
        calls = 0

        def sums(self, features: Any, classes: Any, labels: torch.Tensor) -> torch.Tensor:
            ShortOfMemory.calls += 1
            if len(labels) > fits and ShortOfMemory.calls > after:
                raise torch.OutOfMemoryError("out of memory")
            return super().sums(features, classes, labels)

    objective.__class__ = ShortOfMemory
    return objective


@pytest.mark.parametrize("after", [0, 20, 45])
def test_the_batch_is_halved_and_the_decisions_are_the_same(
    load_clip: Clip, clip_objective: Objective, after: int
) -> None:
    roomy = search_rank_ratios(load_clip(), clip_objective(), progress=False)
    with pytest.warns(RuntimeWarning, match="Out of memory with") as warned:
        tight = search_rank_ratios(load_clip(), _short_of_memory(clip_objective(), fits=7, after=after), progress=False)
    assert [str(warning.message).split(";")[0] for warning in warned] == [
        "Out of memory with 24 images or prompts a batch",
        "Out of memory with 12 images or prompts a batch",
    ]
    assert tight.rank_ratios == roomy.rank_ratios
    assert [row.total_loss for row in tight.trace.rows] == pytest.approx(
        [row.total_loss for row in roomy.trace.rows], abs=1e-6
    )


def test_the_smaller_batches_replace_the_larger_ones_in_memory(load_clip: Clip, clip_objective: Objective) -> None:
    """What the interrupted evaluation held is gone before the next one is built."""
    alive: list[int] = []

    class Watching(ReplayEvaluator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            alive.append(sum(reference() is not None for reference in built))
            built.append(weakref.ref(self))
            super().__init__(*args, **kwargs)

    built: list[weakref.ref[Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setar_peft.search.run.ReplayEvaluator", Watching)
        with pytest.warns(RuntimeWarning, match="Out of memory with"):
            search_rank_ratios(load_clip(), _short_of_memory(clip_objective(), fits=7, after=20), progress=False)
    assert alive == [0, 0, 0]


def test_when_not_even_one_image_fits_the_error_comes_through(load_clip: Clip, clip_objective: Objective) -> None:
    with pytest.warns(RuntimeWarning) as warned, pytest.raises(torch.OutOfMemoryError):
        search_rank_ratios(load_clip(), _short_of_memory(clip_objective(), fits=0, after=0), progress=False)
    assert [str(warning.message).split("with ")[-1] for warning in warned] == ["12.", "6.", "3.", "1."]
