"""The LoCoOp loss against plain references, however the data is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from setar_peft.backbones import ClassWeights
from setar_peft.objectives import loss as losses
from setar_peft.objectives.loss import locoop_loss, locoop_sums, locoop_values, negative_entropy, ood_patch_mask

CLASSES, PATCHES, IMAGES, WIDTH = 7, 5, 12, 16


@pytest.fixture
def data() -> tuple[Tensor, Tensor, ClassWeights, Tensor]:
    """Pooled features, local features, class weights with a bias, and labels."""
    generator = torch.Generator().manual_seed(0)
    pooled, local, weight, bias = (
        torch.randn(*shape, generator=generator)
        for shape in ((IMAGES, WIDTH), (IMAGES, PATCHES, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    )
    return pooled, local, ClassWeights(weight, bias), torch.arange(IMAGES) % CLASSES


def reference(pooled: Tensor, local: Tensor, classes: ClassWeights, labels: Tensor, top_k: int) -> tuple[float, float]:
    """ID and OOD loss in float64, patch by patch, with a sort."""
    bias = classes.bias.double() if classes.bias is not None else 0
    id_loss = F.cross_entropy(pooled.double() @ classes.weight.double().T + bias, labels)
    entropies = []
    for image, label in zip(local.double(), labels.tolist(), strict=True):
        for patch in image:
            logits = classes.weight.double() @ patch + bias
            if label not in logits.argsort(descending=True)[:top_k].tolist():
                entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    return float(id_loss), -float(torch.stack(entropies).mean()) if entropies else 0.0


@pytest.mark.parametrize("top_k", [0, 1, 3, CLASSES])
def test_the_loss_is_that_of_a_plain_reference(data: Any, top_k: int) -> None:
    values = locoop_values(locoop_sums(*data, top_k=top_k, eps=0.0), 0.25)
    id_loss, ood_loss = reference(*data, top_k)
    assert values[:3] == pytest.approx((id_loss + 0.25 * ood_loss, id_loss, ood_loss), rel=1e-6)
    assert values.ood_patch_share == {0: 1.0, CLASSES: 0.0}.get(top_k, values.ood_patch_share)


def test_cutting_the_data_changes_nothing(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.stack(locoop_sums(*data, top_k=2))
    pooled, local, classes, labels = data
    parts = [slice(0, 1), slice(1, 8), slice(8, IMAGES)]
    added = sum(torch.stack(locoop_sums(pooled[p], local[p], classes, labels[p], top_k=2)) for p in parts)
    torch.testing.assert_close(added, whole, rtol=1e-6, atol=1e-6)
    # Chunks of a single patch, and of a number that does not divide the patches.
    for patches in (1, 7):
        monkeypatch.setitem(losses.LOCAL_LOGITS_CHUNK, "cpu", patches * CLASSES)
        torch.testing.assert_close(torch.stack(locoop_sums(*data, top_k=2)), whole, rtol=1e-6, atol=1e-6)


def test_padding_counts_for_nothing(data: Any) -> None:
    pooled, local, classes, labels = data
    mask = torch.ones(IMAGES, PATCHES + 2, dtype=torch.bool)
    mask[:, PATCHES:] = False
    padded = torch.cat([local, torch.full((IMAGES, 2, WIDTH), 1e3)], dim=1)
    with_padding = locoop_sums(pooled, padded, classes, labels, top_k=2, mask=mask)
    torch.testing.assert_close(torch.stack(with_padding), torch.stack(locoop_sums(*data, top_k=2)))
    logits, local_logits = classes.logits(pooled), classes.logits(padded)
    loss = locoop_loss(logits, local_logits, labels, ood_weight=0.25, top_k=2, mask=mask)
    assert loss.item() == pytest.approx(locoop_values(with_padding, 0.25).total, rel=1e-6)


def test_what_is_shown_of_ood_patches_is_what_counts(data: Any) -> None:
    seen: list[Tensor] = []
    sums = locoop_sums(*data, top_k=2, on_ood_patches=seen.append)
    assert len(torch.cat(seen)) == sums.ood_patches
    torch.testing.assert_close(negative_entropy(torch.cat(seen)).double().sum(), sums.ood_loss, rtol=1e-6, atol=1e-6)


def test_ties_are_in_the_true_classs_favour() -> None:
    tied = torch.tensor([[[1.0, 1.0, 0.0]]])
    assert [bool(ood_patch_mask(tied, torch.tensor([label]), 1)) for label in range(3)] == [False, False, True]


def test_the_loss_of_a_batch_is_the_loss_of_its_sums_and_has_a_gradient(data: Any) -> None:
    pooled, local, classes, labels = data
    logits = classes.logits(pooled).requires_grad_()
    local_logits = classes.logits(local).requires_grad_()
    loss = locoop_loss(logits, local_logits, labels, ood_weight=0.25, top_k=2)
    assert loss.item() == pytest.approx(locoop_values(locoop_sums(*data, top_k=2), 0.25).total, rel=1e-6)
    loss.backward()
    assert local_logits.grad is not None
    is_ood = ood_patch_mask(local_logits.detach(), labels, 2)
    assert torch.equal(local_logits.grad.abs().sum(-1) > 0, is_ood)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_probabilities_that_round_to_0_have_a_gradient(eps: float) -> None:
    logits = torch.tensor([[0.0, 200.0, -300.0], [1.0, 2.0, 3.0]], requires_grad=True)
    negative_entropy(logits, eps).sum().backward()
    assert logits.grad is not None
    exact = logits.detach().double().requires_grad_()
    probabilities = exact.softmax(-1).clamp(min=1e-200)
    (probabilities * (probabilities + eps).log()).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


class Passes(TorchDispatchMode):
    """Counts how often tensors of a size are read or written, in multiples of its bytes as float32."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        if func.is_view or func is torch.ops.aten.gather.default:  # moves nothing, or a class of each patch
            return results
        for tensor in tree_leaves((args, kwargs, results)):
            if isinstance(tensor, Tensor) and tensor.numel() == self.elements:
                self.count += tensor.element_size() / 4
        return results


def test_local_logits_are_passed_over_as_often_as_claimed(data: Any) -> None:
    """Written, compared and counted (2.5), softmax (2), eps added (2), x log y (3), summed (1)."""
    with torch.no_grad(), Passes(IMAGES * PATCHES * CLASSES) as passes:
        locoop_sums(*data, top_k=2)
    assert passes.count == 10.5
