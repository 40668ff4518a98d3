"""A detector's processor: its files, and the settings by which it is known again."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin

# How each kind of processor is read from a folder.
_LOADERS = {"processor": AutoProcessor, "image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
# Names that transformers writes along; versions and backends of it differ in them.
_NOT_SETTINGS = ("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class")


def preprocessing_of(processor: Any, kind: str) -> dict[str, Any]:
    """The settings of a processor, as plain values, as far as they decide what a model sees.

    Args:
        processor: A processor, image processor or tokenizer of transformers; or None.
        kind: "image" or "text".

    Returns:
        "saved_as": what kind of processor it is; "class": what makes inputs of images or texts; "settings": how.

    Raises:
        ValueError: If it is no processor of transformers, which alone can be saved.
    """
    part = getattr(processor, "image_processor" if kind == "image" else "tokenizer", processor)
    if processor is None:
        return {"saved_as": None, "class": None, "settings": {}}
    if not hasattr(processor, "save_pretrained"):
        raise ValueError(
            f"processor is a {type(processor).__name__}, which cannot be saved with the detector; give a processor of "
            "transformers."
        )
    if hasattr(part, "get_vocab"):
        # A tokenizer beside pixel values that are made elsewhere decides nothing.
        settings = _tokenizer_settings(part) if kind == "text" else {}
        saved_as = "tokenizer"
    else:
        settings = {key: value for key, value in part.to_dict().items() if key not in _NOT_SETTINGS}
        settings = json.loads(json.dumps(settings, default=str))
        saved_as = "image_processor"
    if isinstance(processor, ProcessorMixin):
        saved_as = "processor"
    return {"saved_as": saved_as, "class": type(part).__name__, "settings": settings}


def load_saved_processor(folder: Path, preprocessing: Mapping[str, Any]) -> Any:
    """The processor in a detector's folder; None where it has none.

    Raises:
        ValueError: If it cannot be read.
    """
    saved_as = preprocessing.get("saved_as")
    if saved_as is None:
        return None
    if saved_as not in _LOADERS:
        raise ValueError(f"{folder} has a processor of the kind {saved_as!r}; known are {', '.join(_LOADERS)}.")
    settings: dict[str, Any] = {"trust_remote_code": False}
    name = str(preprocessing.get("class"))
    if "ImageProcessor" in name:
        # By default it depends on what is installed, and with it the last digits of pixels.
        settings["backend"] = "pil" if name.endswith("Pil") else "torchvision"
    with warnings.catch_warnings():
        # Without torchvision transformers warns that it takes the PIL processor; what matters is said below.
        warnings.simplefilter("ignore")
        try:
            return _LOADERS[saved_as].from_pretrained(folder, **settings)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"The processor in {folder} cannot be loaded: {str(error).splitlines()[0]} Give it, processor=..."
            ) from error


def check_preprocessing(saved: Mapping[str, Any], processor: Any, kind: str) -> None:
    """Check that a processor makes of inputs what a detector's own did.

    Warns where another of transformers' backends does the same work, whose pixels differ in the last digits.

    Args:
        saved: What `preprocessing_of` gave of the detector's own.
        processor: The processor.
        kind: "image" or "text".

    Raises:
        ValueError: If its settings are others; the message says which.
    """
    given = preprocessing_of(processor, kind)
    own, found = saved.get("settings"), given["settings"]
    own = own if isinstance(own, dict) else {}
    # What a version of transformers does not write is off.
    changed = sorted(
        key for key in {*own, *found} if own.get(key) != found.get(key) and (own.get(key) or found.get(key))
    )
    if changed:
        listed = "; ".join(f"{key} is {found.get(key)!r:.60}, not {own.get(key)!r:.60}" for key in changed[:4])
        raise ValueError(
            f"The processor does not make of {kind}s what the detector's own did, so that its threshold does not hold: "
            f"{listed}. Leave processor out, or make a new detector and fit it."
        )
    if given["class"] != saved.get("class") and kind == "image":
        warnings.warn(
            f"Images are processed by {given['class']} here, and were by {saved.get('class')} where the threshold was "
            "found: pixels may differ by rounding, and scores with them.",
            UserWarning,
            stacklevel=3,
        )


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }
