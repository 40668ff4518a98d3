"""A detector: a model, its classes, a score and a threshold, which say of an input whether it is any of the classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from setar_peft.backbones import ClassWeights, backbone_of
from setar_peft.data.inputs import Inputs, checked_batch_size
from setar_peft.data.labels import ClassNames
from setar_peft.data.rows import Kind
from setar_peft.data.sources import is_single, source_of, stream_of
from setar_peft.detection.batched import Batched
from setar_peft.detection.columns import Columns, nan_filled
from setar_peft.detection.explain import Explanation, explanation_of_batch
from setar_peft.detection.features import Outputs, Reader, outputs_of, reading
from setar_peft.detection.model_state import ModelState
from setar_peft.detection.record import Detection, Detections
from setar_peft.detection.saving import HubDetector
from setar_peft.detection.scores import chosen_score
from setar_peft.detection.scoring import Reading, Score, check_temperature
from setar_peft.detection.threshold import Threshold
from setar_peft.objectives.class_prompts import PROMPT, ClassPrompts

Errors = Literal["record", "raise"]


class OODDetector(HubDetector):
    """Says of an input which class it is, and whether it is any of them at all.

    Everything that takes images takes texts where the model reads texts.

    Args:
        model: A stock model of a known family, or a PEFT model, whose active adapters compute. The class prompts are
            encoded here, once: a model that is changed afterwards is refused (see
            `setar_peft.detection.model_state.ModelState` for what is seen, and when).
        processor: The model's processor, or the image processor or tokenizer alone where nothing else is needed.
        class_names: Names of the in-distribution classes; by default a classifier's own.
        score: A name out of `setar_peft.detection.scores.SCORES`, a `Score`, a function (see `Score`), or a name with
            settings, `{"gl_mcm": {"local_weight": 0.5}}`.
        prompt: Text with "{class}" in it, or one text a class; for models that classify by texts.
        temperature: Divides the logits of the score, > 0; by default the paper's (see `setar_peft.detection.scores`).
        negative_labels: Words that name none of the classes, or a file with one a line; for scores that read them.
        batch_size: Inputs a batch.

    Attributes:
        model: The model.
        class_names: Names of the classes.
        prompt: The template of the class prompts, or one text a class; None for a model without prompts.
        score_name: Name of the score.
        settings: Its settings in full, with the temperature in use.
        threshold: The threshold; None before `fit`.
        id_scores: Scores of the inputs that the threshold was found on, (n,) float32, ascending; empty where there are
            none.
        folder: Where it was saved to or loaded from last; None where it was not.

    Raises:
        ValueError: If the model's family is not known, the classes are not the model's, or a score or setting is
            unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        class_names: Sequence[str] | Mapping[Any, str] | ClassNames | None = None,
        score: str | Score | Callable[..., Tensor] | Mapping[str, Mapping[str, Any]] = "gl_mcm",
        prompt: str | Sequence[str] = PROMPT,
        temperature: float | None = None,
        *,
        negative_labels: Any = None,
        batch_size: int = 64,
    ) -> None:
        self._prompts = ClassPrompts.of_model(
            backbone_of(model), processor, class_names, prompt, negative_labels=negative_labels
        )
        self._start(model, processor, score, temperature, batch_size, None)

    def _start(
        self,
        model: nn.Module,
        processor: Any,
        score: Any,
        temperature: float | None,
        batch_size: int,
        bank: ClassWeights | None,
    ) -> None:
        """Set up all but the classes, which are there; their prompts are encoded unless the text bank is known."""
        self._score, given = chosen_score(score, temperature)
        self._unfitted_score, self.score_name = self._score, self._score.name
        self.model, self.processor, self.batch_size = model, processor, checked_batch_size(batch_size)
        with reading(model, self._prompts if bank is None else bank, layers=self._score.needs_layers) as reader:
            backbone = reader.backbone
            ((variant, self._bank),) = reader.classes.items()
            self.settings = reader.settings(variant, self._score, given)
        check_temperature(self.settings)
        if "negative_logits" in self._score.reads and self._bank.negative is None:
            raise ValueError(
                f"The score {self.score_name} compares with labels that are none of the classes; give negative_labels."
            )
        self.kind: Kind = backbone.kind
        self.prompt = self._prompts.prompt if backbone.needs_prompts else None
        self.class_names = self._prompts.class_names
        self.threshold: Threshold | None = None
        self.id_scores: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        self._model_state = ModelState(model)
        self.folder: Path | None = None
        self._lost_threshold = ""

    def fit(self, id_data: Any, tpr: float = 0.95, *, fit_data: Any = None) -> OODDetector:
        """Find the threshold that keeps a share of the in-distribution (ID) inputs; returns the detector itself.

        Args:
            id_data: ID inputs that nothing was chosen on, neither a search nor a training: a folder, a data set, a
                list, a tensor of pixel values, or an `ImageSource`. Labels are not needed.
            tpr: Share of ID inputs to be kept, 0 < tpr <= 1; see `Threshold.of`.
            fit_data: ID inputs for a score that has to be fitted itself, such as a nearest-neighbour detector's. By
                default every second input of `id_data`, and the threshold is found on the others.

        Raises:
            ValueError: If an input cannot be read, a score is not finite, or the level is outside its range. The
                detector is then as it was.
        """
        self._model_state.check(self.model, thorough=True)
        inputs = self._inputs(id_data)
        score = self._unfitted_score
        if score.needs_fit:
            if fit_data is None and len(inputs) < 2:
                raise ValueError(f"The score {score.name} is fitted itself; give two ID inputs or more, or fit_data.")
            to_fit = inputs.shard(0, 2) if fit_data is None else self._inputs(fit_data)
            inputs = inputs.shard(1, 2) if fit_data is None else inputs
            with self._reading() as reader:
                score = score.fit(self._readings(reader, to_fit), **self.settings)
        elif fit_data is not None:
            raise ValueError(f"The score {score.name} has nothing to fit; leave fit_data out.")
        scores = self._all_scores(inputs, score)
        threshold = Threshold.of(scores, tpr)
        self._score, self.threshold, self.id_scores = score, threshold, np.sort(scores)
        return self

    def at(self, *, tpr: float | None = None, threshold: float | None = None) -> OODDetector:
        """Another threshold, for the same model and score; returns the detector itself.

        Args:
            tpr: Share of the inputs of `fit` to be kept, 0 < tpr <= 1.
            threshold: The threshold itself, set by hand.

        Raises:
            ValueError: Unless exactly one is given; or if the detector has not been fitted, for `tpr`.
        """
        if (tpr is None) == (threshold is None):
            raise ValueError("Give either tpr or threshold.")
        self._check_score_is_fitted()
        if threshold is not None:
            self.threshold = Threshold(threshold)
        elif len(self.id_scores):
            assert tpr is not None
            self.threshold = Threshold.of(self.id_scores, tpr)
        else:
            raise ValueError("The detector has not been fitted, so that there are no ID scores; call fit(id_data).")
        return self

    def __call__(self, data: Any, *, top_k: int = 1, errors: Errors = "record") -> Any:
        """Decide.

        Args:
            data: One input (an image, array, path or URL; a text for a text model), or several: a list, a folder, a
                data set, a tensor of pixel values (n, channels, height, width), an `ImageSource`.
            top_k: How many of the likeliest classes each record names.
            errors: What becomes of an input that cannot be read, or whose score is not finite: a "record" that says
                why, or "raise".

        Returns:
            A `Detection` for one input, `Detections` for several.

        Raises:
            ValueError: If the detector has no threshold, or there are no inputs.
        """
        records = list(self._records(iter([self._inputs(data)]), top_k, errors))
        return records[0] if is_single(data, self.kind) else Detections(records)

    def stream(self, data: Any, *, top_k: int = 1, errors: Errors = "record") -> Iterator[Detection]:
        """Decide input by input, in order, without keeping what was read: for sets that do not fit in memory.

        Args:
            data: As for a call; or an iterator or streamed data set, of which a few batches are read at a time.
            top_k: As for a call.
            errors: As for a call.

        Raises:
            ValueError: As a call.
        """
        self._threshold_in_use()
        return self._records(stream_of(data, self.processor, self.kind, batch_size=self.batch_size), top_k, errors)

    def scores(self, data: Any) -> Columns:
        """Score, prediction and probability of inputs, also without a threshold.

        Args:
            data: As for a call.

        Returns:
            Columns "score" and "probability" (n,) float32 and "label" (n,) names; NaN and "" where an input could not
            be read.
        """
        inputs = self._inputs(data)
        scores, probabilities = nan_filled(len(inputs)), nan_filled(len(inputs))
        labels = np.full(len(inputs), "", dtype=object)
        errors: dict[str, str] = {}
        for numbers, outputs, broken in self._outputs(inputs, 1):
            errors.update({inputs.name(number): sentence for number, sentence in broken.items()})
            if outputs is not None:
                scores[numbers] = outputs.scores[self.score_name].numpy()
                probabilities[numbers] = outputs.probabilities[:, 0].numpy()
                labels[numbers] = [self.class_names[index] for index in outputs.top[:, 0].tolist()]
        ids = [inputs.name(number) for number in range(len(inputs))]
        return Columns(ids, {"label": labels, "probability": probabilities, "score": scores}, errors)

    def features(self, data: Any) -> Columns:
        """Features of inputs as the class weights take them (of unit length for CLIP), for drift tools and notebooks.

        Args:
            data: As for a call.

        Returns:
            The column "features", (n, d) float32; NaN where an input could not be read.
        """
        inputs = self._inputs(data)
        features = nan_filled(len(inputs), self._bank.weight.shape[1])
        errors: dict[str, str] = {}
        with self._reading(layers=False) as reader:
            for batch, by_variant in reader.batches(inputs):
                errors.update({inputs.name(number): sentence for number, sentence in batch.errors.items()})
                for read in by_variant.values():
                    features[batch.numbers] = read.pooled.cpu().numpy()
        return Columns([inputs.name(number) for number in range(len(inputs))], {"features": features}, errors)

    def explain(self, data: Any) -> Explanation:
        """Which patch of an image, or token of a text, speaks for which class; also without a threshold.

        Args:
            data: One input, as for a call.

        Returns:
            The map as arrays, and as a picture: `explain(image).figure().savefig("why.png")`.

        Raises:
            ValueError: If it is not one input, or cannot be read.
        """
        inputs = self._inputs(data)
        if len(inputs) != 1:
            raise ValueError(f"There are {len(inputs)} {self.kind}s; an explanation is of one: give them one by one.")
        (batch,) = inputs.readable_batches()
        _raise_first(batch.errors)
        score = None if self._score.needs_fit else float(self.scores(inputs)["score"][0])
        # Cosines where the score reads no patches, as GL-MCM does.
        temperature = self.settings.get("temperature") if self._score.needs_local else None
        with self._reading(layers=False) as reader:
            return explanation_of_batch(
                reader, batch, self.processor, self.class_names, temperature=temperature, score=score
            )

    def on(self, column: str, prefix: str = "") -> Batched:
        """The detector as a function of a batch of columns: `dataset.map(detector.on("image"), batched=True)`.

        Args:
            column: Name of the column with the inputs.
            prefix: Before the names of the columns that are given: data have a "label" of their own.

        Returns:
            Takes a mapping from column names to lists, and gives the columns "label", "probability", "score", "is_id",
            "threshold" and "error". It can be pickled; see `Batched`.

        Raises:
            ValueError: If the detector has no threshold.
        """
        self._threshold_in_use()
        return Batched(self, column, prefix)

    @property
    def score(self) -> Score:
        """The score, fitted where it had to be."""
        return self._score

    @property
    def class_weights(self) -> ClassWeights:
        """The map from features to logits, on the model's device: for models that classify by texts, the text bank.

        Raises:
            ValueError: If the model is another than it was made with.
        """
        self._model_state.check(self.model)
        device = next(self.model.parameters()).device
        if self._bank.weight.device != device:
            self._bank = self._bank.to(device)
        return self._bank

    def _records(self, sources: Iterator[Inputs], top_k: int, errors: Errors) -> Iterator[Detection]:
        threshold = self._threshold_in_use().value
        if errors not in ("record", "raise"):
            raise ValueError(f"errors is {errors!r}; write 'record' or 'raise'.")
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; give 1 or more.")
        for inputs in sources:
            for numbers, outputs, broken in self._outputs(inputs, top_k):
                if broken and errors == "raise":
                    raise ValueError(broken[min(broken)])
                found: dict[int, Detection] = {
                    number: Detection(inputs.name(number), None, None, None, None, threshold, (), sentence)
                    for number, sentence in broken.items()
                }
                if outputs is not None:
                    scores = outputs.scores[self.score_name].tolist()
                    for row, number in enumerate(numbers):
                        found.setdefault(
                            number, self._detection(inputs.name(number), outputs, row, scores[row], threshold)
                        )
                yield from (found[number] for number in sorted(found))

    def _detection(self, name: str, outputs: Outputs, row: int, score: float, threshold: float) -> Detection:
        indices, probabilities = outputs.top[row].tolist(), outputs.probabilities[row].tolist()
        top = tuple((self.class_names[index], value) for index, value in zip(indices, probabilities, strict=True))
        return Detection(name, *top[0], score, score >= threshold, threshold, top)

    def _outputs(self, inputs: Inputs, top_k: int) -> Iterator[tuple[list[int], Outputs | None, dict[int, str]]]:
        """By batch: numbers of the inputs that could be read, what is said of them, and why others are not decided."""
        self._check_score_is_fitted()
        scores = {self.score_name: (self._score, self.settings)}
        with closing(inputs.readable_batches()) as batches:
            for batch in batches:
                # Opened for each batch: between them runs what the caller does, with gradients or in another thread.
                with self._reading() as reader:
                    found = outputs_of(reader, batch, inputs, scores, top_k)
                yield found

    def _all_scores(self, inputs: Inputs, score: Score) -> NDArray[np.float32]:
        scores = []
        chosen = {self.score_name: (score, self.settings)}
        with self._reading() as reader:
            for batch, features in reader.batches(inputs):
                _raise_first(batch.errors)
                scores += [
                    reader.outputs(name, read, chosen).scores[self.score_name] for name, read in features.items()
                ]
        return torch.cat(scores).numpy()

    def _readings(self, reader: Reader, inputs: Inputs) -> Iterator[Reading]:
        for batch, features in reader.batches(inputs):
            _raise_first(batch.errors)
            for name, read in features.items():
                yield from reader.readings(name, read, batch.labels, local=self._score.needs_local)

    @contextmanager
    def _reading(self, *, layers: bool | None = None) -> Iterator[Reader]:
        """The model, ready to read, with the text bank."""
        needed = self._score.needs_layers if layers is None else layers
        with reading(self.model, self.class_weights, layers=needed) as reader:
            yield reader

    def _inputs(self, data: Any) -> Inputs:
        return source_of(data, self.processor, self.kind, batch_size=self.batch_size)

    def _threshold_in_use(self) -> Threshold:
        if self.threshold is None:
            raise ValueError(
                f"The detector has no threshold{self._lost_threshold}, so that it cannot decide; call fit(id_data) on "
                "held-out in-distribution inputs, or at(threshold=...). scores(data) works without."
            )
        return self.threshold

    def _check_score_is_fitted(self) -> None:
        if self._score.needs_fit:
            raise ValueError(f"The score {self.score_name} has to be fitted itself; call fit(id_data).")

    def __repr__(self) -> str:
        temperature = self.settings.get("temperature")
        at = "" if temperature is None else f" at temperature {temperature:g}"
        return (
            f"OODDetector({type(self.model).__name__}, {len(self.class_names)} classes, {self.score_name}{at}, "
            f"threshold {self.threshold or 'not fitted'})"
        )


def _raise_first(errors: Mapping[int, str]) -> None:
    if errors:
        raise ValueError(f"{errors[min(errors)]} Replace it, or take it away.")
