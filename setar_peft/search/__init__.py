"""Greedy search for rank ratios (paper, Algorithm 1)."""

from setar_peft.search.estimate import CostEstimate, estimate_cost
from setar_peft.search.greedy import greedy_search
from setar_peft.search.run import SearchResult, search_rank_ratios
from setar_peft.search.trace import SearchTrace

__all__ = ["CostEstimate", "SearchResult", "SearchTrace", "estimate_cost", "greedy_search", "search_rank_ratios"]
