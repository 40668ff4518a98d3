"""How well models classify and detect: their scores of whole sets, and the figures made of them.

Works on stock models, PEFT models with one or several adapters, and detectors alike, of images and of texts.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from setar_peft.backbones import backbone_of
from setar_peft.data.inputs import Inputs
from setar_peft.data.labels import ClassNames
from setar_peft.data.rows import Kind
from setar_peft.data.sources import source_of
from setar_peft.detection.adapters import AS_IT_IS
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.figures import ID_SET, Conventions, ModelScores, check_set_names
from setar_peft.detection.metrics import Positive, ThresholdRule
from setar_peft.detection.passes import Errors, Passes, Subject
from setar_peft.detection.result import Evaluation
from setar_peft.detection.scores import WantedScores, chosen_scores
from setar_peft.detection.scoring import ScoresInUse
from setar_peft.objectives.class_prompts import PROMPT, ClassPrompts
from setar_peft.processes import Processes

DEFAULT_SCORES = ("mcm", "gl_mcm")


class _Candidate(NamedTuple):
    """A model as it is given: itself, or what a detector has of it."""

    subject: Subject
    processor: Any
    kind: Kind
    class_names: ClassNames
    prompt: str | Sequence[str] | None

    def inputs(self, data: Any, batch_size: int, names: ClassNames | None = None) -> Inputs:
        """Whatever a user has, as the model takes it; labelled where there are names, unless it is an `Inputs`."""
        names = None if isinstance(data, Inputs) else names
        return source_of(data, self.processor, self.kind, class_names=names, batch_size=batch_size)


def evaluate(
    model: nn.Module | OODDetector | Mapping[str, nn.Module | OODDetector],
    id_data: Any,
    ood_data: Mapping[str, Any],
    scores: WantedScores | None = None,
    *,
    processor: Any = None,
    class_names: Sequence[str] | Mapping[Any, str] | ClassNames | None = None,
    prompt: str | Sequence[str] = PROMPT,
    labelled: bool = False,
    adapters: Mapping[str, str | None] | None = None,
    temperature: float | None = None,
    negative_labels: Any = None,
    fit_data: Any = None,
    batch_size: int = 64,
    positive: Positive = Conventions.positive,
    threshold: ThresholdRule = Conventions.threshold_rule,
    tpr: float = Conventions.tpr,
    resamples: int = Conventions.resamples,
    seed: int = Conventions.seed,
    errors: Errors = "raise",
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Figures of each model, OOD set and score, with intervals, and differences of the models on the same images.

    Each set is read once a model, for all scores and adapters; local logits never exist as a whole. Models are left as
    they were. Under `accelerate launch` the processes share the batches, and each gets the figures of one process.

    Args:
        model: A stock model of a known family, a PEFT model, whose active adapters compute, or an `OODDetector`; or
            name -> model, of which all are compared with the first.
        id_data: In-distribution (ID) inputs that nothing was chosen on: whatever a detector takes (a folder, a data
            set, a list, a tensor of pixel values, texts), or an `ImageSource` or `NamedInputs`.
        ood_data: Name of an OOD set -> its inputs, likewise.
        scores: A score or several (see `OODDetector`); by default MCM and GL-MCM, for a detector its own.
        processor: The model's processor, or its tokenizer where inputs are pixel values; not for a detector. For
            several models one for all, or name -> processor.
        class_names: Names of the ID classes, as for `LoCoOpObjective`; by default a classifier's own, or those that
            `id_data` was made with.
        prompt: Text with "{class}" in it, or one text a class; for models that classify by texts.
        labelled: Whether `id_data` have labels, for the accuracy: one subfolder a class, or a label column. An
            `ImageSource` or `NamedInputs` knows that itself.
        adapters: Variants of one PEFT model, compared in one pass: name -> name of the adapter, or None for the base,
            as in `{"base": None, "SeTAR": "default"}`.
        temperature: Divides the logits of every score whose settings do not say it, > 0; by default the paper's, which
            is another for each score (see `setar_peft.detection.scores`).
        negative_labels: Words that name none of the classes; for scores that read them.
        fit_data: ID inputs for scores that have to be fitted first; none that are in `id_data`. Where a score reads
            labels, an `ImageSource` or `NamedInputs` with class names.
        batch_size: Inputs a batch.
        positive: The positive class of the false-positive rate, "id" or "ood".
        threshold: How its threshold is chosen, "at_least" or "closest".
        tpr: Its level, 0 < tpr <= 1.
        resamples: Resamples of the bootstrap; 0 for no intervals.
        seed: Of the bootstrap.
        errors: What becomes of an input that cannot be read: "raise", or "leave_out", which the result counts.
        cache: Folder in which features and scores are kept, by the contents of model, adapter and data and by
            versions: a second run computes nothing, and a new score that reads global logits comes from the features.
        progress: Show a bar on standard error.

    Raises:
        ValueError: If there is no OOD set, a score, adapter or convention is unknown, an input cannot be read or does
            not fit the model, a score is NaN (with the images' names), labels mean other classes than the model's, or
            a score has to be fitted and there is nothing to fit it on but the test data.
    """
    conventions = Conventions(positive, threshold, tpr, resamples, seed)
    _check(ood_data, errors)
    named = model if isinstance(model, Mapping) else {"model": model}
    if not named:
        raise ValueError("model is an empty mapping; give at least one model by name.")
    if adapters is not None and (len(named) > 1 or any(isinstance(one, OODDetector) for one in named.values())):
        raise ValueError("adapters are variants of one PEFT model; give that model alone, or models by name alone.")
    _check_bases(named)
    folder = None if cache is None else _made(Path(cache))
    given = class_names if class_names is not None or not isinstance(id_data, Inputs) else id_data.classes
    models: dict[str, ModelScores] = {}
    candidates: dict[str, _Candidate] = {}
    all_sets: dict[str, dict[str, Inputs]] = {}
    for name, one in named.items():
        own_processor = processor.get(name) if isinstance(processor, Mapping) else processor
        variants = {name: AS_IT_IS} if adapters is None else adapters
        chosen = None if scores is None else chosen_scores(scores, temperature)
        if isinstance(one, OODDetector):
            candidate = _of_detector(one, variants, chosen, temperature)
        else:
            default = chosen or chosen_scores(DEFAULT_SCORES, temperature)
            candidate = _of_model(one, variants, default, own_processor, given, prompt, negative_labels)
        names = candidate.class_names if class_names is None else ClassNames.of(class_names)
        id_inputs = candidate.inputs(id_data, batch_size, names if labelled else None)
        fit_inputs = None if fit_data is None else candidate.inputs(fit_data, batch_size)
        for inputs in (id_inputs, fit_inputs):
            if inputs is not None and inputs.classes is not None:
                inputs.classes.check_order_of(candidate.class_names, "the model")
        candidates[name] = candidate._replace(subject=_with_fit_inputs(candidate.subject, fit_inputs, id_inputs))
        ood_inputs = {ood_set: candidate.inputs(data, batch_size) for ood_set, data in ood_data.items()}
        all_sets[name] = {ID_SET: id_inputs, **ood_inputs}
    processes = [Processes(next(one.subject.model.parameters()).device) for one in candidates.values()]
    total = sum(len(inputs) for sets in all_sets.values() for inputs in sets.values())
    with _progress(shown=progress and processes[0].is_first, total=total) as count:
        for (name, candidate), own in zip(candidates.items(), processes, strict=True):
            passes = Passes(candidate.subject, all_sets[name], own, errors=errors, cache=folder, count=count)
            models |= passes.run()
    first = next(iter(candidates))
    shown = all_sets[first]
    return Evaluation.of(
        models,
        conventions,
        prompt=candidates[first].prompt,
        class_names=list(candidates[first].class_names.names),
        shown=lambda set_name, number: shown[set_name].shown(number),
    )


def _check(ood_data: Any, errors: str) -> None:
    if not isinstance(ood_data, Mapping):
        raise ValueError(
            f"ood_data is a {type(ood_data).__name__}; give OOD sets by name, for example {{'noise': images}}."
        )
    if not ood_data:
        raise ValueError("ood_data is empty; give at least one OOD set, for example {'noise': images}.")
    check_set_names(ood_data)
    if errors not in ("raise", "leave_out"):
        raise ValueError(f"errors is {errors!r}; write 'raise' or 'leave_out'.")


def _check_bases(named: Mapping[str, Any]) -> None:
    """Refuse a base beside the PEFT model that was made of it: the adapter sits in the base, which has it, too."""
    for name, model in named.items():
        if not hasattr(model, "get_base_model"):
            continue
        base = model.get_base_model()
        twins = [other for other, one in named.items() if one is base]
        if twins:
            raise ValueError(
                f"{twins[0]!r} is the model that {name!r} was made of, and computes with its adapter, too; give "
                f"{name!r} alone, with adapters={{{twins[0]!r}: None, {name!r}: {model.active_adapters[0]!r}}}."
            )


def _made(folder: Path) -> Path:
    """The folder of the cache, tried before anything is computed for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"cache is {folder}, where nothing can be written ({error}); give another folder.") from error


def _of_model(
    model: nn.Module,
    adapters: Mapping[str, str | None],
    scores: ScoresInUse,
    processor: Any,
    class_names: Any,
    prompt: str | Sequence[str],
    negative_labels: Any,
) -> _Candidate:
    backbone = backbone_of(model)
    classes = ClassPrompts.of_model(backbone, processor, class_names, prompt, negative_labels=negative_labels)
    used = classes.prompt if backbone.needs_prompts else None
    return _Candidate(Subject(model, adapters, classes, scores), processor, backbone.kind, classes.classes, used)


def _of_detector(
    detector: OODDetector,
    adapters: Mapping[str, str | None],
    scores: ScoresInUse | None,
    temperature: float | None,
) -> _Candidate:
    if scores is None:
        settings = dict(detector.settings)
        if temperature is not None:
            settings["temperature"] = temperature
        scores = {detector.score_name: (detector.score, settings)}
    subject = Subject(detector.model, adapters, detector.class_weights, scores)
    names = ClassNames.of(detector.class_names)
    return _Candidate(subject, detector.processor, detector.kind, names, detector.prompt)


def _with_fit_inputs(subject: Subject, inputs: Inputs | None, id_inputs: Inputs) -> Subject:
    """The subject with what its scores are fitted on, which is no test data."""
    to_fit = [name for name, (score, _) in subject.scores.items() if score.needs_fit]
    if not to_fit:
        if inputs is not None:
            raise ValueError(
                f"None of the scores {', '.join(map(repr, subject.scores))} has to be fitted; leave fit_data out."
            )
        return subject
    if inputs is None:
        raise ValueError(
            f"The score {to_fit[0]!r} has to be fitted on ID data first; give fit_data, ID inputs that are none of the "
            "test data."
        )
    tested = set(id_inputs.contents())
    shared = sum(content in tested for content in inputs.contents())
    if shared == len(inputs):
        raise ValueError("fit_data are the test data; give other ID inputs, or the figures say too much.")
    if shared:
        warnings.warn(
            f"{shared} of {len(inputs)} inputs of fit_data are test data, too, so that the figures say too much.",
            UserWarning,
            stacklevel=3,
        )
    return replace(subject, fit_inputs=inputs)


@contextmanager
def _progress(*, shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, and the function that moves it on."""
    columns = BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("inputs"), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stderr), disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda inputs: bar.advance(task, inputs)
