"""What an evaluation gives: figures of models side by side, with intervals, in every form that people read or keep."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setar_peft.detection.figures import (
    Conventions,
    Difference,
    EvaluationRow,
    ModelScores,
    SetScores,
    figures_of,
)
from setar_peft.detection.metrics import OODMetrics, Positive, ThresholdRule
from setar_peft.detection.page import Curves, curves_of, evaluation_sections
from setar_peft.detection.tables import (
    difference_cells,
    difference_values,
    figure_cells,
    in_columns,
    known,
    row_values,
    score_label,
    write_parquet,
)
from setar_peft.plots.report import write_page
from setar_peft.versions import versions

if TYPE_CHECKING:
    from PIL import Image

# From the name of a set and a number in it to what a person sees: a picture or a text.
Shown = Callable[[str, int], "Image.Image | str"]


@dataclass(frozen=True)
class Evaluation:
    """How well one or several models classify and detect, on the same images.

    Attributes:
        models: Name of a model -> its scores of every set.
        rows: The figures of each model, OOD set and score; with several sets also their "mean".
        differences: Those of each model from the first, over paired resamples; empty for one model.
        conventions: How figures and intervals are taken.
        prompt: The template of the class prompts, or one text a class; None for models without prompts.
        class_names: Names of the classes; None where they are not known.
        versions: What it was computed with, name -> version.
        shown: From the name of a set ("ID" for the ID images) and a number in it to its picture or text; None where
            only the scores are at hand.
    """

    models: dict[str, ModelScores]
    rows: list[EvaluationRow]
    differences: list[Difference]
    conventions: Conventions
    prompt: str | Sequence[str] | None
    class_names: Sequence[str] | None
    versions: dict[str, str]
    shown: Shown | None = None

    @classmethod
    def of(
        cls,
        models: Mapping[str, ModelScores],
        conventions: Conventions = Conventions(),  # noqa: B008 - it cannot be changed
        *,
        prompt: str | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        shown: Shown | None = None,
    ) -> Evaluation:
        """The evaluation of models whose scores are there.

        Args:
            models: Name of a model -> its scores; all of the same images, sets and scores. Differences are taken from
                the first.
            conventions: How figures and intervals are taken.
            prompt: As the attribute.
            class_names: As the attribute.
            shown: As the attribute.

        Raises:
            ValueError: If the models do not fit each other, a score is NaN or infinite (with the images' names), or a
                convention is unknown.
        """
        rows, differences = figures_of(models, conventions)
        return cls(dict(models), rows, differences, conventions, prompt, class_names, versions(), shown)

    @classmethod
    def of_scores(
        cls,
        id_scores: Any,
        ood_scores: Mapping[str, Any],
        *,
        score: str = "score",
        model: str = "model",
        positive: Positive = Conventions.positive,
        threshold: ThresholdRule = Conventions.threshold_rule,
        tpr: float = Conventions.tpr,
        resamples: int = Conventions.resamples,
        seed: int = Conventions.seed,
    ) -> Evaluation:
        """The evaluation of one score that somebody has in a file. For several, and for several models, see `of`.

        Args:
            id_scores: Scores of the ID images, (n,); higher means more in-distribution.
            ood_scores: Name of an OOD set -> scores of its images, (m,).
            score: What the score is called.
            model: What the model is called.
            positive: The positive class of the false-positive rate, "id" or "ood".
            threshold: How its threshold is chosen, "at_least" or "closest".
            tpr: Its level, 0 < tpr <= 1.
            resamples: Resamples of the bootstrap; 0 for no intervals.
            seed: Of the bootstrap.

        Raises:
            ValueError: As `of`.
        """
        sets = {name: SetScores.of_scores({score: scores}) for name, scores in ood_scores.items()}
        scores = ModelScores(SetScores.of_scores({score: id_scores}), sets, {score: {}})
        return cls.of({model: scores}, Conventions(positive, threshold, tpr, resamples, seed))

    @property
    def scores(self) -> list[str]:
        """Names of the scores."""
        return list(next(iter(self.models.values())).settings)

    def metrics(self, ood_set: str, score: str, model: str | None = None) -> OODMetrics:
        """The figures of one model and score on one OOD set, or on their "mean".

        Args:
            ood_set: Name of the set.
            score: Name of the score.
            model: Name of the model; may be left out where there is one.

        Raises:
            ValueError: If there is no such row.
        """
        name = self._model(model)
        for row in self.rows:
            if (row.model, row.ood_set, row.score) == (name, ood_set, score):
                return row.metrics
        rows = ", ".join(f"({row.ood_set!r}, {row.score!r})" for row in self.rows if row.model == name)
        raise ValueError(f"There are no figures for {(ood_set, score)!r}; there are some for {rows}.")

    def accuracy(self, model: str | None = None) -> float:
        """Share of ID images that a model classifies right, in [0, 1]; NaN for images without labels.

        Args:
            model: Name of the model; may be left out where there is one.

        Raises:
            ValueError: If there is no such model.
        """
        return self.models[self._model(model)].id_set.accuracy

    def score_label(self, score: str) -> str:
        """A score with the settings that it was computed with, such as "gl_mcm (temperature 100)".

        The temperature is always in it, another setting where it is not the score's own. Settings in which the models
        differ are given for each.
        """
        return score_label(score, self.models)

    def convention(self) -> str:
        """How the figures came about and are to be read: convention, temperature, prompt, versions."""
        used = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        scores = ", ".join(map(self.score_label, self.scores))
        said = [*self.conventions.sentences(), f"All figures in percent. Scores: {scores}.", self._prompt()]
        return " ".join([*said, *self._left_out(), f"Made with {used}."])

    def table(self) -> str:
        """The figures as a table in plain text, in percent, with the differences and `convention` below it."""
        parts = [in_columns(*figure_cells(self.models, self.rows, self.conventions)), self._accuracies()]
        if self.differences:
            parts += ["", in_columns(*difference_cells(self.differences, self.conventions)), ""]
        return "\n".join([*parts, *textwrap.wrap(self.convention(), 80)])

    def to_markdown(self) -> str:
        """The same as tables in GitHub's Markdown."""

        def table(headings: list[str], rows: list[list[str]]) -> str:
            cells = [headings, ["---"] * len(headings), *rows]
            return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)

        parts = [table(*figure_cells(self.models, self.rows, self.conventions, whole=True)), self._accuracies()]
        if self.differences:
            parts.append(table(*difference_cells(self.differences, self.conventions)))
        return "\n\n".join([*parts, self.convention()]) + "\n"

    def to_csv(self) -> str:
        """The rows as comma-separated values, shares in [0, 1] unrounded; what is not known is empty."""
        differences = {(row.model, row.ood_set, row.score): row for row in self.differences}
        records = []
        for row in self.rows:
            record = {**row_values(row), "accuracy": known(self.accuracy(row.model))}
            difference = differences.get((row.model, row.ood_set, row.score))
            if difference is not None:
                values = difference_values(difference)
                record["baseline"] = difference.baseline
                record |= {f"difference_{name}": values[name] for name in values if name.startswith(("fpr", "auroc"))}
            records.append(record)
        file = io.StringIO()
        names = list(dict.fromkeys(name for record in records for name in record))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return file.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images as plain values for JSON, shares in [0, 1]; what is not known is None.

        With the figures goes what they depend on: conventions, prompt, each score's settings, what the models are, how
        many images there were and which were left out, versions.
        """
        return {
            "prompt": self.prompt,
            "class_names": None if self.class_names is None else list(self.class_names),
            "conventions": asdict(self.conventions),
            "models": {
                name: {**model.about, "scores": model.settings, "accuracy": known(model.id_set.accuracy)}
                for name, model in self.models.items()
            },
            "images": {name: len(images) for name, images in self._sets().items()},
            "left_out": {name: images.left_out for name, images in self._sets().items() if images.left_out},
            "rows": [row_values(row) for row in self.rows],
            "differences": [difference_values(row) for row in self.differences],
            "versions": self.versions,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write the scores of every image: model, set, id, label, prediction, confidence, and a column a score.

        Unknown labels and predictions are null. The file is written whole or not at all.

        Args:
            path: The file, which is replaced if it is there.

        Returns:
            The path.

        Raises:
            ValueError: If its folder does not exist, or a score is called like another column.
        """
        return write_parquet(path, self.models)

    def curves(self, score: str) -> Curves:
        """ROC curves and histograms of a score, as matplotlib's figures: `evaluation.curves("mcm").roc.savefig(...)`.

        Args:
            score: Name of the score.

        Raises:
            ValueError: If there is no such score, or matplotlib is missing.
        """
        return curves_of(self.models, self._score(score), self.conventions)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Out-of-distribution detection",
        score: str | None = None,
        mistakes: int = 16,
    ) -> Path:
        """Write one self-contained HTML page: tables, figures, settings, and the most confident mistakes as pictures.

        Args:
            path: The file, which is replaced if it is there.
            title: The page's title.
            score: The score whose mistakes are shown; by default the first.
            mistakes: How many of each kind.

        Returns:
            The path.

        Raises:
            ValueError: If there is no such score or folder, or matplotlib is missing.
        """
        sections = evaluation_sections(
            self.models,
            self.rows,
            self.differences,
            self.conventions,
            score=self.scores[0] if score is None else self._score(score),
            mistakes=mistakes,
            class_names=self.class_names,
            shown=self.shown,
            settings=[
                ("Accuracy", self._accuracies()),
                ("Conventions", " ".join(self.conventions.sentences())),
                ("Prompt", self._prompt()),
                *((f"Score {name}", self.score_label(name)) for name in self.scores),
                *((f"Model {name}", json.dumps(model.about)) for name, model in self.models.items() if model.about),
                *((f"Set {name}", f"{len(images)} images") for name, images in self._sets().items()),
                *(("Left out", sentence) for sentence in self._left_out()),
                *self.versions.items(),
            ],
        )
        return write_page(path, title, sections)

    def _model(self, model: str | None) -> str:
        if model is None and len(self.models) == 1:
            return next(iter(self.models))
        if model is None or model not in self.models:
            raise ValueError(f"model is {model!r}; write one of {', '.join(map(repr, self.models))}.")
        return model

    def _score(self, score: str) -> str:
        if score not in self.scores:
            raise ValueError(f"score is {score!r}; write one of {', '.join(map(repr, self.scores))}.")
        return score

    def _sets(self) -> dict[str, SetScores]:
        return next(iter(self.models.values())).sets

    def _accuracies(self) -> str:
        known = {name: model.id_set.accuracy for name, model in self.models.items()}
        if any(map(math.isnan, known.values())):
            return "Accuracy: not known, as there are no labels."
        if len(known) == 1:
            return f"Accuracy on ID images: {100 * self.accuracy():.2f}."
        return f"Accuracy on ID images: {', '.join(f'{name} {100 * share:.2f}' for name, share in known.items())}."

    def _prompt(self) -> str:
        if self.prompt is None:
            return "No prompts."
        if isinstance(self.prompt, str):
            return f'Prompt "{self.prompt}".'
        return f'Prompts "{self.prompt[0]}" and so on, one a class.'

    def _left_out(self) -> list[str]:
        return [
            f"{len(images.left_out)} images of {name} could not be read and are left out."
            for name, images in self._sets().items()
            if images.left_out
        ]
