"""The gradient that a screened search follows: right, whatever the data is cut into, and gone without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, PatchMetricObjective, SeTARConfig, search_rank_ratios
from setar_peft.backbones import ImageFeatures, backbone_of
from setar_peft.backbones.activations import quick_gelu
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.objectives.loss import LossValues
from setar_peft.search.evaluate import Evaluator
from setar_peft.search.plan import plan_search
from setar_peft.search.replay import ReplayEvaluator
from setar_peft.search.trace import SearchTrace
from tests.conftest import GOLDEN
from tests.search.processes import in_two_processes

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]

ALL = [
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
    *("visual_projection", "text_projection"),
]


def gradients_of(model: CLIPModel, objective: Any, criterion: str = "total", **settings: Any) -> dict[str, Tensor]:
    """The gradients of a search's evaluator."""
    config = SeTARConfig(search="screened", **{"target_modules": ALL, **settings})
    plan = plan_search(model, objective, config)
    assert plan.backbone is not None
    with left_as_it_was(model):
        evaluator = ReplayEvaluator(
            objective,
            plan.backbone,
            list(plan.locations),
            "minor",
            0,
            keep_decompositions=True,
            recording_memory=config.recording_memory,
        )
        evaluator.present()
        return evaluator.gradients(criterion)


def loss_in_float64(model: CLIPModel, tokens: dict[str, Tensor], pixels: Tensor, labels: Tensor) -> list[Tensor]:
    """The LoCoOp loss with top_k 2 and its parts, by a float64 model's stock forward and nothing of the package."""
    last = model.vision_model.encoder.layers[-1]
    entered: list[Tensor] = []
    with_hook = last.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    pooled = model.get_image_features(pixel_values=pixels.double()).pooler_output
    with_hook.remove()
    patches = entered[0][:, 1:]
    patches = patches + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(patches)))
    patches = patches + last.mlp(last.layer_norm2(patches))
    local = model.visual_projection(model.vision_model.post_layernorm(patches))
    text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    scale = model.logit_scale.exp()
    logits, local_logits = (scale * F.normalize(features, dim=-1) @ text.T for features in (pooled, local))
    true = local_logits[torch.arange(len(labels)), :, labels]
    likely = local_logits[(local_logits > true[..., None]).sum(-1) >= 2].softmax(-1)
    id_loss = F.cross_entropy(logits, labels)
    ood_loss = (likely * (likely + 1e-5).log()).sum(-1).mean()
    return [id_loss + 0.1 * ood_loss, id_loss, ood_loss]


@pytest.mark.parametrize("criterion", ["total", "id", "ood"])
def test_is_what_finite_differences_in_float64_find(load_clip: Clip, clip_objective: Objective, criterion: str) -> None:
    objective, index = clip_objective(batch_size=7), ["total", "id", "ood"].index(criterion)
    found = gradients_of(load_clip(), objective, criterion)
    # Eager attention has its softmax in float32, whatever the model's dtype.
    exact = CLIPModel.from_pretrained(GOLDEN / "cases" / "clip_tiny", attn_implementation="sdpa").eval().double()
    tokens = objective.class_tokens(backbone_of(exact))
    pixels, labels = objective.images._images, objective.images.labels
    generator = torch.Generator().manual_seed(0)
    assert len(found) == 4 * 6 + 3 * 6 + 2
    for name, gradient in found.items():
        weight = exact.get_submodule(name).weight
        before = weight.detach().clone()
        assert gradient.shape == weight.shape
        assert gradient.dtype == torch.float32
        # Of the OOD loss the last block's queries and keys have none: patches take its value path.
        last = tuple(f"vision_model.encoder.layers.3.self_attn.{part}_proj" for part in "qk")
        assert bool(gradient.any()) != (criterion == "ood" and name in last)
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        # Along the gradient and along a random direction.
        for direction in (gradient.double() / gradient.double().norm().clamp(min=1e-12), noise / noise.norm()):
            ends = []
            for step in (1e-6, -1e-6):  # short of a patch that changes sides
                with torch.no_grad():
                    weight.copy_(before + step * direction)
                    ends.append(float(loss_in_float64(exact, tokens, pixels, labels)[index]))
                    weight.copy_(before)
            slope = (ends[0] - ends[1]) / 2e-6
            along = float((gradient.double() * direction).sum())
            assert along == pytest.approx(slope, abs=2e-4 * float(gradient.norm()) + 1e-7), name


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("memory", [None, 0.0])
def test_how_the_data_is_cut_changes_nothing(
    load_clip: Clip, clip_objective: Objective, batch_size: int, memory: float | None
) -> None:
    whole = gradients_of(load_clip(), clip_objective(batch_size=24))
    objective = clip_objective(batch_size=batch_size)
    objective.prompt_batch_size = batch_size
    cut = gradients_of(load_clip(), objective, recording_memory=memory)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))


def test_chunks_of_local_logits_change_nothing(
    load_clip: Clip, clip_objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients_of(load_clip(), clip_objective())
    monkeypatch.setattr("setar_peft.objectives.loss.LOCAL_LOGITS_CHUNK", {"cpu": 6 * 5})
    cut = gradients_of(load_clip(), clip_objective())
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))


def order_of_candidates(trace: SearchTrace) -> list[tuple[str, float]]:
    """Every candidate by what is predicted of it."""
    predictions = [one for one in trace.predictions if one.step == 0 and one.rank_ratio > 0]
    return [(one.module, one.rank_ratio) for one in sorted(predictions, key=lambda one: one.change)]


def test_batches_and_processes_give_the_same_order_of_candidates(
    load_clip: Clip, clip_objective: Objective, tmp_path: Path
) -> None:
    config = SeTARConfig(search="screened", target_modules=ALL[:6], order="best_first", evaluations=6)
    traces = [
        search_rank_ratios(load_clip(), clip_objective(batch_size=size), config, progress=False).trace
        for size in (24, 7, 1)
    ]
    in_two_processes(lambda _: ["-c", IN_A_PROCESS, str(GOLDEN), str(tmp_path), json.dumps(ALL[:6])])
    processes = [SearchTrace.load(tmp_path / f"{index}.json") for index in range(2)]
    assert processes[0].predictions == processes[1].predictions
    for trace in (*traces[1:], processes[0]):
        assert order_of_candidates(trace) == order_of_candidates(traces[0])
        assert [row.module for row in trace.rows] == [row.module for row in traces[0].rows]
        assert [row.best_ratio for row in trace.rows] == [row.best_ratio for row in traces[0].rows]


IN_A_PROCESS = """
import json, pathlib, sys
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel
from setar_peft import LoCoOpObjective, SeTARConfig, search_rank_ratios
from setar_peft.processes import Processes

golden, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
tensors = load_file(golden / "tensors_clip_tiny.safetensors")
tokenizer = AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")
names = json.loads((golden / "cases" / "classes.json").read_text())
model = CLIPModel.from_pretrained(golden / "cases" / "clip_tiny", attn_implementation="eager").eval()
images, labels = tensors["pixel_values"], tensors["labels"]
objective = LoCoOpObjective(tokenizer, names, images, labels, ood_weight=0.1, top_k=2, batch_size=5)
config = SeTARConfig(search="screened", target_modules=json.loads(sys.argv[3]), order="best_first", evaluations=6)
trace = search_rank_ratios(model, objective, config, progress=False).trace
trace.save(output / f"{Processes(model.device).index}.json")
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_has_the_gradient_of_its_weights_in_float32(
    load_clip: Clip, clip_objective: Objective, dtype: torch.dtype
) -> None:
    half = load_clip(dtype=dtype)
    before = {name: (id(value), value.clone()) for name, value in half.named_parameters()}
    found = gradients_of(half, clip_objective(batch_size=7))
    exact = gradients_of(load_clip(dtype=dtype).float(), clip_objective(batch_size=7))
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        # The recorded inputs of the first blocks, and nothing after them, are rounded to half precision.
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02), name
    for name, value in half.named_parameters():
        assert id(value) == before[name][0]
        assert value.dtype == dtype
        assert torch.equal(value, before[name][1])


def test_a_float64_model_has_its_gradient_in_float64(load_clip: Clip, clip_objective: Objective) -> None:
    found = gradients_of(load_clip().double(), clip_objective())
    for name, gradient in gradients_of(load_clip(), clip_objective()).items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name].float(), gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_the_model_keeps_its_gradients_and_flags(load_clip: Clip, clip_objective: Objective) -> None:
    """A model in training: gradients that wait for an optimiser's step, and frozen parameters beside trained ones."""
    model = load_clip().train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
        if index % 3 == 1:
            parameter.grad = torch.full_like(parameter, 7.0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    search_rank_ratios(model, clip_objective(), SeTARConfig(search="screened"), progress=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for index, parameter in enumerate(model.parameters()):
        assert (parameter.grad is None) == (index % 3 != 1)
        assert parameter.grad is None or bool((parameter.grad == 7).all())
    assert all(module.training for module in model.modules())


class _NoGradientForever(LoCoOpObjective):
    def sums(self, *args: Any) -> Tensor:
        return super().sums(*args).detach()


class _Constant(LoCoOpObjective):
    def sums(self, features: ImageFeatures, classes: Any, labels: Tensor) -> Tensor:
        return super().sums(features, classes, labels) * torch.tensor([0, 1, 0, 1, 1, 1])


class _Infinite(LoCoOpObjective):
    def sums(self, features: ImageFeatures, classes: Any, labels: Tensor) -> Tensor:
        # The square root of 0 has no slope.
        return super().sums(features, classes, labels) + (features.pooled * 0).abs().sqrt().sum()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_NoGradientForever, r"_NoGradientForever\.sums gives numbers without a gradient, .*search='greedy'"),
        (_Constant, r"The gradient of the objective is 0 for every layer.*search='greedy'"),
        (_Infinite, r"The gradient of vision.* holds NaN or infinity \(4 of 7 layers\).*search='greedy'"),
    ],
)
def test_an_objective_without_a_gradient_gets_a_sentence(
    load_clip: Clip, clip_objective: Objective, kind: type[LoCoOpObjective], message: str, tmp_path: Path
) -> None:
    objective, model = clip_objective(), load_clip()
    objective.__class__ = kind
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        search_rank_ratios(model, objective, SeTARConfig(search="screened"), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_metric_of_counts_is_refused_before_anything_is_computed(load_clip: Clip, clip_objective: Objective) -> None:
    loss = clip_objective()
    metric = PatchMetricObjective(loss._prompts._tokenizer, loss.class_names, loss.images._images, loss.images.labels)
    metric.batches = None  # type: ignore[assignment,method-assign]
    with pytest.raises(ValueError, match=r"follows the gradient .*PatchMetricObjective counts .*search='greedy'"):
        search_rank_ratios(load_clip(), metric, SeTARConfig(search="screened"), progress=False)


def _stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def _squares(model: nn.Module) -> Tensor:
    return (model(torch.linspace(-1, 1, 80).view(10, 8)) - 0.3).square().mean()


@pytest.mark.parametrize("order", ["vision_text", "best_first", "joint"])
def test_a_callable_that_returns_a_tensor_is_followed(order: str) -> None:
    model = _stack()
    config = SeTARConfig(search="screened", target_modules=["0", "2"], candidate_ratios=[0.25, 0.5], order=order)
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    trace = search_rank_ratios(model, _squares, config, progress=False).trace
    gradients = torch.autograd.grad(_squares(model), [model[0].weight, model[2].weight])
    for one in trace.predictions:
        if one.step or not one.rank_ratio:
            continue
        weight, gradient = model[int(one.module)].weight, gradients[int(one.module) // 2]
        u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        removed = slice(len(s) - round(one.rank_ratio * len(s)), None)
        expected = -(gradient * ((u[:, removed] * s[removed]) @ vh[removed])).sum()
        assert one.change == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
        assert one.energy == pytest.approx(float(s[removed].square().sum() / s.square().sum()), rel=1e-4)
    assert all(
        (id(value), True) == (before[n][0], torch.equal(value, before[n][1])) for n, value in model.named_parameters()
    )
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            lambda model: float(_squares(model).detach()),
            r"The objective returned a float, and a screened search follows",
        ),
        (lambda model: _squares(model).detach(), r"The objective returned a tensor without a gradient, .*no_grad"),
        (torch.no_grad()(_squares), r"The objective returned a tensor without a gradient, .*search='greedy'"),
        (lambda model: model[0].weight.sum(0), r"returned tensor\(.*one number"),
        (lambda model: model[0].bias.square().sum(), r"gradient of the objective is 0 for every layer"),
    ],
)
def test_a_callable_without_a_gradient_gets_a_sentence(objective: Any, message: str) -> None:
    config = SeTARConfig(search="screened", target_modules=["0", "2"], candidate_ratios=[0.25, 0.5])
    with pytest.raises(ValueError, match=message):
        search_rank_ratios(_stack(), objective, config, progress=False)


def test_inference_mode_gets_a_sentence() -> None:
    config = SeTARConfig(search="screened", target_modules=["0", "2"], candidate_ratios=[0.25, 0.5])
    with torch.inference_mode(), pytest.raises(ValueError, match=r"within torch\.inference_mode\(\) there are none"):
        search_rank_ratios(_stack(), _squares, config, progress=False)


def test_a_layer_that_a_callable_does_not_use_has_no_predicted_change() -> None:
    config = SeTARConfig(search="screened", target_modules=["0", "2"], candidate_ratios=[0.25], order="best_first")
    trace = search_rank_ratios(_stack(), lambda model: model[0].weight.square().sum(), config, progress=False).trace
    assert {one.module for one in trace.predictions if one.change == 0 and one.rank_ratio > 0} == {"2"}
    assert [(candidate.module, candidate.rank_ratio) for candidate in trace.candidates] == [("0", 0.25)]


class _Ratio(LoCoOpObjective):
    """A loss that is no sum of its sums: the logarithm of one over a power of another."""

    def values(self, sums: Any) -> LossValues:
        id_sum, images, ood_sum, ood_patches, *_ = (float(value) for value in sums)
        return LossValues(torch.tensor(id_sum / images).log().item() - (ood_sum / ood_patches) ** 3)


def test_the_slope_of_any_loss_by_its_sums(clip_objective: Objective) -> None:
    sums = torch.tensor([15.0, 24.0, -31.5, 104.0, 384.0, 20.0], dtype=torch.float64)
    objective = clip_objective()
    total, identity, ood = (objective.slope(sums, criterion) for criterion in ("total", "id", "ood"))
    expected_id = torch.tensor([1 / 24, -15 / 24**2, 0, 0, 0, 0], dtype=torch.float64)
    expected_ood = torch.tensor([0, 0, 1 / 104, 31.5 / 104**2, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(identity, expected_id, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(ood, expected_ood, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(total, expected_id + 0.1 * expected_ood, rtol=1e-8, atol=1e-11)
    none = objective.slope(torch.tensor([15.0, 24.0, 0.0, 0.0, 384.0, 20.0]), "total")
    assert torch.isfinite(none).all()
    assert float(none[2]) == 0
    objective.__class__ = _Ratio
    share = 31.5 / 104
    expected = torch.tensor([1 / 15, -1 / 24, -3 * share**2 / 104, -3 * share**3 / 104 * -1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(objective.slope(sums)[:3], expected[:3], rtol=1e-4, atol=1e-8)


def test_out_of_memory_halves_the_batch_and_changes_no_prediction(load_clip: Clip, clip_objective: Objective) -> None:
    class ShortOfMemory(LoCoOpObjective):
        def sums(self, features: ImageFeatures, classes: Any, labels: Tensor) -> Tensor:
            if torch.is_grad_enabled() and len(labels) > 7:
                raise torch.OutOfMemoryError("out of memory")
            return super().sums(features, classes, labels)

    config = SeTARConfig(search="screened")
    roomy = search_rank_ratios(load_clip(), clip_objective(), config, progress=False)
    objective = clip_objective()
    objective.__class__ = ShortOfMemory
    with pytest.warns(RuntimeWarning, match="Out of memory with") as warned:
        tight = search_rank_ratios(load_clip(), objective, config, progress=False)
    assert [str(one.message).split(" images")[0][-2:] for one in warned] == ["24", "12"]
    assert tight.rank_ratios == roomy.rank_ratios
    assert order_of_candidates(tight.trace) == order_of_candidates(roomy.trace)


def test_little_host_memory_halves_the_batch_before_the_system_kills(
    load_clip: Clip, clip_objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([50, 20, 3])  # GB of 100: for the recordings, and at the first two blocks; then enough
    room = lambda: SimpleNamespace(available=next(free, 50) * 1e9, total=1e11)  # noqa: E731
    roomy = search_rank_ratios(load_clip(), clip_objective(), SeTARConfig(search="screened"), progress=False)
    monkeypatch.setattr("psutil.virtual_memory", room)
    with pytest.warns(
        RuntimeWarning, match="Out of memory with 24 images or prompts a batch; the search goes on with 12"
    ):
        tight = search_rank_ratios(load_clip(), clip_objective(), SeTARConfig(search="screened"), progress=False)
    assert order_of_candidates(tight.trace) == order_of_candidates(roomy.trace)


def test_the_activation_of_gpus_has_the_gradient_of_the_stock_one() -> None:
    inputs = (5 * torch.randn(1000, dtype=torch.float64)).requires_grad_()
    fused, stock = quick_gelu(inputs), inputs * torch.sigmoid(1.702 * inputs)
    (of_fused,), (of_stock,) = (torch.autograd.grad(outputs.sum(), inputs) for outputs in (fused, stock))
    torch.testing.assert_close(of_fused, of_stock)


def test_a_gradient_takes_no_part_of_a_tower_that_is_not_searched(load_clip: Clip, clip_objective: Objective) -> None:
    """Its blocks run once, on the way to the loss of the base, without a graph."""
    for order, other in (("vision", "text"), ("text", "vision")):
        model, seen = load_clip(), []
        block = getattr(model, f"{other}_model").encoder.layers[1].mlp
        block.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output.requires_grad))
        config = SeTARConfig(search="screened", order=order, target_modules=["mlp.fc1"], evaluations=None)
        search_rank_ratios(model, clip_objective(), config, progress=False)
        assert seen == [False]


def test_what_is_followed_is_the_evaluators_own(load_clip: Clip, clip_objective: Objective) -> None:
    """Prove that the comparison can fail: a gradient of the other sign chooses other candidates."""
    config = SeTARConfig(search="screened", verify=1)
    right = search_rank_ratios(load_clip(), clip_objective(), config, progress=False).trace
    with pytest.MonkeyPatch.context() as patch:
        own = ReplayEvaluator.gradients
        patch.setattr(ReplayEvaluator, "gradients", lambda *args: {name: -value for name, value in own(*args).items()})
        wrong = search_rank_ratios(load_clip(), clip_objective(), config, progress=False).trace
    assert issubclass(ReplayEvaluator, Evaluator)
    assert wrong.rows[-1].total_loss > right.rows[-1].total_loss
