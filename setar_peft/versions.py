"""The version of this package, and the versions that a result was made with."""

from __future__ import annotations

import importlib
import platform

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Name -> version, of this package, of what it computes with, and of Python."""
    computing = {name: str(importlib.import_module(name).__version__) for name in ("torch", "transformers", "peft")}
    return {"setar_peft": __version__, **computing, "python": platform.python_version()}
