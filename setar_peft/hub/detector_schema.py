"""What `detector.json` has to look like: which keys there are, and which values each may have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

FORMAT = 1
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_DEEPEST = 50  # mappings and lists in one another
AGAIN = "Copy or download the detector again, or save it again in Python."


class _Kind(NamedTuple):
    """A kind of value.

    Attributes:
        wanted: What it is, to be told where another stands in its place.
        fits: Whether a value is of the kind.
    """

    wanted: str
    fits: Callable[[Any], bool]


def check_document(document: Any, where: str) -> None:
    """Check the parsed content of a `detector.json`.

    Args:
        document: The content.
        where: Its path, for messages.

    Raises:
        ValueError: If it is of a newer format, a key is missing or unknown, or a value is none that belongs there.
    """
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, (int, float)) and version > FORMAT:
        raise ValueError(
            f"{where} has the format {version}, and this version of setar_peft reads {FORMAT}: update it "
            "(pip install -U setar-peft)."
        )
    _check_fields(document, _DOCUMENT, where)
    if document["threshold"] is not None:
        threshold = document["threshold"]
        _check_fields(threshold, _THRESHOLD, f"{where}, threshold")
        if len({threshold["tpr"] is None, threshold["interval"] is None, threshold["n"] == 0}) > 1:
            raise ValueError(f"{where}: the threshold has some of tpr, n and interval, which go together. {AGAIN}")


def check_plain(what: str, values: Mapping[str, Any]) -> None:
    """Check that values can be written as JSON and read again as they are.

    Raises:
        ValueError: If one cannot.
    """
    for name, value in values.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ValueError(
                f"{what}: {name} is {value!r:.80}, which cannot be written to a detector's file; use finite numbers, "
                "texts, lists and mappings of them."
            )


def _check_fields(values: Any, kinds: Mapping[str, _Kind], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds a {type(values).__name__}, and named values belong there. {AGAIN}")
    missing, unknown = sorted(kinds.keys() - values.keys()), sorted(values.keys() - kinds.keys())
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(name[:40] for name in unknown[:8])}, which is unknown"] if unknown else []
        raise ValueError(f"{where} {' and '.join(parts)}. {AGAIN}")
    for name, kind in kinds.items():
        if not kind.fits(values[name]):
            raise ValueError(f"{where}: {name} is {values[name]!r:.80}, and {kind.wanted} belongs there. {AGAIN}")


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if depth > _DEEPEST:
        return False
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(item, depth + 1) for name, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item, depth + 1) for item in value)
    return value is None or isinstance(value, (str, bool)) or _is_number(value)


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and 0 <= value[0] <= value[1] <= 1
    )


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_file_name(name: str) -> bool:
    return bool(name) and not re.search(r"[/\\\0]", name) and name not in (".", "..")


def _are_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_file_name(name) and _is_digest(digest) for name, digest in value.items())


_TEXT = _Kind("a text", _is_text)
_TEXTS = _Kind("a list of texts", _are_texts)
_NAMED = _Kind("named plain values", lambda value: isinstance(value, dict) and _is_plain(value))
_DIGEST = _Kind("a SHA-256", _is_digest)
_DOCUMENT = {
    "format": _Kind(f"the format {FORMAT}", lambda value: type(value) is int and value == FORMAT),
    "kind": _Kind("'image' or 'text'", lambda value: value in ("image", "text")),
    "class_names": _Kind("a list of two or more texts", lambda value: _are_texts(value) and len(value) > 1),
    "class_keys": _Kind(
        "a list of texts or null",
        lambda value: (
            value is None or (isinstance(value, list) and _are_texts([key for key in value if key is not None]))
        ),
    ),
    "prompt": _Kind(
        "a text with {class}, a list of texts or null",
        lambda value: value is None or _are_texts(value) or (isinstance(value, str) and "{class}" in value),
    ),
    "negative_labels": _TEXTS,
    "score": _TEXT,
    "settings": _NAMED,
    "unfitted": _NAMED,
    "state": _NAMED,
    "threshold": _Kind("a threshold or null", lambda value: value is None or isinstance(value, dict)),
    "preprocessing": _NAMED,
    "model_type": _TEXT,
    "model_class": _TEXT,
    "dtype": _Kind(f"one of {', '.join(_DTYPES)}", lambda value: value in _DTYPES),
    "attention": _TEXT,
    "base_sha256": _DIGEST,
    "adapter_sha256": _Kind("a SHA-256 or null", lambda value: value is None or _is_digest(value)),
    "batch_size": _Kind("a whole number above 0", lambda value: type(value) is int and value > 0),
    "versions": _Kind(
        "named texts",
        lambda value: isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
    ),
    "files": _Kind("names of files and their SHA-256", _are_digests),
    "sha256": _DIGEST,
}
_THRESHOLD = {
    "value": _Kind("a finite number", _is_number),
    "tpr": _Kind(
        "a number above 0 and up to 1, or null", lambda value: value is None or (_is_number(value) and 0 < value <= 1)
    ),
    "n": _Kind("a whole number", lambda value: type(value) is int and value >= 0),
    "interval": _Kind("two numbers from 0 to 1 in order, or null", lambda value: value is None or _is_interval(value)),
    "confidence": _Kind("a number between 0 and 1", lambda value: _is_number(value) and 0 < value < 1),
}
