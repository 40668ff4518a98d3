"""What a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def message_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the `ValueError` that a call ends with."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the callers look at the message
        function(*args, **kwargs)
    return str(raised.value)
