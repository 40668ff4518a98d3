"""What the measure of memory counts, and what it does not."""

from __future__ import annotations

import torch

from setar_peft.search.estimate import PeakMemory


def test_tensors_count_while_they_live() -> None:
    there = torch.zeros(100)
    with PeakMemory() as memory:
        first = torch.zeros(10, 10)
        second = first + 1
        assert memory.live == memory.peak == 800
        del first
        assert (memory.live, memory.peak) == (400, 800)
        views = (second.T, second[2:], second.expand(3, 10, 10), there[1:], there.view(10, 10))
        second.add_(1)
        there.mul_(2)
        assert (memory.live, memory.peak) == (400, 800)
        product = second @ views[0]
        assert memory.live == 800
        del product, second
        assert memory.live == 400  # the views hold it
        del views
    assert (memory.live, memory.peak) == (0, 800)
    torch.zeros(1000)
    assert memory.peak == 800
