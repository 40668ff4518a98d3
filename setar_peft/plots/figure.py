"""What every figure has in common: its colours, and matplotlib, which is imported where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which colour-blind readers tell apart; grey-blue for ID, warm ones first for OOD.
ID_COLOUR = "#0072B2"
OOD_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def check_matplotlib() -> None:
    """Raise a `ValueError` where matplotlib is missing, before anything long has run."""
    try:
        import matplotlib.figure  # noqa: F401 - only asked for
    except ImportError as error:
        raise ValueError("Figures need matplotlib, which is not installed: pip install setar-peft[demo]") from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, which touches no global state.

    Raises:
        ValueError: If matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
