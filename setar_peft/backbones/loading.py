"""Models and processors from a folder or the Hub, and devices by name, for the command line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.backbones import model_classes

# How a model may compute, and the dtype of its weights for that.
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The dtype of a model that computes in a precision, and torch's setting to go with it, put back at the end.

    With "float32", float32 products are what torch is set to (exact by default). With all others a GPU may round their
    factors to TF32, as `torch.set_float32_matmul_precision("high")` does. In a half precision that concerns the logits,
    which it moves by far less than the half precision itself has.

    Args:
        name: One of `PRECISIONS`.

    Raises:
        ValueError: If it is none of them.
    """
    if name not in PRECISIONS:
        raise ValueError(f"The precision is {name!r}; give one of {', '.join(PRECISIONS)}.")
    before = torch.get_float32_matmul_precision()
    if name != "float32":
        torch.set_float32_matmul_precision("high")
    try:
        yield PRECISIONS[name]
    finally:
        torch.set_float32_matmul_precision(before)


def torch_device(name: str | None = None) -> torch.device:
    """A device by name; by default a GPU if there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used here ({reason}); try --device cpu.") from error
    return torch.device(name)


def load_model(name: str, **kwargs: Any) -> Any:
    """A model of a known family, in evaluation mode.

    Args:
        name: Folder or Hub name.
        kwargs: For `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: If there is no such model, its family is not known, or it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no model {name!r} that can be read; give a folder with a saved model, or a Hub name such as "
            "openai/clip-vit-base-patch16 where the Hub can be reached."
        ) from error
    classes = model_classes(config.model_type)
    if not classes:
        raise ValueError(
            f"{name} is of model type {config.model_type!r}, which is no known backbone. From Python, "
            "search_rank_ratios takes any model with a callable objective."
        )
    # Where a family has several classes, the checkpoint says which it is.
    architecture = next((cls for cls in config.architectures or () if cls in classes), classes[0])
    try:
        return getattr(transformers, architecture).from_pretrained(name, **kwargs).eval()
    except OSError as error:
        raise ValueError(
            f"{name} cannot be loaded: {str(error).splitlines()[0]} Give a complete model folder or Hub name."
        ) from error


def load_base(name: str, class_name: str, whose: str, **kwargs: Any) -> Any:
    """The base model of something that was saved, which knows its class; in evaluation mode.

    As what was saved may come from anyone, nothing but a model of transformers is built.

    Args:
        name: Folder or Hub name of the base.
        class_name: Its class in transformers.
        whose: What names it, for messages.
        kwargs: For `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: If there is no such class, or the model cannot be loaded.
    """
    model_class: Any = getattr(transformers, class_name, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not is_model:
        raise ValueError(f"{whose} names {class_name} as the class of its base, which is no model of transformers.")
    try:
        return model_class.from_pretrained(name, **kwargs).eval()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{whose} has the base {name!r}, which cannot be loaded: {reason} Say where the base is, or give it."
        ) from error


def load_processor(name: str, model: Any) -> Any:
    """The processor of a model.

    For a CLIP that has no image processor here, one is made: CLIP's own scaling, at the model's image size.

    Args:
        name: Folder or Hub name.
        model: The model.

    Warns:
        UserWarning: If an image processor was made.

    Raises:
        ValueError: If there is no processor and none can be made.
    """
    with warnings.catch_warnings():
        # Without torchvision transformers warns that it takes the PIL processor, which is as good.
        warnings.simplefilter("ignore")
        try:
            return AutoProcessor.from_pretrained(name)
        except (OSError, ImportError, ValueError) as error:
            if model.config.model_type != "clip":
                raise ValueError(
                    f"{name} has no processor that works here ({str(error).splitlines()[0]}). How images are scaled is "
                    "not to be guessed: save the one that the model was trained with beside it, such as "
                    "ViTImageProcessor(...).save_pretrained(folder)."
                ) from error
            tokenizer = AutoTokenizer.from_pretrained(name)
    side = model.config.vision_config.image_size
    try:
        image_processor = CLIPImageProcessorPil.from_pretrained(name)
    except OSError:
        warnings.warn(
            f"{name} has no image processor, so that images are scaled as OpenAI's CLIPs take them, at {side} pixels a "
            "side. If the model was trained otherwise, save its own beside it: CLIPImageProcessor(...).save_pretrained",
            UserWarning,
            stacklevel=2,
        )
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return transformers.CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
