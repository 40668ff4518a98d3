"""Figures with matplotlib (`pip install setar-peft[demo]`).

Each function returns a `matplotlib.figure.Figure` and touches no global state: save it with `savefig`.
"""

from setar_peft.plots.figure import check_matplotlib
from setar_peft.plots.scores import Convention, roc_figure, score_figure
from setar_peft.plots.search import prediction_figure, rank_ratio_figure, search_figure
from setar_peft.plots.summary import summary_figure

__all__ = [
    "Convention",
    "check_matplotlib",
    "prediction_figure",
    "rank_ratio_figure",
    "roc_figure",
    "score_figure",
    "search_figure",
    "summary_figure",
]
