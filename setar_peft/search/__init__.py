"""Greedy search for rank ratios (paper, Algorithm 1)."""

from setar_peft.search.greedy import greedy_search
from setar_peft.search.run import SearchResult, search_rank_ratios
from setar_peft.search.trace import SearchTrace

__all__ = ["SearchResult", "SearchTrace", "greedy_search", "search_rank_ratios"]
