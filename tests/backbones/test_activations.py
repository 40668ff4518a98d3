"""quick_gelu in one kernel against transformers' three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPModel
from transformers.activations import QuickGELUActivation

from setar_peft import LoCoOpObjective, search_rank_ratios
from setar_peft.backbones import activations
from setar_peft.backbones.activations import fuse_activations, quick_gelu
from setar_peft.backbones.untouched import left_as_it_was


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_is_exact_to_rounding(dtype: torch.dtype) -> None:
    values = torch.cat([torch.linspace(-60, 60, 240_001), torch.linspace(-1e-3, 1e-3, 1001)]).to(dtype)
    largest = min(torch.finfo(dtype).max, 1e38)
    values = torch.cat([values, torch.tensor([0.0, 3e4, -3e4, largest, -largest], dtype=dtype)])
    exact = values.double() * torch.sigmoid(1.702 * values.double())
    fused, stock = quick_gelu(values), QuickGELUActivation()(values)
    assert fused.dtype == dtype
    assert fused.isfinite().all()
    rounding = torch.finfo(dtype).eps
    # An exponential hands on the rounding of its argument.
    bound = rounding * exact.abs() * (4 + 4 * values.double().abs().clamp(max=60)) + torch.finfo(dtype).tiny
    assert ((fused.double() - exact).abs() <= bound).all()
    if dtype.itemsize == 2:  # rounded once, not three times
        assert (fused.double() - exact)[:-5].abs().mean() < (stock.double() - exact)[:-5].abs().mean()
    assert quick_gelu(torch.tensor([torch.inf], dtype=dtype)) == torch.inf


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor do as a GPU does."""
    monkeypatch.setattr(activations, "_WORTH_IT_ON", {"cpu", "cuda"})


@torch.no_grad()
@pytest.mark.usefixtures("everywhere")
def test_one_kernel_takes_the_place_of_three_and_hooks_still_run() -> None:
    class Mine(QuickGELUActivation):
        pass

    model = nn.ModuleDict(
        {"stock": QuickGELUActivation(), "mine": Mine(), "patched": QuickGELUActivation(), "linear": nn.Linear(1, 1)}
    )
    model["patched"].forward = own = lambda value: value + 1
    seen: list[nn.Module] = []
    model["stock"].register_forward_hook(lambda module, *_: seen.append(module))
    values = torch.randn(3)
    with left_as_it_was(model):
        fuse_activations(model)
        with Operations() as operations:
            model["stock"](values)
        assert operations.names == ["aten::softplus_backward"]
        assert seen == [model["stock"]]
        assert "forward" not in vars(model["mine"])
        assert torch.equal(model["patched"](values), values + 1)
    assert "forward" not in vars(model["stock"])
    assert vars(model["patched"])["forward"] is own
    with Operations() as operations:
        model["stock"](values)
    assert operations.names == ["aten::mul.Tensor", "aten::sigmoid", "aten::mul.Tensor"]


@pytest.mark.parametrize("name", ["clip_tiny", "clip_tiny_eq"])
def test_a_search_decides_the_same_and_leaves_the_model_as_it_was(
    load_clip: Callable[..., CLIPModel],
    clip_objective: Callable[..., LoCoOpObjective],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    model = load_clip(name)
    gelus = [module for module in model.modules() if isinstance(module, QuickGELUActivation)]
    assert gelus
    with Operations() as operations:
        stock = search_rank_ratios(model, clip_objective(), progress=False)
    assert "aten::softplus_backward" not in operations.names
    monkeypatch.setattr(activations, "_WORTH_IT_ON", {"cpu"})
    with Operations() as operations:
        fused = search_rank_ratios(model, clip_objective(), progress=False)
    assert "aten::softplus_backward" in operations.names
    assert "aten::sigmoid" not in operations.names
    assert not any("forward" in vars(module) for module in gelus)
    assert fused.rank_ratios == stock.rank_ratios
    assert [candidate.total_loss for candidate in fused.trace.candidates] == pytest.approx(
        [candidate.total_loss for candidate in stock.trace.candidates], abs=3e-5
    )

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    objective = clip_objective()
    objective.sums = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        search_rank_ratios(model, objective, progress=False)
    assert not any("forward" in vars(module) for module in gelus)
