"""A score of one's own: a function of what a model says, found, set, computed and refused as the built-in ones are."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from setar_peft.backbones import ImageFeatures, Logits
from setar_peft.detection import scores
from setar_peft.detection.fusion import LayerFusion
from setar_peft.detection.scores import SCORES, chosen_scores, find_score, mcm, register_score, score
from setar_peft.detection.scoring import READABLE, Reading, Score
from tests.detection.pictures import pictures
from tests.refusals import message_of


@pytest.fixture
def logits() -> Logits:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return 20 + 3 * torch.randn(6, *shape, generator=generator)

    return Logits(noise(5), noise(4, 5), 100.0, layers=noise(3, 5), negative=noise(7))


@pytest.fixture
def features() -> ImageFeatures:
    generator = torch.Generator().manual_seed(1)
    return ImageFeatures(torch.randn(6, 8, generator=generator), torch.randn(6, 4, 8, generator=generator))


@pytest.fixture(autouse=True)
def _known_scores_are_left_as_they_were() -> Iterator[None]:
    before = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(before)


def margin(global_logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    first, second = (global_logits / temperature).topk(2).values.unbind(-1)
    return first - second


def made(of: str) -> Score:
    return Score(margin, name=f"family:{of}")


def test_a_function_is_a_score(logits: Logits) -> None:
    expected = margin(logits.pooled)
    assert torch.equal(score(margin, logits), expected)
    assert torch.equal(score(margin, logits, temperature=2.0), margin(logits.pooled, 2.0))
    assert find_score(margin).name == "margin"
    ((name, (found, settings)),) = chosen_scores(margin).items()
    assert (name, settings) == ("margin", {})
    assert torch.equal(found(logits, **found.settings(logits.scale, settings)), expected)


def test_one_of_cosines_is_at_the_models_scale_unless_another_is_given(logits: Logits) -> None:
    of_cosines = Score(margin, of_cosines=True, name="cosine_margin")
    torch.testing.assert_close(score(of_cosines, logits), margin(logits.pooled / 100))
    assert of_cosines.settings(100.0, {}) == {"temperature": 100.0}
    assert torch.equal(score(of_cosines, logits, temperature=1.0), margin(logits.pooled))


def test_everything_that_can_be_read_is_given_by_its_name(logits: Logits, features: ImageFeatures) -> None:
    held = {
        "global_logits": logits.pooled,
        "local_logits": logits.local,
        "layer_logits": logits.layers,
        "negative_logits": logits.negative,
        "features": features.pooled,
    }
    assert set(held) == set(READABLE)

    def everything(features, negative_logits, layer_logits, local_logits, global_logits, *, power=1.0):
        given = dict(locals())
        assert given.pop("power") == 2.0
        assert all(given[name] is held[name] for name in held)
        return global_logits.amax(-1) ** power

    own = Score(everything)
    assert own.reads == set(READABLE)
    assert own.needs_local
    assert own.needs_layers
    assert torch.equal(score(own, logits, features, power=2.0), logits.pooled.amax(-1) ** 2)
    assert not find_score(margin).needs_local
    assert not find_score(margin).needs_layers


def test_a_score_of_features(logits: Logits, features: ImageFeatures) -> None:
    def size(features: Tensor) -> Tensor:
        return features.norm(dim=-1)

    assert torch.equal(score(size, logits, features), features.pooled.norm(dim=-1))
    message = message_of(score, size, logits)
    assert "'size' reads what is not there: features" in message
    assert "(n, d)" in message


@pytest.mark.parametrize("name", sorted(READABLE))
def test_what_is_not_there_is_named(name: str, logits: Logits) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def own({name}): return {name}.flatten(1).amax(-1)", namespace)
    bare = Logits(logits.pooled, None, 1.0)
    if name == "global_logits":
        assert score(namespace["own"], bare).shape == (6,)
    else:
        assert f"The score 'own' reads what is not there: {name} ({READABLE[name]})" in message_of(
            score, namespace["own"], bare
        )


def test_any_number_a_function_gives_becomes_float32(logits: Logits) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
        own = Score(lambda global_logits, dtype=dtype: global_logits.argmax(-1).to(dtype), name="winner")
        found = score(own, logits)
        assert found.dtype == torch.float32
        assert torch.equal(found, logits.pooled.argmax(-1).to(dtype).float())


def test_a_registered_score_is_known_by_its_name(logits: Logits) -> None:
    known = register_score(margin)
    assert register_score(known) is known
    assert find_score("margin") is known
    assert find_score(margin) is known
    assert torch.equal(score("margin", logits), margin(logits.pooled))
    chosen = chosen_scores({"margin": {"temperature": 2.0}, "mcm": {}}, temperature=7.0)
    assert {name: settings for name, (_, settings) in chosen.items()} == {
        "margin": {"temperature": 2.0},
        "mcm": {"temperature": 7.0},
    }
    assert list(chosen_scores(["mcm", margin, Score(margin, name="other")])) == ["mcm", "margin", "other"]


def test_a_name_means_one_score() -> None:
    """Else a table, or a detector that is loaded by the name, would speak of another score than was meant."""
    for own in (Score(margin, name="mcm"), Score(mcm, name="mcm")):
        for call in (register_score, find_score, chosen_scores):
            message = message_of(call, own)
            assert "There is a score 'mcm' already" in message
            assert "Score(function, name=...)" in message
    assert find_score(mcm) is SCORES["mcm"]
    register_score(margin)
    assert "There is a score 'margin' already" in message_of(
        register_score, Score(lambda features: features, name="margin")
    )


def test_a_copy_is_the_same_score(logits: Logits) -> None:
    """As another process gets it."""
    for made in (SCORES["gl_mcm"], SCORES["neglabel"], LayerFusion("mcm", layers=[0, -1]), Score(margin)):
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert find_score(copied) is copied
            assert torch.equal(score(copied, logits), score(made, logits))


@pytest.mark.parametrize("wrong", [None, 3, ["mcm"], torch.zeros(2)])
def test_what_is_no_function(wrong: Any) -> None:
    for call in (find_score, register_score, Score):
        assert "is no function; give a name or a function of logits" in message_of(call, wrong)


def test_a_name_cannot_be_registered() -> None:
    assert "The score 'mcm' is no function" in message_of(register_score, "mcm")


def test_parameters_that_cannot_be_given_by_name() -> None:
    def positional(global_logits, /):
        return global_logits

    def several(global_logits, *more):
        return global_logits

    def anything(global_logits, **settings):
        return global_logits

    for function, parameter in ((positional, "global_logits"), (several, "*more"), (anything, "**settings")):
        message = message_of(Score, function)
        assert f"The score {function.__name__} has the parameter {parameter}, which is not given by name" in message
        assert "wrap it in a function" in message
    message = message_of(Score, torch.amax)
    assert "does not say what its parameters are" in message
    assert "wrap it in a function that names them" in message


def test_a_function_that_reads_nothing() -> None:
    message = message_of(Score, lambda logits: logits, name="own")
    assert "The score own has the parameters logits, so that it reads nothing of a model" in message
    assert all(name in message for name in READABLE)
    assert "has the parameters none" in message_of(Score, lambda: 0)


def test_cosines_need_a_temperature() -> None:
    message = message_of(Score, lambda global_logits: global_logits.amax(-1), of_cosines=True, name="own")
    assert "own is meant for cosines; give its function a setting temperature" in message


@pytest.mark.parametrize("wrong", ["", 3])
def test_a_name_is_text(wrong: Any) -> None:
    assert f"name is {wrong!r}; give what tables should call the score" in message_of(Score, margin, name=wrong)


def test_settings(logits: Logits) -> None:
    def power(global_logits, exponent, temperature=1.0):
        return (global_logits / temperature).amax(-1) ** exponent

    assert torch.equal(score(power, logits, exponent=2), logits.pooled.amax(-1) ** 2)
    assert "power needs the setting 'exponent', which has no default" in message_of(score, power, logits)
    message = message_of(score, power, logits, exponent=2, exponents=3)
    assert "power has no setting 'exponents'; it has 'exponent', 'temperature'" in message
    message = message_of(score, Score(lambda features: features, name="bare"), logits, temperature=1.0)
    assert "bare has no setting 'temperature'; it has none" in message
    # A function with its settings filled in has them as defaults.
    filled = Score(functools.partial(power, exponent=3), name="cubed")
    assert torch.equal(score(filled, logits), logits.pooled.amax(-1) ** 3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda global_logits: global_logits, "shape (6, 5)"),
        (lambda global_logits: global_logits.amax(), "shape ()"),
        (lambda global_logits: global_logits.amax(-1)[:4], "shape (4,)"),
        (lambda global_logits: global_logits.amax(-1, keepdim=True), "shape (6, 1)"),
        (lambda global_logits: global_logits.amax(-1).to(torch.complex64), "shape (6,)"),
        (lambda global_logits: global_logits.max(-1), "a max"),
        (lambda global_logits: None, "a NoneType"),
        (lambda global_logits: global_logits.amax(-1).tolist(), "a list"),
    ],
)
def test_results_that_are_no_number_for_each_input(logits: Logits, wrong: Any, said: str) -> None:
    message = message_of(score, Score(wrong, name="own"), logits)
    assert f"The score own gives {said}" in message
    assert "for 6 inputs; it has to give one number for each, (n,)" in message


def test_lists_of_scores() -> None:
    assert "scores is empty" in message_of(chosen_scores, [])
    assert "scores is empty" in message_of(chosen_scores, {})
    assert "scores names mcm twice" in message_of(chosen_scores, ["mcm", "gl_mcm", mcm])
    assert "give each score its settings by name" in message_of(chosen_scores, {"mcm": 1.0})
    assert "score is 'mmc'; write one of 'mcm'" in message_of(chosen_scores, ["mmc"])
    assert list(chosen_scores("gl_mcm")) == ["gl_mcm"]


def test_a_score_that_has_nothing_to_be_fitted(logits: Logits, features: ImageFeatures) -> None:
    own = Score(margin)
    assert not own.needs_fit
    assert own.fit([Reading(logits, features, torch.zeros(6))]) is own
    assert own.state() == ({}, {})
    assert own.with_state({}, {}) is own
    message = message_of(own.with_state, {"chosen": [1]}, {})
    assert "margin has nothing to be fitted" in message
    assert "'chosen'" in message


def test_families_make_scores_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scores.FAMILIES, "family", (__name__, "made"))
    assert find_score("family:this").name == "family:this"
    assert ", or 'family:...'" in message_of(find_score, "familiar:this")


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8), reason="torch below 2.8 fixes the number of inputs"
)
@pytest.mark.parametrize("name", [*sorted(SCORES), "layer_fusion"])
def test_scores_can_be_exported_for_any_number_of_inputs(logits: Logits, name: str) -> None:
    class Graph(torch.nn.Module):
        def forward(self, pooled: Tensor, local: Tensor, layers: Tensor, negative: Tensor) -> Tensor:
            return score(
                LayerFusion("mcm", layers=[0, -1]) if name == "layer_fusion" else name,
                Logits(pooled, local, 100.0, layers=layers, negative=negative),
            )

    held = (logits.pooled, logits.local, logits.layers, logits.negative)
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(Graph(), held, dynamic_shapes=(rows,) * 4, strict=False)
    for inputs in (1, 2, 6):
        part = [value[:inputs] for value in held if value is not None]
        torch.testing.assert_close(program.module()(*part), Graph()(*part))


@pytest.mark.filterwarnings("ignore:.* ID inputs are few:UserWarning")
def test_the_documentation_runs(load_clip: Any, processor: Any, class_names: list[str]) -> None:
    """And its table names every score, with the temperature that it has by default."""
    text = (Path(__file__).parents[2] / "docs" / "scores.md").read_text(encoding="utf-8")
    values = {"model": load_clip(), "processor": processor, "class_names": class_names, "images": pictures(80)}
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    for block in blocks:
        if "PytorchOOD" not in block or importlib.util.find_spec("pytorch_ood"):
            exec(block, values)
            assert values["detector"].score_name in ("margin", "layer_fusion:mcm", "pytorch_ood:KNN(k=5)")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    names = {name.strip("|` "): row[2] for row in rows for name in row[0].split(", ")}
    shown = {name for name in names if "<" not in name}
    assert shown == set(SCORES) - {"margin"}
    assert all(("scale" in names[name]) == SCORES[name].of_cosines for name in shown)
    assert {name.partition(":")[0] for name in names if "<" in name} == set(scores.FAMILIES)
