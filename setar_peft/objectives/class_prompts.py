"""The classes of a model: their names, the prompts that stand for them, and the map from features to their logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from setar_peft.backbones import Backbone, ClassWeights
from setar_peft.data.labels import ClassNames

PROMPT = "a photo of a {class}"


class ClassPrompts:
    """The classes that a model tells apart, and the text that stands for each where the model classifies by texts.

    Args:
        processor: The model's processor, or its tokenizer; None where nothing is to be tokenised, as for a classifier.
        class_names: Names of the in-distribution classes, in the order of the labels; a classifier's
            `config.id2label`; or a mapping from what the data call a class (a folder, say) to its name.
        prompt: Text with "{class}" in it, or one text a class.
        negative_labels: Words that name none of the classes (Jiang et al., NegLabel, 2024), each once: a list, or a
            file with one a line. They go into `prompt`, which has to be a template.

    Attributes:
        classes: The classes.
        class_names: Their names.
        prompt: As given; several as a list.
        prompts: One text a class.
        negative_labels: As given, as a list; empty where there are none.

    Raises:
        ValueError: If there are fewer than two classes, no "{class}" in the prompt, or a negative label is empty,
            there twice, or the name of a class; or the file cannot be read.
    """

    def __init__(
        self,
        processor: Any,
        class_names: Sequence[str] | Mapping[Any, str] | ClassNames,
        prompt: str | Sequence[str] = PROMPT,
        *,
        negative_labels: Sequence[str] | str | Path | None = None,
    ) -> None:
        self.classes = ClassNames.of(class_names)
        self.class_names = list(self.classes.names)
        self.prompt = prompt if isinstance(prompt, str) else list(prompt)
        self.prompts = _prompts(prompt, self.class_names)
        self.negative_labels = _negative_labels(negative_labels, self.class_names, prompt)
        self._tokenizer = getattr(processor, "tokenizer", processor)

    @classmethod
    def of_model(
        cls,
        backbone: Backbone,
        processor: Any,
        class_names: Sequence[str] | Mapping[Any, str] | ClassNames | None = None,
        prompt: str | Sequence[str] = PROMPT,
        *,
        negative_labels: Sequence[str] | str | Path | None = None,
    ) -> ClassPrompts:
        """The same, with a classifier's own classes where none are named.

        Raises:
            ValueError: As above, and if there are no names.
        """
        if class_names is None and not backbone.needs_prompts:
            class_names = ClassNames.of_model(backbone.model.config.id2label)
        if class_names is None:
            raise ValueError(
                f"{type(backbone.model).__name__} does not name its classes; give class_names, the in-distribution "
                "classes" + ("." if backbone.needs_prompts else " in the order of the model's outputs.")
            )
        return cls(processor, class_names, prompt, negative_labels=negative_labels)

    def tokens(self, backbone: Backbone) -> dict[str, Tensor]:
        """The class prompts' `input_ids` and, where the tokenizer gives it, `attention_mask`, each (classes, tokens).

        Warns of prompts that are longer than the model takes, and of classes that it cannot tell apart because the
        tokens of their prompts are equal.

        Args:
            backbone: Of the model that they are for.

        Raises:
            ValueError: If the processor has no tokenizer.
        """
        return self._tokenised(self.prompts, backbone)

    def class_weights(self, backbone: Backbone) -> ClassWeights:
        """The map from features to logits: by the prompts where a model needs them, else its own classifier.

        Args:
            backbone: Of the model, `backbone_of(model)`.

        Raises:
            ValueError: If the classes are not a classifier's, or there are negative labels for one.
        """
        self.check_classes(backbone)
        if not backbone.needs_prompts:
            if self.negative_labels:
                raise ValueError(
                    f"{type(backbone.model).__name__} does not classify by texts, so that there is nothing to compare "
                    "with negative_labels; leave them out, or take a model like CLIP."
                )
            return backbone.class_weights(None)
        classes = backbone.class_weights(backbone.text_features(self.tokens(backbone)))
        if not self.negative_labels:
            return classes
        prompts = _prompts(self.prompt, self.negative_labels)
        features = backbone.text_features(self._tokenised(prompts, backbone))
        return classes._replace(negative=backbone.class_weights(features).weight)

    def check_labels(self, classes: ClassNames) -> None:
        """Raise a `ValueError` if other inputs' labels mean other classes, or number them otherwise."""
        classes.check_order_of(self.classes, "the objective")

    def check_classes(self, backbone: Backbone) -> None:
        """Raise a `ValueError` if a classifier's own classes are others, of another number, or in another order."""
        if backbone.needs_prompts:
            return
        own = ClassNames.of_model(getattr(backbone.model.config, "id2label", None))
        if own is not None:
            self.classes.check_order_of(own, "the model")
        count = len(backbone.class_weights(None).weight)
        if count != len(self.class_names):
            raise ValueError(
                f"The model has {count} classes, class_names {len(self.class_names)}. Name every class that the model "
                "tells apart: class_names=model.config.id2label."
            )

    def _tokenised(self, prompts: Sequence[str], backbone: Backbone) -> dict[str, Tensor]:
        if not callable(self._tokenizer) or hasattr(self._tokenizer, "preprocess"):
            raise ValueError(
                f"The model classifies by prompts, and processor is a {type(self._tokenizer).__name__}, which cannot "
                "tokenise them. Give the model's processor, or its tokenizer with images as pixel values."
            )
        longest = backbone.longest_prompt
        padding: bool | str = "max_length" if backbone.pads_prompts else True
        tokens = self._tokenizer(
            list(prompts), padding=padding, max_length=longest, truncation=True, return_tensors="pt"
        )
        self._warn_of_lost_words(prompts, tokens["input_ids"], longest)
        return {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}

    def _warn_of_lost_words(self, prompts: Sequence[str], ids: Tensor, longest: int) -> None:
        """Warn of prompts that lost words to the model's length, and of different prompts with equal tokens."""
        if ids.shape[1] == longest:
            whole = self._tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]
            cut = [prompt for prompt, row in zip(prompts, whole, strict=True) if len(row) > longest]
            if cut:
                warnings.warn(
                    f"{len(cut)} of {len(ids)} class prompts are longer than the {longest} tokens that the model takes "
                    f"and are cut: {_listed(cut)}.",
                    UserWarning,
                    stacklevel=4,
                )
        groups: dict[tuple[int, ...], set[str]] = {}
        for prompt, row in zip(prompts, ids.tolist(), strict=True):
            groups.setdefault(tuple(row), set()).add(prompt)
        for equal in groups.values():
            if len(equal) > 1:
                warnings.warn(
                    f"The model cannot tell the classes of these prompts apart, since their tokens are equal: "
                    f"{_listed(sorted(equal))}.",
                    UserWarning,
                    stacklevel=4,
                )


def _listed(texts: Sequence[str], most: int = 10) -> str:
    listed = ", ".join(map(repr, texts[:most]))
    return f"{listed} and {len(texts) - most} more" if len(texts) > most else listed


def _prompts(prompt: str | Sequence[str], names: Sequence[str]) -> list[str]:
    if isinstance(prompt, str):
        if "{class}" not in prompt:
            raise ValueError(f'prompt is {prompt!r}; put "{{class}}" where the class name goes, as in {PROMPT!r}.')
        return [prompt.replace("{class}", name) for name in names]
    if len(prompt) != len(names):
        raise ValueError(f"prompt has {len(prompt)} texts for {len(names)} classes; give one text a class.")
    literal = [text for text in prompt if "{class}" in str(text)]
    if literal:
        raise ValueError(
            f"prompt has the text {literal[0]!r}, and one text a class names the class itself, without {{class}}; give "
            "one template for all classes, or the texts in full."
        )
    return list(prompt)


def _negative_labels(given: Any, class_names: Sequence[str], prompt: Any) -> list[str]:
    if given is None:
        return []
    where = "negative_labels"
    if isinstance(given, (str, Path)):
        where = str(given)
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{where} cannot be read ({error}); give a text file with one label a line.") from error
        given = [line.strip() for line in text.splitlines() if line.strip()]
    labels = list(given) if isinstance(given, Iterable) else [given]
    strange = [label for label in labels if not isinstance(label, str) or not label.strip()]
    if strange or not labels:
        what = f"holds {strange[0]!r}" if strange else "is empty"
        raise ValueError(f"{where} {what}; give words that name none of the classes.")
    twice = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if twice:
        raise ValueError(f"{where} has {_listed(twice)} more than once; give each label once.")
    known = {name.casefold() for name in class_names}
    shared = [label for label in labels if label.strip().casefold() in known]
    if shared:
        raise ValueError(f"{where} has names of classes: {_listed(shared)}; take them away.")
    if not isinstance(prompt, str):
        raise ValueError('negative_labels need a prompt with "{class}" in it, and prompt is one text a class.')
    return labels
