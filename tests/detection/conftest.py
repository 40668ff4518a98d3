"""Models small enough to detect with in a test, and their processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CLIPImageProcessorPil,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from setar_peft.detection.detector import OODDetector


@pytest.fixture
def processor(golden: Path, load_clip: Callable[..., Any]) -> Any:
    """The processor of the golden CLIP: RGB, its image size."""
    side = load_clip().config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return CLIPProcessor(
        image_processor=images, tokenizer=AutoTokenizer.from_pretrained(golden / "cases" / "clip_tiny")
    )


@pytest.fixture
def detector(load_clip: Callable[..., Any], processor: Any, class_names: list[str]) -> OODDetector:
    """Of the golden CLIP, its six classes and GL-MCM; four images a batch, without a threshold."""
    return OODDetector(load_clip(), processor, class_names, batch_size=4)


@pytest.fixture
def text_model() -> tuple[Any, Any]:
    """A text classifier with random weights and named classes, and its tokenizer of a few words."""
    words = ["[PAD]", "[UNK]", *["the", "cat", "dog", "number", "sat", "on", "mat"], *map(str, range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    names = {0: "small talk", 1: "weather", 2: "banking"}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, id2label=names, **shape)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, fast
