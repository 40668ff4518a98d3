"""The LoCoOp loss against plain references, however the data is cut, and fused by a compiler."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from setar_peft import LoCoOpObjective, search_rank_ratios
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


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask for the fused loss, and forget it afterwards."""
    monkeypatch.setenv(losses.COMPILE_VARIABLE, "1")
    forget = losses._fused_patch_sums.cache_clear
    forget()
    yield
    forget()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")  # what torch's own compiler imports
@pytest.mark.usefixtures("compiled", "one_thread")
def test_a_fused_loss_takes_the_same_decisions(
    data: Any,
    load_clip: Callable[..., CLIPModel],
    clip_objective: Callable[..., LoCoOpObjective],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    compiled_sums = losses._fused_patch_sums()
    monkeypatch.setattr(losses, "_fused_patch_sums", lambda: lambda *args: calls.append(1) or compiled_sums(*args))
    with torch.no_grad():
        fused = locoop_sums(*data, top_k=2)
    trace = search_rank_ratios(load_clip(), clip_objective(), progress=False).trace
    assert calls
    monkeypatch.setenv(losses.COMPILE_VARIABLE, "0")
    calls.clear()
    plain = locoop_sums(*data, top_k=2)
    expected = search_rank_ratios(load_clip(), clip_objective(), progress=False).trace
    assert not calls
    assert fused.ood_patches == plain.ood_patches
    torch.testing.assert_close(torch.stack(fused), torch.stack(plain), rtol=1e-6, atol=1e-6)
    assert [row.best_ratio for row in trace.rows] == [row.best_ratio for row in expected.rows]
    assert [candidate.total_loss for candidate in trace.candidates] == pytest.approx(
        [candidate.total_loss for candidate in expected.candidates], abs=1e-6
    )


@pytest.mark.usefixtures("compiled")
def test_a_loss_that_cannot_be_compiled_is_computed_as_it_is(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler.")

    monkeypatch.setattr(torch, "compile", lambda _: broken)
    with pytest.warns(RuntimeWarning, match=r"cannot be compiled.*no compiler\..*SETAR_PEFT_COMPILE=0") as caught:
        sums = [torch.stack(locoop_sums(*data, top_k=2)) for _ in range(2)]
    assert len(caught) == 1
    monkeypatch.setenv(losses.COMPILE_VARIABLE, "0")
    sums.append(torch.stack(locoop_sums(*data, top_k=2)))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.usefixtures("compiled")
def test_running_out_of_memory_is_no_reason_to_give_up_compiling(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda _: full)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            locoop_sums(*data, top_k=2)
