"""Scores against the published code's figures, closed forms and double-precision counting."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from setar_peft.backbones import Logits
from setar_peft.detection import per_image, scores
from setar_peft.detection.neglabel import neglabel
from setar_peft.detection.scores import SCORES, find_score, gl_mcm, local_mcm, logit_gap
from tests.refusals import message_of

if TYPE_CHECKING:
    from pathlib import Path

GLOBAL_SCORES = [name for name, entry in SCORES.items() if not entry.needs_local]
# The published code's names; its figures have the sign turned: there lower means ID.
PUBLISHED = {
    "mcm": "mcm_score",
    "msp": "mcm_score",
    "local_mcm": "l_mcm_score",
    "gl_mcm": "gl_mcm_score",
    "energy": "energy_score",
    "entropy": "entropy_score",
    "variance": "var_score",
}


def negative_of(pooled: Tensor) -> Tensor:
    """Three negative labels for any logits (n, classes): each as likely as the least likely class."""
    return pooled.amin(-1, keepdim=True).expand(-1, 3) if pooled.ndim == 2 and pooled.shape[1] else pooled


def score(name: str, pooled: Tensor, local: Tensor | None = None, *, scale: float = 1.0, **settings: Any) -> Tensor:
    return scores.score(name, Logits(pooled, local, scale, negative=negative_of(pooled)), **settings)


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor]:
    """Global (40, 7) and local (40, 9, 7) logits with the spread of CLIP's."""
    generator = torch.Generator().manual_seed(0)
    return (
        20 + 3 * torch.randn(40, 7, generator=generator),
        20 + 3 * torch.randn(40, 9, 7, generator=generator),
    )


def softmax_in_double(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(logit / temperature) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def one_by_one(name: str, image: list[float], patches: list[list[float]], temperature: float) -> float:
    """The definition of each score for one image, in Python's floats."""
    probabilities = softmax_in_double(image, temperature)
    largest_of_patches = max(max(softmax_in_double(patch, temperature)) for patch in patches)
    mean = math.fsum(probabilities) / len(probabilities)
    ranked = sorted(image, reverse=True)
    beside_negative = softmax_in_double([*image, *[min(image)] * 3], temperature)
    return {
        "mcm": max(probabilities),
        "msp": max(probabilities),
        "local_mcm": largest_of_patches,
        "gl_mcm": max(probabilities) + largest_of_patches,
        "max_logit": max(image) / temperature,
        "energy": temperature * math.log(math.fsum(math.exp(logit / temperature) for logit in image)),
        "entropy": math.fsum(p * math.log(p) for p in probabilities),
        "variance": math.fsum((p - mean) ** 2 for p in probabilities) / len(probabilities),
        "logit_gap": (ranked[0] - math.fsum(ranked[1:4]) / 3) / temperature,
        "neglabel": math.fsum(beside_negative[: len(image)]),
    }[name]


class LargestFloat32(TorchDispatchMode):
    """Records the number of elements of the largest float32 tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize(("backbone", "temperature"), [("clip", 1), ("clip", 100), ("swin", 1)])
def test_published_figures(golden: Path, backbone: str, temperature: int, name: str) -> None:
    tensors = load_file(golden / f"tensors_{backbone}_tiny.safetensors")
    ours = score(
        name,
        tensors["logits_global"],
        tensors["logits_local"].flatten(1, 2),
        temperature=temperature,
    )
    published = -tensors[f"score.T{temperature}.{PUBLISHED[name]}"]
    assert ours.dtype == torch.float32
    assert ours.shape == (24,)
    torch.testing.assert_close(ours.double(), published, rtol=1e-6, atol=2e-7)


def test_figures_tell_the_published_variance_and_entropy_from_their_neighbours(golden_clip) -> None:
    """The comparison above would see an unbiased variance or the 1e-5 of the loss inside the entropy."""
    p = golden_clip["logits_global"].double().softmax(-1)
    variance, entropy = -golden_clip["score.T1.var_score"], -golden_clip["score.T1.entropy_score"]
    assert (p.var(-1, correction=1) - variance).abs().max() > 1e-2
    assert ((p * (p + 1e-5).log()).sum(-1) - entropy).abs().max() > 1e-5


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
def test_definition_image_by_image(logits, name: str, temperature: float) -> None:
    global_logits, local_logits = logits
    expected = [
        one_by_one(name, image, patches, temperature)
        for image, patches in zip(global_logits.tolist(), local_logits.tolist(), strict=True)
    ]
    ours = score(name, global_logits, local_logits, temperature=temperature)
    # A difference of logits keeps their rounding.
    atol = 1e-5 if name == "logit_gap" else 1e-6
    torch.testing.assert_close(ours.double(), torch.tensor(expected).double(), rtol=2e-6, atol=atol)


def test_two_classes_in_closed_form() -> None:
    gap, temperature = torch.linspace(-6, 6, 25), 2.0
    logits = torch.stack([gap, torch.zeros_like(gap)], dim=-1)
    p = torch.sigmoid(gap.double().abs() / temperature)
    expected = {
        "mcm": p,
        "msp": p,
        "max_logit": gap.double().clamp(min=0) / temperature,
        "energy": temperature * torch.nn.functional.softplus(gap.double() / temperature),
        "entropy": p * p.log() + (1 - p) * (1 - p).log(),
        "variance": (p - 0.5) ** 2,
        "logit_gap": gap.double().abs() / temperature,
        "neglabel": 1 / (1 + 3 * (1 - p)),
    }
    assert sorted(expected) == sorted(GLOBAL_SCORES)
    for name, values in expected.items():
        torch.testing.assert_close(score(name, logits, temperature=temperature).double(), values)


def test_pooling_by_hand() -> None:
    """Two patches that are sure of different classes: sure as patches, undecided as classes."""
    local_logits = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])
    sure = torch.sigmoid(torch.tensor([4.0]))
    torch.testing.assert_close(local_mcm(local_logits, 1.0), sure)
    torch.testing.assert_close(local_mcm(local_logits, 1.0, "class"), torch.tensor([0.5]))
    undecided = torch.zeros(1, 2)
    torch.testing.assert_close(gl_mcm(undecided, local_logits, 1.0), 0.5 + sure)
    torch.testing.assert_close(gl_mcm(undecided, local_logits, 1.0, "class"), torch.tensor([1.0]))


def test_pooling_is_the_same_for_one_patch_and_follows_the_temperature(logits) -> None:
    global_logits, local_logits = logits
    one_patch = local_logits[:, :1]
    torch.testing.assert_close(local_mcm(one_patch, 3.0), scores.mcm(one_patch[:, 0], 3.0))
    torch.testing.assert_close(local_mcm(one_patch, 3.0, "class"), scores.mcm(one_patch[:, 0], 3.0))
    torch.testing.assert_close(local_mcm(local_logits, 3.0, "class"), scores.mcm(local_logits.amax(1) / 3.0, 1.0))
    both = gl_mcm(global_logits, local_logits, 3.0, "class")
    torch.testing.assert_close(
        both, scores.mcm(global_logits, 3.0) + local_mcm(local_logits, 3.0, "class"), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", SCORES)
def test_surer_images_score_higher(name: str) -> None:
    """Higher means more in-distribution, for every score: from equal logits to one that stands out."""
    lead = torch.arange(0, 12, 0.5)
    global_logits = torch.zeros(24, 5).index_put((torch.arange(24), torch.arange(24) % 5), lead)
    local_logits = torch.stack([torch.zeros(24, 5), global_logits], dim=1)
    assert (score(name, global_logits, local_logits).diff() > 0).all()


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
def test_stays_in_its_range(logits, name: str, temperature: float) -> None:
    global_logits, local_logits = logits
    classes = global_logits.shape[1]
    largest = global_logits.amax(-1)
    low, high = {
        "logit_gap": (0.0, math.inf),
        "neglabel": (0.0, 1.0),
        "mcm": (1 / classes, 1.0),
        "msp": (1 / classes, 1.0),
        "local_mcm": (1 / classes, 1.0),
        "gl_mcm": (2 / classes, 2.0),
        "max_logit": (largest / temperature, largest / temperature),
        "energy": (largest, largest + temperature * math.log(classes)),
        "entropy": (-math.log(classes), 0.0),
        "variance": (0.0, (classes - 1) / classes**2),
    }[name]
    found = score(name, global_logits, local_logits, temperature=temperature)
    rounding = 1e-6 * found.abs().max()
    assert (found >= low - rounding).all()
    assert (found <= high + rounding).all()


@pytest.mark.parametrize("name", SCORES)
def test_algebra(logits, name: str) -> None:
    """Only the set of logits counts: not their level, nor the order of classes, patches and images."""
    global_logits, local_logits = logits
    plain = score(name, global_logits, local_logits)
    generator = torch.Generator().manual_seed(1)
    classes = torch.randperm(7, generator=generator)
    patches = torch.randperm(9, generator=generator)
    images = torch.randperm(40, generator=generator)

    shuffled = score(name, global_logits[:, classes], local_logits[:, patches][:, :, classes])
    torch.testing.assert_close(shuffled, plain)
    by_order = score(name, global_logits[images], local_logits[images])
    assert torch.equal(by_order, plain[images])

    raised = score(name, global_logits + 4.0, local_logits + 4.0)
    torch.testing.assert_close(raised, plain + (4.0 if name in ("max_logit", "energy") else 0.0))
    divided = score(name, global_logits / 8.0, local_logits / 8.0)
    at_temperature = score(name, global_logits, local_logits, temperature=8.0)
    torch.testing.assert_close(at_temperature, divided * (8.0 if name == "energy" else 1.0))


def test_energy_tends_to_the_largest_logit(logits) -> None:
    global_logits, _ = logits
    torch.testing.assert_close(
        scores.energy(global_logits, temperature=1e-3), scores.max_logit(global_logits), rtol=0, atol=1e-2
    )


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("images", [0, 1])
def test_no_image_and_one_image(logits, name: str, images: int) -> None:
    global_logits, local_logits = logits
    few = score(name, global_logits[:images], local_logits[:images])
    assert few.shape == (images,)
    assert few.dtype == torch.float32
    assert torch.equal(few, score(name, global_logits, local_logits)[:images])


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"logit_gap"}))
def test_one_class_and_impossible_classes_are_numbers(name: str) -> None:
    one_class = score(name, torch.full((3, 1), 5.0), torch.full((3, 2, 1), 5.0))
    assert one_class.isfinite().all()
    ruled_out = torch.tensor([[3.0, 1.0, -math.inf]])
    without = ruled_out[:, :2]
    if name not in ("variance", "neglabel"):  # which count those ruled out
        torch.testing.assert_close(score(name, ruled_out, ruled_out[:, None]), score(name, without, without[:, None]))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_computed_in_float32(logits, name: str, dtype: torch.dtype) -> None:
    global_logits, local_logits = (tensor.to(dtype) for tensor in logits)
    # A temperature whose division rounds, so that dividing in the model's dtype would show.
    ours = score(name, global_logits, local_logits, temperature=3.0)
    assert ours.dtype == torch.float32
    in_float32 = score(name, global_logits.float(), local_logits.float(), temperature=3.0)
    assert torch.equal(ours, in_float32)


def test_bfloat16_logits_keep_distinct_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    global_logits = (20 + 4 * torch.randn(400, 1000, generator=generator)).bfloat16()
    local_logits = (20 + 8 * torch.randn(400, 4, 1000, generator=generator)).bfloat16()
    ours = gl_mcm(global_logits, local_logits, 1.0)
    assert len(ours.unique()) > 390
    # What the guard is for: the same in the model's own dtype.
    in_bfloat16 = global_logits.softmax(-1).amax(-1) + local_logits.softmax(-1).amax((1, 2))
    assert len(in_bfloat16.unique()) < 130


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("chunk_numel", [1, 130, 1000])
def test_chunks_change_nothing(logits, monkeypatch, name: str, chunk_numel: int) -> None:
    whole = score(name, *logits)
    monkeypatch.setattr(per_image, "_CHUNK_NUMEL", chunk_numel)
    assert torch.equal(score(name, *logits), whole)


@pytest.mark.parametrize("pooling", ["patch", "class"])
def test_no_float32_copy_of_the_set(logits, monkeypatch, pooling) -> None:
    global_logits, local_logits = (tensor.bfloat16() for tensor in logits)
    budget = 4 * local_logits[0].numel()
    monkeypatch.setattr(per_image, "_CHUNK_NUMEL", budget)
    with LargestFloat32() as largest:
        gl_mcm(global_logits, local_logits, 1.0, pooling)
    assert local_logits[0].numel() <= largest.numel <= budget
    monkeypatch.setattr(per_image, "_CHUNK_NUMEL", 10**9)
    with LargestFloat32() as largest:
        gl_mcm(global_logits, local_logits, 1.0, pooling)
    assert largest.numel == local_logits.numel()


def test_default_chunk_holds_many_real_images() -> None:
    assert 4 * per_image._CHUNK_NUMEL <= 64 * 2**20
    assert per_image._CHUNK_NUMEL // (14 * 14 * 1000) >= 64


def test_inputs_are_left_alone(logits) -> None:
    before = [tensor.clone() for tensor in logits]
    for name in SCORES:
        score(name, *logits, temperature=2.0)
    assert all(torch.equal(now, then) for now, then in zip(logits, before, strict=True))


def test_every_score_is_named_once() -> None:
    public = {
        name
        for name, function in inspect.getmembers(scores, inspect.isfunction)
        if function.__module__ == scores.__name__ and not name.startswith("_")
    }
    public |= {neglabel.__name__}
    assert public - {"score", "find_score", "chosen_score", "chosen_scores", "register_score"} == set(SCORES)
    for name, entry in SCORES.items():
        assert entry.function is getattr(scores, name)
        assert find_score(entry.function) is entry
        arguments = list(inspect.signature(entry.function).parameters)
        assert set(arguments[: len(entry.reads)]) == entry.reads
        assert arguments[len(entry.reads)] == "temperature"
        assert find_score(name) is entry
    assert {name for name, entry in SCORES.items() if entry.needs_local} == {"local_mcm", "gl_mcm"}


def test_a_score_of_cosines_has_no_temperature_of_its_own(logits) -> None:
    """So that nobody takes the softmax of a CLIP's scaled logits without having said so."""
    for name, entry in SCORES.items():
        assert entry.of_cosines == (name in {"mcm", "local_mcm", "gl_mcm", "entropy", "variance", "logit_gap"})
        names = ("global_logits", "local_logits", "negative_logits")
        held = (*logits, negative_of(logits[0]))
        read = [part for part, kind in zip(held, names, strict=True) if kind in entry.reads]
        if entry.of_cosines:
            with pytest.raises(TypeError, match="temperature"):
                entry.function(*read)
        else:
            assert torch.equal(entry.function(*read), entry.function(*read, 1.0))


@pytest.mark.parametrize("name", SCORES)
def test_the_temperature_by_default_is_the_papers(logits, name: str) -> None:
    """Cosines at 1 where the paper's score reads cosines, the model's own logits at 1 elsewhere."""
    cosines = [part / 100 for part in logits]
    reads_cosines = name not in ("msp", "max_logit", "energy", "neglabel")
    expected = score(name, *(cosines if reads_cosines else logits), temperature=1.0)
    torch.testing.assert_close(score(name, *logits, scale=100.0), expected)
    torch.testing.assert_close(score(name, *logits, scale=torch.tensor(100.0)), expected)
    assert find_score(name).settings(100.0, {})["temperature"] == (100.0 if reads_cosines else 1.0)
    # An argument has the last word, and a classifier's scale is 1.
    assert torch.equal(score(name, *logits, scale=100.0, temperature=7.0), score(name, *logits, temperature=7.0))
    assert find_score(name).settings(1.0, {})["temperature"] == 1.0


@pytest.mark.parametrize("local_weight", [0.0, 0.5, 2.0])
def test_the_weight_of_the_local_part(logits, local_weight: float) -> None:
    expected = scores.mcm(logits[0], 3.0) + local_weight * local_mcm(logits[1], 3.0)
    assert torch.equal(gl_mcm(*logits, 3.0, local_weight=local_weight), expected)
    assert torch.equal(score("gl_mcm", *logits, scale=3.0, local_weight=local_weight), expected)


def test_wrong_settings_get_a_sentence(logits) -> None:
    for wrong in (-0.5, math.inf, math.nan):
        message = message_of(score, "gl_mcm", *logits, local_weight=wrong)
        assert f"local_weight is {wrong!r}; give a finite number of 0 or more" in message
    message = message_of(score, "mcm", *logits, local_weight=0.5, temprature=1.0)
    assert "mcm has no setting 'local_weight', 'temprature'; it has 'temperature'" in message


@pytest.mark.parametrize("name", SCORES)
def test_autocast_changes_nothing(logits, name: str) -> None:
    expected = score(name, *logits, scale=100.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = score(name, *logits, scale=100.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.shared_data
def test_the_published_scores_are_of_cosines(shared_data: Path) -> None:
    """Of logits, 100 times larger, they would span the whole range from 1 / classes to 1 and to 2."""
    for file, classes in (
        ("clip_base_voc_setar.npz", 14),
        ("clip_base_imagenet1k_setar.npz", 1000),
        ("clip_base_imagenet1k_vanilla_gl_mcm.npz", 1000),
    ):
        with np.load(shared_data / "scores" / file) as published:
            for key in published.files:
                parts = 2 if key.endswith("gl_mcm_score") else 1
                over_chance = -published[key] * classes / parts
                # A cosine is at most 2 above another; CLIP's class prompts are far closer than that.
                assert over_chance.min() > 1
                assert over_chance.max() < 1.3
    # A model with cosines like CLIP's, at the defaults and as the same logits at temperature 1.
    generator = torch.Generator().manual_seed(0)
    for classes in (14, 1000):
        pooled = 100 * (0.2 + 0.03 * torch.randn(500, classes, generator=generator))
        local = 100 * (0.2 + 0.03 * torch.randn(500, 49, classes, generator=generator))
        for name, parts in (("mcm", 1), ("gl_mcm", 2)):
            found = score(name, pooled, local, scale=100.0) * classes / parts
            assert found.min() > 1
            assert found.max() < 1.3
            assert score(name, pooled, local, temperature=1.0).mean() * classes / parts > 4


@pytest.mark.parametrize("name", GLOBAL_SCORES)
def test_local_logits_are_optional_and_unread_where_not_needed(logits, name: str) -> None:
    global_logits, local_logits = logits
    assert torch.equal(score(name, global_logits), score(name, global_logits, local_logits))


def test_unknown_score() -> None:
    for call in (lambda: score("mmc", torch.zeros(2, 3)), lambda: find_score("mmc")):
        message = message_of(call)
        assert "'mmc'" in message
        assert all(repr(name) in message for name in SCORES)


@pytest.mark.parametrize("name", ["local_mcm", "gl_mcm"])
def test_missing_local_logits(name: str) -> None:
    message = message_of(score, name, torch.zeros(2, 3))
    assert repr(name) in message
    assert "reads what is not there: local_logits" in message
    assert "(n, patches, classes)" in message
    assert "take a score that does without" in message


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature(logits, name: str, temperature: float) -> None:
    message = message_of(score, name, *logits, temperature=temperature)
    assert f"temperature is {temperature!r}" in message
    assert "positive number" in message


@pytest.mark.parametrize("name", GLOBAL_SCORES)
def test_bad_global_logits(name: str) -> None:
    message = message_of(score, name, torch.zeros(5))
    assert "global_logits" in message
    assert "(5,), 1 dimensions" in message
    assert "give 2: (n, classes)" in message
    message = message_of(score, name, torch.zeros(2, 5, dtype=torch.int64))
    assert "global_logits have dtype torch.int64" in message
    assert "floating" in message
    message = message_of(score, name, torch.zeros(2, 0))
    assert "global_logits have shape (2, 0), no classes" in message


def test_bad_local_logits() -> None:
    message = message_of(local_mcm, torch.zeros(2, 4, 4, 3), 1.0)
    assert "local_logits have shape (2, 4, 4, 3), 4 dimensions" in message
    assert "give 3: (n, patches, classes)" in message
    assert "flatten(1, 2)" in message
    message = message_of(local_mcm, torch.zeros(2, 3), 1.0)
    assert "2 dimensions" in message
    assert "flatten" not in message
    assert "no patches" in message_of(local_mcm, torch.zeros(2, 0, 3), 1.0)
    assert "no classes" in message_of(local_mcm, torch.zeros(2, 4, 0), 1.0)
    assert "torch.bool" in message_of(local_mcm, torch.zeros(2, 4, 3, dtype=torch.bool), 1.0)


def test_unknown_pooling() -> None:
    for function, args in ((local_mcm, ()), (gl_mcm, (torch.zeros(2, 3),))):
        message = message_of(function, *args, torch.zeros(2, 4, 3), 1.0, pooling="mean")
        assert "pooling is 'mean'" in message
        assert "'patch'" in message
        assert "'class'" in message


@pytest.mark.parametrize("shape", [(3, 4, 3), (2, 4, 5)])
def test_global_and_local_logits_of_different_sets(shape: tuple[int, ...]) -> None:
    message = message_of(gl_mcm, torch.zeros(2, 3), torch.zeros(shape), 1.0)
    assert "(2, 3)" in message
    assert str(shape) in message
    assert "same n images" in message
    assert "same classes" in message


def naive_logit_gap(logits: np.ndarray, below: int) -> np.ndarray:
    """The published definition, with a sort of each row."""
    return np.array([row[-1] - row[-1 - below : -1].mean() for row in np.sort(logits, axis=1)])


@pytest.mark.parametrize(
    ("classes", "below"), [(2, 1), (3, 1), (10, 5), (20, 10), (99, 49), (100, 20), (104, 20), (1000, 200)]
)
def test_logit_gap_reads_as_many_logits_as_the_papers_table(classes: int, below: int) -> None:
    logits = 3 * torch.randn(30, classes, generator=torch.Generator().manual_seed(classes))
    expected = torch.from_numpy(naive_logit_gap(logits.double().numpy(), below))
    torch.testing.assert_close(logit_gap(logits, 1.0).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logit_gap(logits, 1.0), logit_gap(logits, 1.0, top_n=below))


def test_logit_gap_between_its_neighbours() -> None:
    """One logit below the largest is the margin, all of them the distance from their mean."""
    logits = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = logits.topk(2).values.unbind(-1)
    torch.testing.assert_close(score("logit_gap", logits, top_n=1).double(), first - second, rtol=1e-5, atol=1e-6)
    others = (logits.sum(-1) - first) / 11
    torch.testing.assert_close(score("logit_gap", logits, top_n=11).double(), first - others, rtol=1e-5, atol=1e-6)
    gaps = [score("logit_gap", logits, top_n=below) for below in range(1, 12)]
    assert all((wider >= narrower).all() for narrower, wider in itertools.pairwise(gaps))


@pytest.mark.parametrize("wrong", [0, 12, -1, 2.0, True, "5"])
def test_logit_gap_of_too_many_or_no_logits(wrong: Any) -> None:
    message = message_of(score, "logit_gap", torch.zeros(3, 12), top_n=wrong)
    assert f"top_n is {wrong!r}; there are 12 classes, so give a whole number from 1 to 11" in message


def test_logit_gap_of_one_class() -> None:
    assert "one class; logit_gap compares classes" in message_of(score, "logit_gap", torch.zeros(3, 1))


def naive_neglabel(logits: np.ndarray, negative: np.ndarray, groups: int) -> np.ndarray:
    """The published definition in double precision, group by group, with the labels dealt in turn."""
    kept = negative[:, : negative.shape[1] // groups * groups]
    found = []
    for group in range(groups):
        joined = np.concatenate([logits, kept[:, group::groups]], axis=1)
        weights = np.exp(joined - joined.max(1, keepdims=True))
        found.append(weights[:, : logits.shape[1]].sum(1) / weights.sum(1))
    return np.mean(found, axis=0)


@pytest.mark.parametrize(("labels", "groups"), [(1, 1), (7, 1), (99, 1), (250, 2), (1055, 10), (20100, 100)])
def test_neglabel_has_groups_of_a_hundred_and_a_hundred_groups_at_most(labels: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(labels)
    logits, negative = (20 + 4 * torch.randn(12, count, generator=generator) for count in (9, labels))
    expected = torch.from_numpy(naive_neglabel(logits.double().numpy(), negative.double().numpy(), groups))
    torch.testing.assert_close(neglabel(logits, negative).double(), expected, rtol=2e-6, atol=1e-9)
    assert torch.equal(neglabel(logits, negative), neglabel(logits, negative, groups=groups))


def test_neglabel_leaves_the_last_labels_out_that_make_no_group() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, negative = (20 + 4 * torch.randn(12, count, generator=generator) for count in (9, 11))
    by_four = neglabel(logits, negative, groups=4)
    assert torch.equal(by_four, neglabel(logits, negative[:, :8], groups=4))
    assert not torch.equal(by_four, neglabel(logits, negative[:, 3:], groups=4))
    # A group holds every fourth label: exchanging two of one group changes nothing, of two groups something.
    within, across = [4, 1, 2, 3, 0, 5, 6, 7], [1, 0, 2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(neglabel(logits, negative[:, within], groups=4), by_four, rtol=1e-6, atol=0)
    assert (neglabel(logits, negative[:, across], groups=4) - by_four).abs().max() > 1e-4


def test_neglabel_of_a_clip_is_at_the_published_temperature() -> None:
    """Softmax of cosines over 0.01, on logits of a model whose scale is 100."""
    generator = torch.Generator().manual_seed(0)
    cosines, negative = (0.2 + 0.03 * torch.randn(12, count, generator=generator) for count in (9, 40))
    found = scores.score("neglabel", Logits(100 * cosines, None, 100.0, negative=100 * negative))
    expected = torch.cat([cosines, negative], dim=1).double().div(0.01).softmax(-1)[:, :9].sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_neglabel_falls_with_the_negative_labels() -> None:
    logits = torch.zeros(24, 5)
    rising = torch.arange(24.0)[:, None].expand(-1, 6)
    assert (neglabel(logits, rising).diff() < 0).all()


def test_neglabel_without_its_labels() -> None:
    message = message_of(scores.score, "neglabel", Logits(torch.zeros(2, 3), None, 100.0))
    assert "'neglabel' reads what is not there: negative_logits" in message
    assert "Give negative_labels, or take a score that does without" in message
    message = message_of(neglabel, torch.zeros(2, 3), torch.zeros(3, 4))
    assert "global_logits are of 2 images and negative_logits of 3" in message
    assert "no negative labels" in message_of(neglabel, torch.zeros(2, 3), torch.zeros(2, 0))
    for wrong in (0, 5, 1.0, False):
        message = message_of(neglabel, torch.zeros(2, 3), torch.zeros(2, 4), groups=wrong)
        assert f"groups is {wrong!r}; there are 4 negative labels, so give a whole number from 1 to 4" in message


def test_what_is_no_logits_and_no_temperature() -> None:
    assert "logits is a Tensor; give Logits(" in message_of(scores.score, "mcm", torch.zeros(2, 3))
    for wrong in (None, "100", [1.0]):
        assert f"temperature is {wrong!r}; give a positive number" in message_of(scores.mcm, torch.zeros(2, 3), wrong)
