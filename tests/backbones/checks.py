"""What every model family has to fulfil, whatever its features are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from setar_peft import LoCoOpObjective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.backbones import ImageFeatures, Logits, backbone_of
from setar_peft.objectives.base import Objective
from setar_peft.search.passes import BlockPasses
from setar_peft.search.plan import USUAL_ROUNDS
from setar_peft.search.trace import SearchTrace

CLASSES = ["cat", "dog", "frog", "ship"]
CANDIDATES = [0.1, 0.25, 0.4]


def randomised(model: nn.Module) -> Any:
    """A model in evaluation mode whose every parameter is seeded noise, biases, norms and layer scales included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model.eval()


def random_images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(count: int) -> torch.Tensor:
    return torch.arange(count) % len(CLASSES)


def make_objective(data: Any, processor: Any = None, count: int = 12, **settings: Any) -> LoCoOpObjective:
    settings = {"ood_weight": 0.2, "top_k": 2, "batch_size": 5, **settings}
    return LoCoOpObjective(processor, CLASSES, data, labels_of(count), **settings)


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Any, text_features: Any = None) -> Logits:
    backbone = backbone_of(model)
    return backbone.logits(inputs, backbone.class_weights(text_features))


@torch.no_grad()
def features_of(model: nn.Module, inputs: Any) -> ImageFeatures:
    return backbone_of(model).image_features(inputs)


@torch.no_grad()
def features_by_block_are_of_the_hidden_states(
    model: Any, inputs: dict[str, torch.Tensor], stock: Callable[..., Any], project: Callable[..., torch.Tensor]
) -> None:
    """Features after each block are what the model's own head makes of its own hidden states, with an adapter, too.

    Args:
        model: A stock model.
        inputs: Its inputs.
        stock: Runs the model, or what was made of it by PEFT, with `output_hidden_states`.
        project: Takes hidden states (n, tokens, width) to features (n, d), with the modules of the stock model.
    """

    def by_block(model: Any) -> torch.Tensor:
        base = getattr(model, "get_base_model", lambda: model)()
        backbone = backbone_of(base)
        found, hidden = backbone.image_features(inputs, layers=True), stock(model).hidden_states[1:]
        assert len(hidden) == len(backbone.towers[backbone.input_tower].blocks) > 1
        assert found.layers is not None
        expected = torch.stack([project(base, states) for states in hidden], dim=1)
        torch.testing.assert_close(found.layers, expected, rtol=1e-5, atol=1e-5)
        # No two blocks are alike, or the comparison would not see them exchanged; and the last is what is pooled.
        assert (expected.diff(dim=1).abs().amax((0, 2)) > 1e-2).all()
        assert torch.equal(found.layers[:, -1], found.pooled)
        plain = backbone.image_features(inputs)
        assert plain.layers is None
        torch.testing.assert_close(plain.pooled, found.pooled, rtol=0, atol=0)
        return found.layers

    plain = by_block(model)
    targets = backbone_of(model).modules_of_type("W_up")
    middle = next(
        name for name in targets if backbone_of(model).locate(name)[:2] == (backbone_of(model).input_tower, 1)
    )
    adapted = get_peft_model(model, SeTARConfig(rank_ratios={middle: 0.4}, target_modules=[middle])).eval()
    truncated = by_block(adapted)
    # The block below the truncated one is as it was; that one and those above are not.
    torch.testing.assert_close(truncated[:, 0], plain[:, 0], rtol=0, atol=0)
    assert ((truncated - plain).abs().amax((0, 2))[1:] > 1e-3).all()


@torch.no_grad()
def has_no_features_by_block(model: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no class token that runs through all blocks"):
        backbone_of(model).image_features(inputs, layers=True)
    assert backbone_of(model).image_features(inputs).layers is None


def same_search_by_replay_and_in_full(model: Any, objective: Objective, **settings: Any) -> dict[str, float]:
    """A search by replay decides as one that evaluates each candidate in full, to the same losses."""
    config = SeTARConfig(candidate_ratios=CANDIDATES, **settings)
    replayed = search_rank_ratios(model, objective, config, progress=False)
    full = search_rank_ratios(model, lambda candidate: objective(candidate), config, progress=False)
    assert replayed.rank_ratios == full.rank_ratios
    assert [row.total_loss for row in replayed.trace.rows] == pytest.approx(
        [row.total_loss for row in full.trace.rows], abs=1e-6
    )
    losses = [[candidate.total_loss for candidate in result.trace.candidates] for result in (replayed, full)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    # A search in which no candidate matters would agree with anything.
    assert len(set(losses[0])) > 3
    same_predictions_by_replay_and_in_full(model, objective, **settings)
    return replayed.rank_ratios


def loss_with_gradient(model: Any, objective: LoCoOpObjective) -> torch.Tensor:
    """The LoCoOp loss of a model as one tensor, through its whole forward: no recording, no sums by batch."""
    backbone = backbone_of(model)
    classes = objective.class_weights(backbone)
    batches = [(backbone.logits(inputs, classes), labels) for inputs, labels in objective.batches()]
    losses, entropies = [], []
    for logits, labels in batches:
        losses.append(torch.nn.functional.cross_entropy(logits.pooled, labels, reduction="sum"))
        true = logits.local[torch.arange(len(labels)), :, labels]
        is_ood = (logits.local > true[..., None]).sum(-1) >= objective.top_k
        is_ood = is_ood if logits.mask is None else is_ood & logits.mask
        likely = logits.local[is_ood].softmax(-1)
        entropies.append((likely * (likely + 1e-5).log()).sum(-1))
    return sum(losses) / len(objective) + objective.ood_weight * torch.cat(entropies).mean().nan_to_num()


def same_predictions_by_replay_and_in_full(model: Any, objective: LoCoOpObjective, **settings: Any) -> None:
    """The gradient that is put together from parts predicts what autograd finds in the model's whole forward."""
    config = SeTARConfig(candidate_ratios=CANDIDATES, search="screened", **settings)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    replayed = search_rank_ratios(model, objective, config, progress=False)
    full = search_rank_ratios(model, lambda candidate: loss_with_gradient(candidate, objective), config, progress=False)
    changes = [[one.change for one in result.trace.predictions] for result in (replayed, full)]
    largest = max(map(abs, changes[1]))
    assert largest > 1e-4
    assert changes[0] == pytest.approx(changes[1], abs=2e-4 * largest)
    assert replayed.rank_ratios == full.rank_ratios
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())


@contextmanager
def counting_block_passes(model: Any) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Count inputs that pass a tower's blocks: calls of `Tower.step` below the last block, and of `Tower.finish`.

    Yields:
        All of them by tower, and those whose outputs have a gradient that is passed back.
    """
    passes: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(tower) for tower in backbone_of(model).towers.values()}:

            def step(self: Any, entry: Any, level: int, hidden: Any, call: Any = kind.step) -> Any:
                below_last = level < len(self.blocks) - 1
                output = call(self, entry, level, hidden)
                passes[self.name] += entry.rows * below_last
                backward[self.name] += entry.rows * (below_last and output.requires_grad)
                return output

            def finish(self: Any, entry: Any, hidden: Any, call: Any = kind.finish) -> Any:
                outputs = call(self, entry, hidden)
                passes[self.name] += entry.rows
                backward[self.name] += entry.rows * outputs[0].requires_grad
                return outputs

            patch.setattr(kind, "step", step)
            patch.setattr(kind, "finish", finish)
        yield passes, backward


def passes_by_the_formula(model: Any, trace: SearchTrace) -> BlockPasses:
    """Block passes that docs/search.md grants the search behind a trace."""
    backbone = backbone_of(model)
    passes = BlockPasses({name: len(tower.blocks) for name, tower in backbone.towers.items()})
    lowest: dict[str, int] = {}
    for module in {row.module for row in trace.rows}:
        tower, level, _ = backbone.locate(module)
        top = len(backbone.towers[tower].blocks) - 1
        lowest[tower] = min(level, lowest.get(tower, top))
    present: dict[str, float] = {}
    held: dict[str, float] = {}

    def hold(ratios: dict[str, float]) -> None:
        for module, ratio in ratios.items():
            if ratio != held.get(module, 0.0):
                passes.change(*backbone.locate(module)[:2])
        held.update(ratios)

    together = {candidate.trial for candidate in trace.candidates} - {None}
    gradients = sorted({prediction.step for prediction in trace.predictions})
    for row in trace.rows:
        if row.step in gradients:
            passes.gradient(lowest)
            end = next((step for step in gradients if step > row.step), len(trace.rows))
            tried = [candidate for candidate in trace.candidates if row.step <= candidate.step < end]
            for trial in sorted({candidate.trial for candidate in tried} & together):
                changes = {one.module: one.rank_ratio for one in tried if one.trial == trial}
                hold({**dict.fromkeys(held, 0.0), **present, **changes})
                passes.present()
        alone = [one for one in trace.candidates if one.step == row.step and one.trial is None]
        for module, candidates in Counter(candidate.module for candidate in alone).items():
            passes.evaluate(*backbone.locate(module)[:2], candidates)
        hold({row.module: row.best_ratio})
        present[row.module] = row.best_ratio
    return passes


def takes_the_passes_of_the_formula(model: Any, objective: Objective, **settings: Any) -> dict[str, float]:
    """A search takes as many block passes as the formula says, by its decisions, and no more than was estimated."""
    config = SeTARConfig(candidate_ratios=CANDIDATES, **settings)
    estimate = estimate_cost(model, objective, config)
    with counting_block_passes(model) as counted:
        trace = search_rank_ratios(model, objective, config, progress=False).trace
    inputs = dict.fromkeys(backbone_of(model).towers, estimate.classes)
    inputs[backbone_of(model).input_tower] = estimate.images
    passes, backward = ({tower: count / inputs[tower] for tower, count in one.items()} for one in counted)
    formula = passes_by_the_formula(model, trace)
    assert passes == formula.count
    assert backward == formula.backward
    # How many evaluations a joint search takes is not known beforehand.
    trials = {candidate.trial for candidate in trace.candidates} - {None}
    if len(trials) <= USUAL_ROUNDS and len({one.step for one in trace.predictions}) <= USUAL_ROUNDS:
        assert all(count <= estimate.block_passes[tower] for tower, count in passes.items())
        assert all(count <= estimate.backward_passes[tower] for tower, count in backward.items())
    return passes


def stays_within_the_bound(model: Any, objective: Objective) -> None:
    """J N (N + 1) / 2 + 2 N block passes a tower, and J more for each layer above the blocks."""
    backbone = backbone_of(model)
    counted = takes_the_passes_of_the_formula(model, objective)
    for order in ("vision_text", "best_first", "joint"):
        order = "text" if order == "vision_text" and "vision" not in backbone.towers else order
        takes_the_passes_of_the_formula(model, objective, search="screened", order=order)
    assert set(counted) == set(backbone.towers)
    for name, tower in backbone.towers.items():
        depth, candidates = len(tower.blocks), len(CANDIDATES)
        heads = sum(backbone.locate(module)[:2] == (name, depth) for module in backbone.modules_of_type("W_up"))
        assert depth <= counted[name] <= candidates * depth * (depth + 1) / 2 + 2 * depth + heads * candidates


def adapter_has_the_searched_loss(model: Any, objective: Objective) -> None:
    """The adapter made by the search has the loss that the search promised, the base beneath it its own."""
    # PEFT freezes the base, and for strided inputs torch multiplies with frozen weights by another kernel.
    model.requires_grad_(False)
    base = objective.losses(model).total
    promised = search_rank_ratios(model, objective, SeTARConfig(candidate_ratios=CANDIDATES), progress=False)
    adapted = get_peft_model(model, promised.config)
    assert objective.losses(adapted).total == pytest.approx(promised.trace.rows[-1].total_loss, abs=1e-5)
    # Of a random model it may be that nothing gains (a gated DINOv2 as transformers 5.18 draws it).
    assert (promised.trace.rows[-1].total_loss < base) == any(promised.rank_ratios.values())
    with adapted.disable_adapter():
        assert objective.losses(adapted).total == base


@torch.no_grad()
def tokens_in_the_last_block(model: Any, tower: str, run: Callable[[], Any]) -> dict[str, list[int]]:
    """How many tokens of each row go through the linear layers of a tower's last block, by weight type."""
    backbone = backbone_of(model)
    block = backbone.towers[tower].blocks[-1]
    tokens: dict[str, list[int]] = {weight_type: [] for weight_type in backbone.weight_names}
    for weight_type, name in backbone.weight_names.items():
        block.get_submodule(name).register_forward_hook(
            lambda *call, weight_type=weight_type: tokens[weight_type].append(call[1][0][..., 0].numel())
        )
    rows = len(run())
    return {weight_type: [count // rows for count in counts] for weight_type, counts in tokens.items()}


def weights_are_where_they_should_be(model: Any) -> None:
    """Every weight type names linear layers in every block, and each is located where it was named."""
    backbone = backbone_of(model)
    for weight_type in backbone.weight_names:
        names = backbone.modules_of_type(weight_type)
        assert len(names) >= sum(len(tower.blocks) for tower in backbone.towers.values())
        for name in names:
            assert isinstance(model.get_submodule(name), nn.Linear)
            assert backbone.locate(name).weight_type == weight_type
    for tower, name in backbone.projection_names.items():
        assert backbone.locate(name) == (tower, len(backbone.towers[tower].blocks), "W_p")


class WordTokenizer:
    """A tokenizer of whole words: ids from 3 on, 0 pads, 1 begins and 2 ends a text."""

    def __init__(self, *, with_mask: bool = True) -> None:
        self.words: dict[str, int] = {}
        self.with_mask = with_mask

    def __call__(
        self,
        texts: list[str],
        *,
        padding: bool | str,
        truncation: bool = False,
        max_length: int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        ids = [[1, *(self.words.setdefault(word, 3 + len(self.words)) for word in text.split()), 2] for text in texts]
        if truncation and max_length is not None:
            ids = [row if len(row) <= max_length else [*row[: max_length - 1], 2] for row in ids]
        if not padding:
            return {"input_ids": ids}
        length = max_length if padding == "max_length" else max(map(len, ids))
        assert length is not None
        tokens = {"input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids])}
        return {**tokens, "attention_mask": (tokens["input_ids"] > 0).long()} if self.with_mask else tokens
