"""What a model says of whole sets: one pass over each for all scores and adapters, or what a cache has of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from setar_peft.backbones import ClassWeights, ImageFeatures, base_of
from setar_peft.data.inputs import Inputs
from setar_peft.detection.adapters import AS_IT_IS, active_adapters
from setar_peft.detection.cache import DamagedError, SetCache, say_damaged
from setar_peft.detection.cache_keys import fingerprints, key_of_set, keys_of_scores
from setar_peft.detection.features import Outputs, Reader, reading
from setar_peft.detection.figures import ModelScores, SetScores
from setar_peft.detection.scoring import Reading, Score, ScoresInUse
from setar_peft.objectives.class_prompts import ClassPrompts
from setar_peft.processes import Processes

Errors = Literal["raise", "leave_out"]

# What can be computed of the pooled features alone.
_OF_FEATURES = frozenset({"global_logits", "negative_logits", "features"})
# Inputs whose logits are made at once from features that are known.
_ROWS = 1024

# By variant of a model: name -> score, and its settings in full.
_Chosen = Mapping[str, ScoresInUse]


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated, in one or several variants at once.

    Attributes:
        model: A stock model, or a PEFT model.
        adapters: Name of a variant -> its adapter; see `setar_peft.detection.features.reading`.
        classes: The classes, or the map from features to logits that is known already.
        scores: Name -> score, and the settings that were given for it.
        fit_inputs: ID inputs for the scores that have to be fitted; None where none has to be.
    """

    model: nn.Module
    adapters: Mapping[str, str | None]
    classes: ClassPrompts | ClassWeights
    scores: ScoresInUse
    fit_inputs: Inputs | None = None

    def about(self, variant: str) -> dict[str, Any]:
        """What a variant is, as plain values."""
        base = base_of(self.model)
        adapter: Any = self.adapters[variant]
        if adapter == AS_IT_IS:
            adapter = active_adapters(self.model)
        parameter = next(self.model.parameters())
        return {
            "type": type(base).__name__,
            "base": base.name_or_path or None,
            "adapter": adapter or None,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
        }


@dataclass
class _Found:
    """What is known of one set and one variant, in the order of the set.

    Attributes:
        predictions: "numbers", "predictions" and "confidence", (n,) each; None where they are not known.
        values: Name of a score -> (n,) float32.
        settings: Name of a score -> its settings in full.
        errors: Place in the set -> why an input could not be read.
    """

    predictions: dict[str, Tensor] | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, Tensor]], errors: Mapping[int, str]) -> _Found:
        """From the columns of parts of the set, in any order."""
        columns = _joined(parts)
        if columns:
            order = columns["numbers"].argsort()
            columns = {name: column[order] for name, column in columns.items()}
        empty = torch.zeros(0, dtype=torch.long)
        predictions = {name: columns.pop(name, empty) for name in ("numbers", "predictions", "confidence")}
        return cls(
            predictions, {name.removeprefix("score "): column for name, column in columns.items()}, {}, {**errors}
        )


class Passes:
    """What each variant of a model says of sets.

    Several processes share each set's batches, and all get the whole.

    Args:
        subject: The model.
        sets: Name of a set -> its inputs, the ID set first.
        processes: Those that take part.
        errors: Whether an input that cannot be read is raised or left out.
        cache: Folder of what was computed before, and is kept; of all processes.
        count: Told of every batch how many inputs it had.
    """

    def __init__(
        self,
        subject: Subject,
        sets: Mapping[str, Inputs],
        processes: Processes,
        *,
        errors: Errors = "raise",
        cache: Path | None = None,
        count: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._subject, self._sets, self._errors, self._count = subject, sets, errors, count
        device = next(subject.model.parameters()).device
        self._processes = processes
        self._caches: dict[tuple[str, str], SetCache] = {}
        self._keys: dict[str, str] = {}
        if cache is not None:
            self._keys = keys_of_scores(subject.model, subject.classes, subject.scores, subject.fit_inputs)
            digests = fingerprints(subject.model, dict(subject.adapters))
            for name, inputs in sets.items():
                contents = inputs.digest()
                for variant, digest in digests.items():
                    key = key_of_set(digest, contents, inputs.batch_size, device.type)
                    self._caches[name, variant] = SetCache(cache, key)

    def run(self) -> dict[str, ModelScores]:
        """The scores of every variant and set.

        Raises:
            ValueError: If an input cannot be read, or a score refuses its settings or what it is given.
        """
        subject = self._subject
        found = {name: {variant: self._kept(name, variant) for variant in subject.adapters} for name in self._sets}
        lacking = [name for name, known in found.items() if self._any(any(map(self._lacks, known.values())))]
        for name in self._sets.keys() - set(lacking):
            self._count(len(self._sets[name]))
        if lacking:
            # What is known of a variant already is not computed for another's sake.
            adapters = {
                variant: adapter
                for variant, adapter in subject.adapters.items()
                if self._any(any(self._lacks(found[name][variant]) for name in lacking))
            }
            layers = any(score.needs_layers for score, _ in subject.scores.values())
            with reading(subject.model, subject.classes, layers=layers, adapters=adapters) as reader:
                chosen = self._chosen(reader, [found[name] for name in lacking])
                for name in lacking:
                    known = {variant: found[name][variant] for variant in adapters}
                    found[name] |= self._completed(reader, chosen, name, known)
        id_set, *ood_sets = self._sets
        models = {}
        for variant in subject.adapters:
            scored = {name: self._scores(name, found[name][variant]) for name in self._sets}
            settings = {name: found[id_set][variant].settings[name] for name in subject.scores}
            models[variant] = ModelScores(
                scored[id_set], {name: scored[name] for name in ood_sets}, settings, subject.about(variant)
            )
        return models

    def _kept(self, set_name: str, variant: str) -> _Found:
        """What the cache has."""
        found = _Found()
        cache = self._caches.get((set_name, variant))
        if cache is None or not cache.is_whole:
            return found
        found.errors = cache.errors
        for name, key in self._keys.items():
            kept = cache.values(key)
            if kept is not None and not name:
                found.predictions = kept[0]
            elif kept is not None:
                found.values[name], found.settings[name] = kept[0]["values"], kept[1]
        return found

    def _lacks(self, found: _Found) -> bool:
        return found.predictions is None or any(name not in found.values for name in self._subject.scores)

    def _chosen(self, reader: Reader, lacking: list[dict[str, _Found]]) -> _Chosen:
        """The scores with their settings, fitted where they have to be and are not all known."""
        inputs = self._subject.fit_inputs
        chosen: dict[str, dict[str, tuple[Score, Mapping[str, Any]]]] = {variant: {} for variant in reader.classes}
        for name, (score, given) in self._subject.scores.items():
            needed = any(name not in variants[variant].values for variants in lacking for variant in chosen)
            fits = score.needs_fit and self._any(needed)
            for variant in chosen:
                used, settings = score, reader.settings(variant, score, given)
                if fits:
                    assert inputs is not None
                    used = score.fit(self._readings(reader, variant, inputs, score.needs_local), **settings)
                chosen[variant][name] = used, settings
        return chosen

    def _readings(self, reader: Reader, variant: str, inputs: Inputs, local: bool) -> Iterator[Reading]:
        for batch, features in reader.batches(inputs):
            if batch.errors:
                raise ValueError(f"{batch.errors[min(batch.errors)]} Replace it, or take it away from fit_data.")
            yield from reader.readings(variant, features[variant], batch.labels, local=local)

    def _completed(self, reader: Reader, chosen: _Chosen, set_name: str, known: dict[str, _Found]) -> dict[str, _Found]:
        """What was missing of a set, from its features where those are known and enough, or by a pass over it."""
        missing = {
            variant: {name: one for name, one in chosen[variant].items() if name not in found.values}
            for variant, found in known.items()
        }
        caches = [self._caches.get((set_name, variant)) for variant in known]
        read = {name for wanted in missing.values() for score, _ in wanted.values() for name in score.reads}
        has_features = all(cache is not None and cache.is_whole for cache in caches)
        results = None
        if not self._any(not has_features or bool(read - _OF_FEATURES)):
            results = self._of_features(reader, missing, set_name)
            self._count(0 if results is None else len(self._sets[set_name]))
        if self._any(results is None):
            results = self._passed(reader, missing, set_name)
        assert results is not None
        for variant, found in results.items():
            found.settings = {name: {**one[1], **one[0].state()[0]} for name, one in missing[variant].items()}
            self._keep(set_name, variant, found)
            values = {**known[variant].values, **found.values}
            found.values = {name: values.get(name, torch.zeros(0)) for name in self._subject.scores}
            found.settings = {**known[variant].settings, **found.settings}
        return results

    def _of_features(self, reader: Reader, missing: _Chosen, set_name: str) -> dict[str, _Found] | None:
        """What is missing of a set, from features that are known; None where those are damaged."""
        results = {}
        for variant, scores in missing.items():
            cache, parts = self._caches[set_name, variant], []
            try:
                for numbers, features in cache.features():
                    for start in range(0, len(numbers), _ROWS):
                        part = features[start : start + _ROWS].to(reader.backbone.device)
                        outputs = reader.outputs(variant, ImageFeatures(part, part[:, None]), scores)
                        parts.append(_columns(numbers[start : start + _ROWS], outputs))
            except DamagedError as error:
                say_damaged(error)
                return None
            results[variant] = _Found.of(parts, cache.errors)
        return results

    def _passed(self, reader: Reader, missing: _Chosen, set_name: str) -> dict[str, _Found]:
        """What is missing of a set, by a pass over this process's batches; of all processes."""
        inputs, processes = self._sets[set_name], self._processes
        places = inputs.batch_places(processes.index, processes.count)
        parts: dict[str, list[dict[str, Tensor]]] = {variant: [] for variant in missing}
        left = len(inputs)
        errors: dict[int, str] = {}
        failure: Exception | None = None
        try:
            for batch, features in reader.batches(inputs if processes.count == 1 else inputs.select(places)):
                errors |= {places[number]: sentence for number, sentence in batch.errors.items()}
                if self._errors == "raise":
                    self._check(batch.errors)
                numbers = torch.tensor([places[number] for number in batch.numbers], dtype=torch.long)
                for variant, read in features.items():
                    outputs = reader.outputs(variant, read, missing[variant])
                    parts[variant].append(_columns(numbers, outputs))
                    if self._caches:
                        self._caches[set_name, variant].add(numbers, outputs.features, processes.index)
                # The others are as far.
                done = min(left, processes.count * (len(batch.numbers) + len(batch.errors)))
                left -= done
                self._count(done)
            self._count(left)
        except Exception as error:
            failure = error
        # Whoever fails meets the others here, who would wait for it.
        sentences = processes.gathered(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for index, sentence in enumerate(sentences):
            if sentence is not None:
                raise ValueError(f"Process {index} of {processes.count}: {sentence}")
        together = {place: sentence for own in processes.gathered(errors) for place, sentence in own.items()}
        results = {}
        for variant, own_parts in parts.items():
            everyone = [part for part in processes.gathered(_joined(own_parts)) if part]
            results[variant] = _Found.of(everyone, dict(sorted(together.items())))
            if self._caches:
                cache = self._caches[set_name, variant]
                files = [name for own in processes.gathered(cache.flush(processes.index)) for name in own]
                if processes.is_first:
                    cache.finish(files, together)
        return results

    def _keep(self, set_name: str, variant: str, found: _Found) -> None:
        if not self._caches or not self._processes.is_first:
            return
        cache = self._caches[set_name, variant]
        for name, values in found.values.items():
            if name in self._keys:
                cache.save_values(self._keys[name], {"values": values}, found.settings[name])
        cache.save_values(self._keys[""], found.predictions or {}, {})

    def _scores(self, name: str, found: _Found) -> SetScores:
        inputs = self._sets[name]
        if self._errors == "raise":
            self._check(found.errors)
        assert found.predictions is not None
        numbers = found.predictions["numbers"]
        if not len(numbers):
            first = found.errors[min(found.errors)]
            raise ValueError(f"None of the {len(inputs)} inputs of the set {name!r} can be read. {first}")
        return SetScores(
            [inputs.name(number) for number in numbers.tolist()],
            numbers.numpy(),
            inputs.labels[numbers].numpy(),
            found.predictions["predictions"].numpy(),
            found.predictions["confidence"].numpy(),
            {score: values.numpy() for score, values in found.values.items()},
            {inputs.name(number): sentence for number, sentence in found.errors.items()},
        )

    def _check(self, errors: Mapping[int, str]) -> None:
        if errors:
            raise ValueError(
                f"{errors[min(errors)]} Replace it, take it away, or leave out what cannot be read: errors='leave_out'."
            )

    def _any(self, said: bool) -> bool:
        """Whether any process says so: all have to do the same."""
        return any(self._processes.gathered(said))


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _columns(numbers: Tensor, outputs: Outputs) -> dict[str, Tensor]:
    """Numbers, predictions, confidence, and each score, (n,) each."""
    columns = {"numbers": numbers, "predictions": outputs.top[:, 0], "confidence": outputs.probabilities[:, 0]}
    return columns | {f"score {name}": values for name, values in outputs.scores.items()}
