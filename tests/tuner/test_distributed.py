"""Sharded and data-parallel training, on the CPU with gloo and two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from setar_peft import SeTARConfig, SeTARLayer
from tests.tuner.models import MLP, inputs

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"),
    pytest.mark.timeout(300),
]
# A ratio of 0 is what a search gives many layers: there must be no parameter that gets no gradient, and no empty one.
RATIOS = {"fc1": 0.25, "fc2": 0.5, "head": 0.0}
STEPS = 3


def _run(rank: int, work: Callable[..., Any], folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save(work(rank, Path(folder)), Path(folder, f"result{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _in_two_processes(work: Callable[..., Any], folder: Path) -> list[Any]:
    torch.multiprocessing.spawn(_run, (work, str(folder)), nprocs=2)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(2)]


def _train(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()


def _finetuned() -> PeftModel:
    return get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS, finetune=True))


def _alone() -> dict[str, torch.Tensor]:
    model = _finetuned()
    _train(model, inputs(8))
    return get_peft_model_state_dict(model)


def _data_parallel(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(_finetuned())
    _train(model, inputs(8)[rank * 4 : rank * 4 + 4])
    return get_peft_model_state_dict(model.module)


def test_ddp_trains_what_one_process_does(tmp_path: Path) -> None:
    first, second = _in_two_processes(_data_parallel, tmp_path)
    expected = _alone()
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


def _training_free(rank: int, folder: Path) -> tuple[str, dict[str, torch.Tensor], torch.Tensor]:
    model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS))
    try:
        DistributedDataParallel(model)
    except RuntimeError as error:
        refusal = str(error)
    # With a module that is trained in full there is something to reduce.
    config = SeTARConfig(rank_ratios={"fc1": 0.25}, modules_to_save=["head"])
    parallel = DistributedDataParallel(get_peft_model(MLP(), config))
    _train(parallel, inputs(8)[rank * 4 : rank * 4 + 4])
    return refusal, get_peft_model_state_dict(parallel.module), parallel(inputs(2)).detach()


def test_ddp_of_a_training_free_adapter(tmp_path: Path) -> None:
    (refusal, first, output), (_, second, _) = _in_two_processes(_training_free, tmp_path)
    # Nothing to train means nothing to wrap, and torch says so; each process uses the model as it is.
    assert "doesn't have any parameter" in refusal
    model = get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.25}, modules_to_save=["head"]))
    _train(model, inputs(8))
    for name, value in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(first[name], value)
        torch.testing.assert_close(second[name], value)
    torch.testing.assert_close(output, model(inputs(2)).detach())


def _sharded(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    model = _finetuned()
    for module in model.modules():
        if isinstance(module, SeTARLayer):
            fully_shard(module)
    fully_shard(model)
    _train(model, inputs(8)[rank * 4 : rank * 4 + 4])
    layer = next(module for module in model.modules() if isinstance(module, SeTARLayer))
    assert layer._kept_weight._weight is None  # whole weights would undo the sharding
    try:
        layer.merge()
    except ValueError as error:
        assert "before the model is sharded" in str(error)  # noqa: PT017 - in another process
    else:
        raise AssertionError("a shard was merged into")
    # Gathering is a collective operation.
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in get_peft_model_state_dict(model).items()
    }


@pytest.mark.skipif(torch.__version__ < "2.9", reason="FSDP2 needs a GPU before torch 2.9")
def test_fsdp2_trains_what_one_process_does(tmp_path: Path) -> None:
    first, second = _in_two_processes(_sharded, tmp_path)
    expected = _alone()
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value)
        torch.testing.assert_close(second[name], value)


def _adapter_on_a_sharded_base(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    base = MLP()
    fully_shard(base)
    model = get_peft_model(base, SeTARConfig(rank_ratios={"fc1": 0.25}))
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in get_peft_model_state_dict(model).items()}  # fmt: skip


def test_an_adapter_made_on_a_sharded_base_gathers_the_weight(tmp_path: Path) -> None:
    first, _ = _in_two_processes(_adapter_on_a_sharded_base, tmp_path)
    expected = get_peft_model_state_dict(get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.25})))
    product = [
        state["base_model.model.fc1.setar_B0"] @ state["base_model.model.fc1.setar_A0"] for state in (first, expected)
    ]
    torch.testing.assert_close(*product)
