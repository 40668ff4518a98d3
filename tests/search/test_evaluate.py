"""Out of memory halves the batch and changes no decision; a callable may do to a model what it likes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, SeTARConfig, search_rank_ratios
from setar_peft.decomposition import decompose
from setar_peft.search.replay import ReplayEvaluator

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


class Stateful(nn.Module):
    """Writes into a container, counts its calls, reads an attribute, and sums up in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.memory: dict[str, Any] = {}
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        outputs = self.linear(inputs).tanh() + self.memory.get("last", 0) + 0.01 * self.calls + self.total
        self.memory["last"] = 0.1 * outputs
        self.total += 0.1
        return outputs


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.encoder(inputs, src_key_padding_mask=self.padding)[~self.padding]


def _stack(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *between, nn.Linear(6, 6), *between, nn.Linear(6, 6))


def _dropout(model: nn.Module) -> float:
    torch.manual_seed(3)
    model.train()
    inputs = torch.linspace(-1, 1, 60).view(10, 6)
    return float(torch.stack([model(inputs) for _ in range(3)]).std(0).mean())


def _sparse(model: nn.Module) -> float:
    inputs = torch.linspace(-1, 1, 60).view(10, 6)
    adjacency = (torch.arange(100).view(10, 10) % 7 == 0).float().to_sparse()
    hidden = inputs
    for layer in model.children():
        hidden = torch.sparse.mm(adjacency, layer(hidden))
    return float(hidden.square().mean())


def _vmap(model: nn.Module) -> float:
    inputs = torch.linspace(-1, 1, 60).view(10, 6)
    return float(torch.vmap(lambda row: model(row).square().sum())(inputs).mean())


def _square(model: nn.Module) -> float:
    inputs = torch.linspace(-1, 1, 90).view(3, 5, 6)
    return float((model(inputs) - 0.3).square().mean())


def _trains_a_little(model: nn.Module) -> float:
    """Trains, moves BatchNorm's buffers, and leaves everything behind: the loss after two steps."""
    model.train()
    model.requires_grad_(True)
    inputs = torch.randn(10, 6)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        for _ in range(2):
            loss = (model(inputs) - 0.3).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model[0].register_forward_hook(lambda *_: None)
    return float(loss.detach())


@pytest.mark.parametrize(
    ("make", "objective"),
    [
        (lambda: _stack(nn.Dropout(0.4)), _dropout),
        (lambda: nn.Sequential(Stateful(), Stateful(), Stateful()), _square),
        (Encoder, _square),
        (_stack, _sparse),
        (lambda: _stack(nn.Tanh()), _vmap),
        (lambda: _stack(nn.BatchNorm1d(6)), _trains_a_little),
    ],
    ids=["dropout", "state", "padding", "sparse", "vmap", "training"],
)
# The encoder's own, of its fast path.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_callable_gives_what_it_gives_on_a_truncated_copy(
    make: Callable[[], nn.Module], objective: Callable[[nn.Module], float]
) -> None:
    torch.manual_seed(0)
    model = make().train()
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()

    def on_a_copy(ratios: dict[str, float]) -> float:
        torch.set_rng_state(generator)
        twin = copy.deepcopy(model).eval()
        with torch.no_grad():
            for name, ratio in ratios.items():
                weight = twin.get_submodule(name).weight
                weight.requires_grad_(False).copy_(decompose(weight).kept(ratio) if ratio else weight)
            return objective(twin)

    config = SeTARConfig(target_modules=layers, candidate_ratios=[0.2, 0.5], passes=2)
    trace = search_rank_ratios(model, objective, config, progress=False).trace
    torch.set_rng_state(generator)
    assert trace.initial.total == on_a_copy({})
    decided: dict[str, float] = {}
    for row in trace.rows:
        for candidate in (one for one in trace.candidates if one.step == row.step):
            expected = on_a_copy({**decided, candidate.module: candidate.rank_ratio})
            assert candidate.total_loss == pytest.approx(expected, rel=1e-6)
        decided[row.module] = row.best_ratio
    assert any(decided.values())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_callable_that_gives_no_number_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"returned tensor\(\[0\., 0\.\]\).*one number"):
        search_rank_ratios(
            nn.Sequential(nn.Linear(2, 2)),
            lambda _: torch.zeros(2),  # type: ignore[arg-type,return-value]
            SeTARConfig(target_modules=["0"], candidate_ratios=[0.5]),
            progress=False,
        )
