"""The split of a weight: algebra, rank rule, strategies, agreement with the published code, refusals."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPModel

from setar_peft.decomposition import (
    PRUNE_STRATEGIES,
    Residual,
    base_agreement,
    check_rank_ratio,
    decompose,
    gram_eigenvectors,
    kept_rank,
    residual_rank,
    tensor_digest,
)

SHAPES = [(12, 7), (7, 12), (9, 9), (1, 5), (6, 1)]
RATIOS = [0.0, 0.1, 0.25, 0.5, 0.9]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _weight(shape: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestRankRule:
    @pytest.mark.parametrize(
        ("shape", "ratio", "kept"),
        [
            ((768, 3072), 0.2, 614),  # 614.4
            ((768, 768), 0.05, 730),  # 729.6
            # Halves go to the even neighbour, as in the published code's `round`.
            ((10, 40), 0.25, 8),  # 7.5
            ((40, 10), 0.35, 6),  # 6.5
            ((10, 10), 0.15, 8),  # 8.5
            ((2, 20), 0.25, 2),  # 1.5
            ((1, 5), 0.5, 0),  # 0.5
            ((1, 5), 0.4, 1),
            ((64, 64), 0.0, 64),
        ],
    )
    def test_kept_rank_rounds_in_one_place(self, shape: tuple[int, int], ratio: float, kept: int) -> None:
        assert kept_rank(shape, ratio) == kept
        assert residual_rank(shape, ratio) == min(shape) - kept

    @pytest.mark.parametrize("ratio", [1, 1.2, -0.1, math.nan, math.inf, "0.2", None, True])
    def test_refuses_what_is_no_share(self, ratio: object) -> None:
        with pytest.raises(ValueError, match=r"\[0, 1\)") as error:
            check_rank_ratio(ratio, "rank_ratios['fc']")  # type: ignore[arg-type]
        assert "rank_ratios['fc']" in str(error.value)
        assert repr(ratio) in str(error.value)

    def test_an_integer_zero_is_a_ratio(self) -> None:
        assert check_rank_ratio(0) == 0.0


class TestSplit:
    @pytest.mark.parametrize("prune", PRUNE_STRATEGIES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("ratio", RATIOS)
    def test_weight_is_kept_part_plus_residual(self, shape: tuple[int, int], ratio: float, prune: str) -> None:
        weight = _weight(shape)
        split = decompose(weight, prune)  # type: ignore[arg-type]
        b0, a0 = split.residual(ratio)
        assert b0.shape == (shape[0], residual_rank(shape, ratio))
        assert a0.shape == (residual_rank(shape, ratio), shape[1])
        torch.testing.assert_close(split.kept(ratio) + b0 @ a0, weight, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_rank(split.kept(ratio)) == kept_rank(shape, ratio)

    def test_minor_keeps_the_best_approximation(self) -> None:
        # Eckart and Young: the error of the best rank-k approximation is the norm of the singular values left out.
        weight = _weight((20, 11))
        values = torch.linalg.svdvals(weight)
        split = decompose(weight)
        for ratio in RATIOS:
            error = (weight - split.kept(ratio)).norm()
            torch.testing.assert_close(error, values[kept_rank((20, 11), ratio) :].norm(), rtol=1e-10, atol=1e-12)

    def test_principal_removes_what_minor_keeps(self) -> None:
        weight = _weight((10, 14))
        minor, principal = decompose(weight), decompose(weight, "principal")
        b0, a0 = principal.residual(0.6)
        torch.testing.assert_close(minor.kept(0.4), b0 @ a0)

    def test_both_factors_carry_the_root_of_the_singular_values(self) -> None:
        weight = _weight((8, 13))
        b0, a0 = decompose(weight).residual(0.5)
        values = torch.linalg.svdvals(weight)[4:]
        torch.testing.assert_close(b0.norm(dim=0), values.sqrt())
        torch.testing.assert_close(a0.norm(dim=1), values.sqrt())

    @pytest.mark.parametrize("prune", PRUNE_STRATEGIES)
    def test_a_larger_ratio_removes_what_a_smaller_one_does(self, prune: str) -> None:
        split = decompose(_weight((30, 20)), prune)  # type: ignore[arg-type]
        removed = [set(split.removed_components(ratio).tolist()) for ratio in RATIOS]
        assert all(small <= large for small, large in itertools.pairwise(removed))

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_every_float_dtype_is_split_in_float32_or_better(self, dtype: torch.dtype) -> None:
        weight = _weight((24, 16), dtype)
        b0, a0 = decompose(weight).residual(0.3)
        assert b0.dtype == a0.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = decompose(weight.double()).residual(0.3)
        torch.testing.assert_close((b0 @ a0).double(), exact.b0 @ exact.a0, rtol=0, atol=1e-5)

    def test_the_weight_is_not_touched(self) -> None:
        weight = torch.nn.Parameter(_weight((6, 5)))
        before = weight.detach().clone()
        split = decompose(weight)
        split.residual(0.5).b0.add_(1)
        assert torch.equal(weight, before)
        assert not split.kept(0.5).requires_grad


class TestByGram:
    """The decomposition of GPUs and of screened searches: one side's vectors, by a Gram matrix."""

    @pytest.mark.parametrize("prune", PRUNE_STRATEGIES)
    @pytest.mark.parametrize("shape", [*SHAPES, (192, 48), (48, 192)])
    def test_serves_every_ratio_as_the_singular_value_decomposition_does(
        self, shape: tuple[int, int], prune: str
    ) -> None:
        weight = _weight(shape, torch.float32)
        exact, by_gram = decompose(weight.double(), prune), decompose(weight, prune, by_gram=True)  # type: ignore[arg-type]
        torch.testing.assert_close(by_gram.s, exact.s.float(), rtol=1e-6, atol=1e-6)
        for ratio in RATIOS:
            kept, (b0, a0) = by_gram.kept(ratio), by_gram.residual(ratio)
            assert kept.dtype == b0.dtype == a0.dtype == torch.float32
            assert (b0.shape, a0.shape) == tuple(part.shape for part in exact.residual(ratio))
            torch.testing.assert_close(kept.double(), exact.kept(ratio), rtol=0, atol=5e-6)
            torch.testing.assert_close(kept + b0 @ a0, weight, rtol=0, atol=5e-6)
            # Both sides carry the root of the singular values, as the factors that are fine-tuned do.
            roots = exact.s[exact.removed_components(ratio)].sqrt().float()
            torch.testing.assert_close(b0.norm(dim=0), roots, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a0.norm(dim=1), roots, rtol=1e-4, atol=1e-5)

    def test_the_vectors_are_orthonormal(self) -> None:
        values, vectors = gram_eigenvectors(_weight((40, 24), torch.float32))
        assert (values.shape, vectors.shape) == ((24,), (24, 24))
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(24), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
    def test_a_weight_of_low_rank(self, shape: tuple[int, int]) -> None:
        weight = (_weight((shape[0], 2)) @ _weight((2, shape[1]), seed=1)).float()
        split = decompose(weight, by_gram=True)
        b0, a0 = split.residual(0.7)
        assert torch.isfinite(b0).all()
        assert torch.isfinite(a0).all()
        torch.testing.assert_close(split.kept(0.7), weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(b0 @ a0, torch.zeros(shape), rtol=0, atol=1e-5)

    def test_a_weight_of_zeros(self) -> None:
        split = decompose(torch.zeros(4, 3), by_gram=True)
        assert torch.equal(split.kept(0.4), torch.zeros(4, 3))
        assert not any(part.any() for part in split.residual(0.4))

    def test_is_nearer_to_the_exact_kept_part_than_a_float32_decomposition(self) -> None:
        weight = _weight((192, 48), torch.float32)
        exact = decompose(weight.double()).kept(0.25)
        by_gram = decompose(weight, by_gram=True).kept(0.25)
        assert (by_gram - exact).abs().max() < (decompose(weight).kept(0.25) - exact).abs().max()

    def test_a_float64_weight_goes_through_an_svd(self) -> None:
        weight = _weight((9, 6))
        assert torch.equal(decompose(weight, by_gram=True).kept(0.3), decompose(weight).kept(0.3))


class TestContributions:
    @pytest.mark.parametrize("by_gram", [False, True])
    @pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
    def test_are_the_inner_products_with_what_is_removed(self, shape: tuple[int, int], by_gram: bool) -> None:
        """To first order the loss changes by -<G, B0 A0>, whichever side's vectors are at hand."""
        dtype = torch.float32 if by_gram else torch.float64
        weight, gradient = _weight(shape, dtype), _weight(shape, dtype, seed=3)
        split = decompose(weight, "random", by_gram=by_gram)
        contributions = split.contributions(gradient)
        assert contributions.shape == (min(shape),)
        for ratio in RATIOS:
            b0, a0 = split.residual(ratio)
            predicted = contributions[split.removed_components(ratio)].sum()
            torch.testing.assert_close(predicted, -(gradient * (b0 @ a0)).sum(), rtol=1e-4, atol=1e-5)
        # One by one, by vectors that LAPACK found.
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        expected = -s * torch.einsum("mi,mn,in->i", u, gradient.double(), vh)
        torch.testing.assert_close(contributions.double(), expected, rtol=1e-4, atol=1e-5)


class TestDigest:
    def test_equal_tensors_have_equal_digests_and_others_others(self) -> None:
        weight = _weight((4, 6), torch.float32)
        assert tensor_digest(weight) == tensor_digest(weight.T.contiguous().T)
        changed = weight.clone()
        changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
        others = [changed, weight.T, weight.double(), weight.flatten(), weight[:0], torch.tensor(1.0)]
        assert len({tensor_digest(tensor) for tensor in [weight, *others]}) == 1 + len(others)


class TestRandomStrategy:
    def test_is_drawn_once_a_layer_from_the_seed(self) -> None:
        weight = _weight((40, 40))
        first = decompose(weight, "random", seed=5, name="blocks.0.fc1")
        again = decompose(weight, "random", seed=5, name="blocks.0.fc1")
        assert torch.equal(first.removal_order, again.removal_order)
        for other in (
            decompose(weight, "random", seed=6, name="blocks.0.fc1"),
            decompose(weight, "random", seed=5, name="blocks.1.fc1"),
        ):
            assert not torch.equal(first.removal_order, other.removal_order)

    def test_depends_neither_on_what_was_drawn_before_nor_on_the_global_generator(self) -> None:
        weight = _weight((40, 40))
        alone = decompose(weight, "random", name="b").removal_order
        torch.manual_seed(123)
        decompose(weight, "random", name="a")
        state = torch.get_rng_state()
        assert torch.equal(decompose(weight, "random", name="b").removal_order, alone)
        assert torch.equal(torch.get_rng_state(), state)

    def test_is_a_permutation_unlike_the_other_strategies(self) -> None:
        order = decompose(_weight((50, 60)), "random").removal_order
        assert sorted(order.tolist()) == list(range(50))
        assert order.tolist() != sorted(order.tolist())
        assert order.tolist() != sorted(order.tolist(), reverse=True)


class TestAgreementWithThePublishedCode:
    @pytest.mark.parametrize(("stored", "prune"), [("small", "minor"), ("large", "principal")])
    def test_pruned_weights(self, golden: Path, golden_clip: dict[str, Tensor], stored: str, prune: str) -> None:
        with safe_open(golden / "tensors_clip_tiny.safetensors", "pt") as file:
            settings = json.loads(file.metadata()["settings"])
        model = CLIPModel.from_pretrained(golden / "cases" / "clip_tiny")
        towers = {"visual": "vision_model.encoder", "text": "text_model.encoder"}
        parts = {"W_up": "mlp.fc1", "W_down": "mlp.fc2", "W_q": "self_attn.q_proj", "W_o": "self_attn.out_proj"}
        compared = 0
        for tower, weight_type, block, ratio in settings:
            name = (
                "visual_projection" if weight_type == "W_p" else f"{towers[tower]}.layers.{block}.{parts[weight_type]}"
            )
            weight = model.get_submodule(name).weight
            split = decompose(weight, prune)  # type: ignore[arg-type]
            expected = golden_clip[f"pruned_{stored}.{name}.weight"]
            b0, a0 = split.residual(ratio)
            torch.testing.assert_close(split.kept(ratio), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(weight.detach() - b0 @ a0, expected, rtol=0, atol=1e-5)
            # A guard that cannot fail is none: the weight itself is far from the pruned one.
            assert (weight - expected).abs().max() > 1e-3
            compared += 1
        assert compared == 6


class TestRefusals:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_weight_that_is_not_finite(self, value: float) -> None:
        weight = _weight((4, 3))
        weight[1, 2] = value
        with pytest.raises(ValueError, match="NaN or infinity") as error:
            decompose(weight, name="vision.fc1")
        assert "vision.fc1" in str(error.value)
        assert "Load the checkpoint again" in str(error.value)

    @pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
    def test_a_weight_that_is_no_matrix(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="only a 2-D weight") as error:
            decompose(torch.ones(shape), name="conv")
        assert f"conv has shape {shape}" in str(error.value)
        assert "target_modules" in str(error.value)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
    def test_a_weight_that_is_not_floating(self, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match="only a floating-point weight") as error:
            decompose(torch.ones(3, 3, dtype=dtype))
        assert str(dtype) in str(error.value)

    def test_an_unknown_strategy(self) -> None:
        with pytest.raises(ValueError, match="prune is 'small'") as error:
            decompose(torch.ones(3, 3), "small")  # type: ignore[arg-type]
        assert all(repr(name) in str(error.value) for name in PRUNE_STRATEGIES)

    @pytest.mark.parametrize("ratio", [1.0, -0.2, 1.2])
    def test_a_ratio_out_of_range(self, ratio: float) -> None:
        split = decompose(_weight((4, 3)))
        for method in (split.residual, split.kept, split.removed_components):
            with pytest.raises(ValueError, match=r"\[0, 1\)"):
                method(ratio)


class TestBaseAgreement:
    @pytest.mark.parametrize("prune", PRUNE_STRATEGIES)
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_is_one_for_the_weight_that_the_residual_came_from(self, prune: str, dtype: torch.dtype) -> None:
        weight = _weight((64, 48), dtype)
        assert base_agreement(weight, decompose(weight, prune).residual(0.3)) == pytest.approx(1, abs=1e-4)  # type: ignore[arg-type]

    def test_is_near_zero_for_another_weight(self) -> None:
        residual = decompose(_weight((64, 48)), "principal").residual(0.3)
        assert abs(base_agreement(_weight((64, 48), seed=1), residual)) < 0.2

    def test_equals_its_definition(self) -> None:
        weight, residual = _weight((9, 7)), decompose(_weight((9, 7), seed=2)).residual(0.4)
        product = residual.b0 @ residual.a0
        expected = (product * weight).sum() / product.pow(2).sum()
        assert base_agreement(weight, residual) == pytest.approx(float(expected), rel=1e-6)

    def test_does_not_overflow_in_float64(self) -> None:
        weight = _weight((9, 7)) * 1e30
        assert base_agreement(weight, decompose(weight).residual(0.4)) == pytest.approx(1, abs=1e-4)

    def test_is_undefined_for_an_empty_residual(self) -> None:
        assert math.isnan(base_agreement(_weight((4, 3)), Residual(torch.zeros(4, 0), torch.zeros(0, 3))))
