"""Replay for callables: blocks that a candidate leaves alone are not computed again, whatever the callable does."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

from setar_peft import SeTARConfig, search_rank_ratios
from setar_peft.search.memo import BlockMemo
from setar_peft.search.recording import MemoryBudget

WIDTH, DEPTH, CANDIDATES = 12, 4, [0.1, 0.25, 0.5]


class Block(nn.Module):
    """A residual MLP that counts its calls; `scale` stands for what blocks are called with besides."""

    def __init__(self, calls: Counter[int], level: int) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH), nn.Dropout(0.5)
        self.level, self.calls = level, calls

    def forward(self, hidden: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        self.calls[self.level] += 1
        return hidden + self.dropout(self.down(self.up(hidden).relu())) * scale


class Model(nn.Module):
    """A stack between an embedding and a head."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calls: Counter[int] = Counter()
        self.embedding, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block(self.calls, level) for level in range(DEPTH))
        self.in_place = in_place

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embedding(inputs)
        scale = torch.ones(WIDTH) * 0.5
        for block in self.blocks:
            hidden = block(hidden, scale=scale)
            if self.in_place:
                hidden.mul_(1.5)
        return self.head(hidden)


INPUTS = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(20) % 3


def loss(model: nn.Module) -> float:
    """Two batches, as a user would write it."""
    logits = torch.cat([model(part) for part in INPUTS.split(12)])
    return float(nn.functional.cross_entropy(logits, LABELS))


def search(
    objective: Callable[[nn.Module], float],
    memory: float | None,
    make: Callable[[], nn.Module] = Model,
    **settings: Any,
) -> tuple[list[float], dict[str, float], Any]:
    """Every candidate's loss, what was chosen, and the model."""
    model = make().eval()
    config = SeTARConfig(
        **{"target_modules": ["up"], "candidate_ratios": CANDIDATES, **settings}, recording_memory=memory
    )
    result = search_rank_ratios(model, objective, config, progress=False)
    assert not any("forward" in vars(module) for module in model.modules())
    return [candidate.total_loss for candidate in result.trace.candidates], result.rank_ratios, model


def assert_same_as_in_full(objective: Callable[[nn.Module], float], **settings: Any) -> tuple[Any, Any]:
    """With and without memory the losses are the same to the bit; the models, for what they counted."""
    in_full = search(objective, 0.0, **settings)
    replayed = search(objective, None, **settings)
    assert replayed[:2] == in_full[:2]
    assert len(set(in_full[0])) > 3
    return replayed[2], in_full[2]


def test_a_search_of_a_stack_computes_only_the_blocks_above() -> None:
    replayed, in_full = assert_same_as_in_full(loss)
    candidates = len(CANDIDATES)
    # Two batches: the base's loss takes every block once, and J candidates the layer's block and those above.
    assert replayed.calls == {level: 2 * (1 + candidates * (level + 1)) for level in range(DEPTH)}
    assert in_full.calls == dict.fromkeys(range(DEPTH), 2 * (1 + candidates * DEPTH))


@pytest.mark.parametrize(
    "settings",
    [
        {"order": [f"blocks.{level}.up" for level in range(DEPTH)]},
        {"order": "exhaustive"},
        {"passes": 3},
        {"target_modules": ["up", "down"]},
        {"make": lambda: Model(in_place=True)},
    ],
    ids=["bottom up", "exhaustive", "passes", "two layers a block", "in place"],
)
def test_any_search_is_the_same_as_in_full(settings: dict[str, Any]) -> None:
    replayed, in_full = assert_same_as_in_full(loss, **settings)
    assert (sum(replayed.calls.values()) < sum(in_full.calls.values())) != ("make" in settings)


def test_a_sequential_model() -> None:
    def make() -> nn.Sequential:
        calls: Counter[int] = Counter()
        torch.manual_seed(0)
        return nn.Sequential(*(Block(calls, level) for level in range(DEPTH)), nn.Linear(WIDTH, 3))

    replayed, _ = assert_same_as_in_full(loss, make=make)
    assert replayed[0].calls[0] == 2 * (1 + len(CANDIDATES))


def test_little_memory_remembers_less() -> None:
    roomy, in_full = assert_same_as_in_full(loss)
    some = search(loss, 3 * INPUTS.numel() * 4 / 2**30)[2]
    assert sum(roomy.calls.values()) < sum(some.calls.values()) < sum(in_full.calls.values())


def test_a_gpt2_with_conv1d_layers() -> None:
    """Positional arguments, tuples, masks: a model that knows nothing of this package."""

    def make() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=16, use_cache=False)
        return GPT2LMHeadModel(config)

    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(0))

    def language_loss(model: Any) -> float:
        return float(model(ids, labels=ids).loss)

    assert_same_as_in_full(language_loss, make=make, target_modules=["mlp.c_fc"])


def test_the_other_stack_of_an_encoder_and_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the decoder is searched the encoder is not computed, and the other way round only what is below."""
    calls: Counter[str] = Counter()
    for kind in (BartEncoderLayer, BartDecoderLayer):

        def forward(self: Any, *args: Any, compute: Any = kind.forward, **kwargs: Any) -> Any:
            calls[type(self).__name__] += 1
            return compute(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)

    def make() -> BartForConditionalGeneration:
        torch.manual_seed(0)
        shape = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        widths = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
        model = BartForConditionalGeneration(BartConfig(vocab_size=40, use_cache=False, **shape, **widths))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        return model

    ids = torch.randint(4, 40, (4, 9), generator=torch.Generator().manual_seed(0))

    def translation_loss(model: Any) -> float:
        return float(model(input_ids=ids, labels=ids.flip(1)).loss)

    decoder = [f"model.decoder.layers.{level}.fc1" for level in (1, 0)]
    assert_same_as_in_full(translation_loss, make=make, target_modules=["fc1"])
    calls.clear()
    search(translation_loss, None, make=make, target_modules=decoder)
    assert calls["BartEncoderLayer"] == 2
    assert calls["BartDecoderLayer"] == 2 + len(CANDIDATES) * (1 + 2)


def test_chance_in_the_callable_is_respected() -> None:
    """Another batch in each evaluation: nothing can be handed back, and nothing is."""

    def objective(model: nn.Module) -> float:
        rows = torch.randint(0, 20, (8,))
        return float(nn.functional.cross_entropy(model(INPUTS[rows]), LABELS[rows]))

    torch.manual_seed(5)
    in_full = search(objective, 0.0, make=lambda: _seeded_after(Model))
    replayed = search(objective, None, make=lambda: _seeded_after(Model))
    assert replayed[:2] == in_full[:2]
    assert replayed[2].calls == in_full[2].calls


def _seeded_after(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    torch.manual_seed(5)
    return model


def test_hooks_inside_a_block_are_called() -> None:
    def objective(model: Any) -> float:
        heard = []
        handles = [block.up.register_forward_hook(lambda *call: heard.append(call[2])) for block in model.blocks]
        value = loss(model)
        for handle in handles:
            handle.remove()
        assert len(heard) == 2 * DEPTH
        return value + float(sum(outputs.abs().mean() for outputs in heard))

    replayed, in_full = assert_same_as_in_full(objective)
    assert replayed.calls == in_full.calls


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.blocks[0].up.weight.mul_(1.5),
        lambda model: setattr(model.blocks[0].up, "bias", nn.Parameter(torch.ones(24))),
    ],
    ids=["in place", "another parameter"],
)
def test_weights_that_the_callable_changes_count(change: Callable[[Any], Any]) -> None:
    def objective(model: Any) -> float:
        before = loss(model)
        state = copy.deepcopy(model.state_dict())
        change(model)
        after = loss(model)
        model.load_state_dict(state)
        return before + 2 * after

    assert_same_as_in_full(objective)


def test_a_copy_of_the_model_computes_with_its_own_weights() -> None:
    def objective(model: Any) -> float:
        before, other = loss(model), copy.deepcopy(model)
        other.blocks[0].up.weight.mul_(1.5)
        return before + 2 * loss(other)

    assert_same_as_in_full(objective)


def test_gradients_dropout_and_inference_mode_are_left_alone() -> None:
    def with_gradient(model: nn.Module) -> float:
        with torch.enable_grad():
            inputs = INPUTS.clone().requires_grad_()
            model(inputs).logsumexp(-1).sum().backward()
        assert inputs.grad is not None
        return float(inputs.grad.abs().sum())

    def with_dropout(model: nn.Module) -> float:
        torch.manual_seed(0)
        model.train()
        value = loss(model)
        model.eval()
        return value

    for objective in (with_gradient, with_dropout, torch.inference_mode()(loss)):
        replayed, in_full = assert_same_as_in_full(objective)
        assert replayed.calls == in_full.calls


@pytest.mark.parametrize("make_cache", [list, lambda: type("Cache", (list,), {})(), lambda: torch.zeros(1)])
def test_a_cache_that_blocks_write_to_is_written_to(make_cache: Callable[[], Any]) -> None:
    class CachingBlock(Block):
        def forward(self, hidden: Tensor, cache: Any) -> Tensor:  # type: ignore[override]
            if isinstance(cache, Tensor):
                cache += hidden.mean()
            else:
                cache.append(hidden.mean())
            return super().forward(hidden)

    class Caching(Model):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(CachingBlock(self.calls, level) for level in range(DEPTH))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden, cache = self.embedding(inputs), make_cache()
            for block in self.blocks:
                hidden = block(hidden, cache)
            return self.head(hidden) + sum(cache)

    replayed, in_full = assert_same_as_in_full(loss, make=Caching)
    assert replayed.calls == in_full.calls


def test_what_is_taken_of_the_budget_is_given_back() -> None:
    budget = MemoryBudget(torch.device("cpu"), 1.0)
    before = budget.left
    model = Model().eval()
    memo = BlockMemo(model, budget)
    with torch.no_grad():
        for target in (None, "blocks.3.up", "blocks.3.up", "blocks.1.up"):
            with memo.evaluating(target):
                loss(model)
        assert budget.left < before
        with memo.evaluating("blocks.0.up"):
            loss(model)
    assert budget.left == before
