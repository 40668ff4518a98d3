"""Greedy search for rank ratios (paper, Algorithm 1)."""
