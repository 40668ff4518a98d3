"""What an evaluation keeps on disk: a second run computes nothing, and nothing stale or damaged is believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from setar_peft import SeTARConfig
from setar_peft.data.images import ImageSource
from setar_peft.detection import cache as cache_module
from setar_peft.detection.cache_keys import fingerprints
from setar_peft.detection.evaluation import evaluate
from setar_peft.detection.fusion import LayerFusion
from setar_peft.detection.scoring import Score
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it
from tests.detection.pictures import written

UP = "vision_model.encoder.layers.1.mlp.fc1"


class Blocks:
    """How many blocks of either tower ran since it was last asked."""

    def __init__(self, model: Any) -> None:
        self.vision = self.text = 0
        for name, module in model.named_modules():
            if name.endswith("mlp"):
                module.register_forward_hook(self._text if "text_model" in name else self._vision)

    def _vision(self, *_: Any) -> None:
        self.vision += 1

    def _text(self, *_: Any) -> None:
        self.text += 1

    def ran(self) -> tuple[bool, bool]:
        found = self.vision > 0, self.text > 0
        self.vision = self.text = 0
        return found


@pytest.fixture
def model(load_clip: Callable[..., Any]) -> Any:
    return load_clip()


@pytest.fixture
def run(
    model: Any, processor: Any, class_names: list[str], golden_clip: dict[str, Tensor], tmp_path: Path
) -> Callable[..., Any]:
    """The golden CLIP on 10 images against 7, with a cache."""
    pixels = golden_clip["pixel_values"]

    def evaluated(scores: Any = None, **changes: Any) -> Any:
        settings = {"processor": processor, "class_names": class_names, "batch_size": 4, "resamples": 0}
        sets = {"one": changes.pop("one", model), "known": pixels[:10], "unknown": {"rest": pixels[10:17]}}
        sets |= {name: changes.pop(name) for name in list(changes) if name in sets}
        chosen = settings | {"cache": tmp_path / "cache"} | changes
        return evaluate(sets["one"], sets["known"], sets["unknown"], scores, **chosen)

    return evaluated


def same(one: Any, other: Any) -> bool:
    """Whether two evaluations say the same of every image, to the bit."""
    for name, model in one.models.items():
        for set_name, images in model.sets.items():
            others = other.models[name].sets[set_name]
            if (
                images.ids != others.ids
                or images.left_out != others.left_out
                or set(images.scores) != set(others.scores)
            ):
                return False
            pairs = [(images.predictions, others.predictions), (images.confidence, others.confidence)]
            pairs += [(values, others.scores[score]) for score, values in images.scores.items()]
            if not all(np.array_equal(*pair) for pair in pairs):
                return False
    return one.to_dict() == other.to_dict()


def test_a_second_run_computes_nothing(run: Any, model: Any) -> None:
    blocks = Blocks(model)
    plain = run(cache=None)
    assert blocks.ran() == (True, True)
    first = run()
    assert blocks.ran() == (True, True)
    assert same(run(), first)
    assert blocks.ran() == (False, False)
    assert same(first, plain)
    # Nor does it for fewer scores, in another order, or with labels said otherwise.
    assert list(run(["gl_mcm"]).models["model"].settings) == ["gl_mcm"]
    assert list(run(["gl_mcm", "mcm"]).models["model"].settings) == ["gl_mcm", "mcm"]
    assert blocks.ran() == (False, False)


def test_a_new_score_of_global_logits_comes_from_the_features(run: Any, model: Any) -> None:
    run()
    blocks = Blocks(model)
    found = run(["mcm", "energy", "msp"])
    assert blocks.ran() == (False, True)
    assert same(run(["mcm", "energy", "msp"]), found)
    assert blocks.ran() == (False, False)
    plain = run(["mcm", "energy", "msp"], cache=None)
    for set_name, images in plain.models["model"].sets.items():
        for score, values in images.scores.items():
            np.testing.assert_allclose(found.models["model"].sets[set_name].scores[score], values, rtol=1e-5)
    blocks.ran()
    # Patches are not kept.
    run(["local_mcm"])
    assert blocks.ran() == (True, True)


def test_a_score_of_ones_own_is_computed_each_time_from_the_features(run: Any, model: Any) -> None:
    blocks = Blocks(model)
    weight = 1.0

    def mine(global_logits: Tensor, features: Tensor) -> Tensor:
        return weight * global_logits.amax(-1) + features[:, 0]

    first = run([mine])
    blocks.ran()
    weight = 2.0
    second = run([mine])
    assert blocks.ran() == (False, True)
    assert not same(first, second)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 5},
        {"known": lambda pixels: pixels[:10] + 1e-3},
        {"known": lambda pixels: pixels[1:11]},
    ],
)
def test_other_inputs_are_others(run: Any, model: Any, golden_clip: Any, changes: dict[str, Any]) -> None:
    run()
    blocks = Blocks(model)
    made = {name: one(golden_clip["pixel_values"]) if callable(one) else one for name, one in changes.items()}
    run(**made)
    assert blocks.ran() == (True, True)


def test_another_model_is_another(run: Any, model: Any) -> None:
    first = run()
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1e-3
    blocks = Blocks(model)
    assert not same(run(), first)
    assert blocks.ran() == (True, True)


def test_other_prompts_use_the_features_and_give_other_scores(run: Any, model: Any) -> None:
    first = run(["mcm"])
    blocks = Blocks(model)
    for changes in ({"prompt": "{class}"}, {"class_names": ["cat", "dog"]}):
        assert not same(run(["mcm"], **changes), first)
        assert blocks.ran() == (False, True)
    warmer = run({"mcm": {"temperature": 10.0}})
    assert warmer.models["model"].settings["mcm"]["temperature"] == 10.0
    assert not same(warmer, first)


def test_adapters_are_told_apart_and_the_base_is_the_stock_model(run: Any, model: Any) -> None:
    stock = run()
    peft_model = get_peft_model(model, SeTARConfig(target_modules=[UP], rank_ratios={UP: 0.4}))
    blocks = Blocks(model)
    base = run(one=peft_model, adapters={"model": None})
    assert blocks.ran() == (False, False)
    np.testing.assert_array_equal(base.models["model"].id_set.scores["mcm"], stock.models["model"].id_set.scores["mcm"])
    adapted = run(one=peft_model)
    assert blocks.ran() == (True, True)
    both = run(one=peft_model, adapters={"base": None, "SeTAR": "default"})
    assert blocks.ran() == (False, False)
    for name, alone in (("base", base), ("SeTAR", adapted)):
        for score, values in alone.models["model"].id_set.scores.items():
            assert np.array_equal(both.models[name].id_set.scores[score], values)
    peft_model.add_adapter("other", SeTARConfig(target_modules=[UP], rank_ratios={UP: 0.2}))
    run(one=peft_model, adapters={"base": None, "SeTAR": "default"})
    assert blocks.ran() == (False, False)
    run(one=peft_model, adapters={"other": "other"}, cache=None)
    alone = blocks.vision, blocks.text
    blocks.ran()
    run(one=peft_model, adapters={"base": None, "SeTAR": "default", "other": "other"})
    assert (blocks.vision, blocks.text) == alone


def fingerprint(model: Any, adapter: str | None = "") -> str:
    return fingerprints(model, {"it": adapter})["it"]


def test_a_fingerprint_is_that_of_what_computes(model: Any, load_clip: Any) -> None:
    stock = fingerprint(model)
    assert fingerprint(load_clip()) == stock
    peft_model = get_peft_model(model, SeTARConfig(target_modules=[UP], rank_ratios={UP: 0.4}))
    assert fingerprint(peft_model, None) == stock
    adapted = fingerprint(peft_model)
    assert adapted == fingerprint(peft_model, "default") != stock
    with peft_model.disable_adapter():
        assert fingerprint(peft_model) == stock
    assert fingerprint(load_clip().half()) != stock
    merged = fingerprint(peft_model.merge_and_unload())
    assert merged not in (stock, adapted)


def test_layers_chosen_on_id_data_are_kept_with_their_scores(
    run: Any, model: Any, golden_clip: Any, class_names: list[str]
) -> None:
    pixels = golden_clip["pixel_values"]
    fit = {"fit_data": torch.cat([pixels[17:], pixels[17:] + 0.1, pixels[17:] - 0.1])}
    first = run(LayerFusion("mcm", bins=16), **fit)
    assert len(first.models["model"].settings["layer_fusion:mcm"]["chosen"]) <= 5
    blocks = Blocks(model)
    assert same(run(LayerFusion("mcm", bins=16), **fit), first)
    assert blocks.ran() == (False, False)
    run(LayerFusion("mcm", bins=17), **fit)
    assert blocks.ran() == (True, True)
    run(LayerFusion("mcm", bins=16), fit_data=fit["fit_data"][1:])
    assert blocks.ran() == (True, True)
    # One that is made of a function of the user's own is computed anew.
    own = LayerFusion(Score(lambda global_logits: global_logits.amax(-1), name="mine"), [0, -1])
    run(own)
    blocks.ran()
    run(own)
    assert blocks.ran() == (True, True)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped"])
@pytest.mark.parametrize("files", ["values-*.safetensors", "part-*.safetensors", "set.json"])
def test_a_damaged_file_is_said_and_computed_again(run: Any, tmp_path: Path, how: str, files: str) -> None:
    first = run()
    scores = ["mcm", "gl_mcm"] if files != "part-*.safetensors" else ["mcm", "energy"]
    expected = run(scores, cache=None)
    damaged = list((tmp_path / "cache").glob(f"*/{files}"))
    assert damaged
    for path in damaged:
        damage(path, how)
    with pytest.warns(UserWarning, match="A file of the cache is damaged and is computed again: .*cache") as said:
        found = run(scores)
    assert len(said) >= 1
    for set_name, images in expected.models["model"].sets.items():
        for score, values in images.scores.items():
            np.testing.assert_allclose(found.models["model"].sets[set_name].scores[score], values, rtol=1e-5)
    assert same(run(), first)


def test_a_missing_part_is_computed_again(run: Any, model: Any, tmp_path: Path) -> None:
    run()
    for path in (tmp_path / "cache").glob("*/part-*"):
        path.unlink()
    blocks = Blocks(model)
    run(["energy"])
    assert blocks.ran() == (True, True)


def test_what_cannot_be_read_is_kept_too(run: Any, model: Any, tmp_path: Path) -> None:
    paths = written(tmp_path / "images", 6)
    paths[4].write_bytes(b"")
    sets = {"unknown": {"files": paths}}
    first = run(errors="leave_out", **sets)
    blocks = Blocks(model)
    assert same(run(errors="leave_out", **sets), first)
    assert blocks.ran() == (False, False)
    assert list(first.models["model"].ood_sets["files"].left_out) == [str(paths[4])]
    with pytest.raises(ValueError, match=r"004\.png cannot be read"):
        run(**sets)


def test_large_sets_are_kept_in_parts(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_ROWS", 4)
    first = run()
    assert len(list((tmp_path / "cache").glob("*/part-*"))) == 3 + 2
    assert same(run(), first)
    monkeypatch.undo()
    whole = run(["energy"], cache=tmp_path / "other")
    np.testing.assert_allclose(
        run(["energy"]).models["model"].id_set.scores["energy"],
        whole.models["model"].id_set.scores["energy"],
        rtol=1e-6,
    )


def test_an_interrupted_pass_leaves_nothing_that_is_believed(run: Any, model: Any, golden_clip: Any) -> None:
    class Interrupted(ImageSource):
        def readable_batches(self) -> Any:
            yield next(super().readable_batches())
            raise KeyboardInterrupt

    pixels = golden_clip["pixel_values"]
    with pytest.raises(KeyboardInterrupt):
        run(known=Interrupted(None, pixels[:10], batch_size=4))
    blocks = Blocks(model)
    run()
    assert blocks.ran() == (True, True)
