"""The versions that a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version

import setar_peft


def versions() -> dict[str, str]:
    """Name -> version, of this package, of what it computes with, and of Python."""
    return {
        "setar_peft": setar_peft.__version__,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
    }
