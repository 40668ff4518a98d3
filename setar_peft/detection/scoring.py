"""What a score is: a function whose parameters name what it reads of a model, and its settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from setar_peft.backbones import ClassWeights, ImageFeatures, Logits

# What a score's parameter of that name is given.
READABLE: dict[str, str] = {
    "global_logits": "logits of the whole images, (n, classes)",
    "local_logits": "logits of their patches, (n, patches, classes)",
    "layer_logits": "logits of the whole images after each block, (n, blocks, classes)",
    "negative_logits": "logits of the whole images to negative labels, (n, negative labels)",
    "features": "features of the whole images as the class weights take them, (n, d)",
}


class Reading(NamedTuple):
    """What a model says of some inputs.

    Attributes:
        logits: Their logits.
        features: Their features, as the class weights take them.
        labels: (n,) class indices; -1 for inputs without labels.
        classes: The map from the features to the logits; for a score that has to be fitted and reads it.
    """

    logits: Logits
    features: ImageFeatures
    labels: Tensor
    classes: ClassWeights | None = None


class Score:
    """A score: higher means more in-distribution.

    Its function's parameters say what it reads: each that has a name in `READABLE` is given that, and every other is a
    setting. A score of one's own is such a function:

        def margin(global_logits, temperature=1.0):
            first, second = (global_logits / temperature).topk(2).values.unbind(-1)
            return first - second

    Args:
        function: Takes what it reads, float32 on the model's device, and its settings by name, to (n,) floating.
        of_cosines: Whether it is meant for cosines, so that the temperature by default is the model's logit scale.
        name: What tables call it; by default the function's name.

    Attributes:
        name: What tables call it.
        reads: Names of what it reads.

    Raises:
        ValueError: If it is no function, or one whose parameters cannot be given by name; if it reads nothing, or is
            meant for cosines and has no setting `temperature`; or if the name is no text.
    """

    def __init__(self, function: Callable[..., Tensor], *, of_cosines: bool = False, name: str | None = None) -> None:
        if not callable(function):
            raise ValueError(f"The score {function!r} is no function; give a name or a function of logits.")
        self.function = function
        self.name = str(getattr(function, "__name__", type(function).__name__)) if name is None else name
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name is {name!r}; give what tables should call the score, such as 'margin'.")
        self.of_cosines = of_cosines
        parameters = _parameters(function, self.name)
        self.reads = frozenset(parameters) & frozenset(READABLE)
        self._settings = {name: value.default for name, value in parameters.items() if name not in self.reads}
        if not self.reads:
            raise ValueError(
                f"The score {self.name} has the parameters {', '.join(parameters) or 'none'}, so that it reads nothing "
                f"of a model; name at least one of {', '.join(READABLE)}."
            )
        if of_cosines and "temperature" not in self._settings:
            raise ValueError(f"The score {self.name} is meant for cosines; give its function a setting temperature.")

    @property
    def needs_local(self) -> bool:
        """Whether local logits are read, so that the model has to give them."""
        return "local_logits" in self.reads

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` has to find something out first; not any more once it has."""
        return False

    @property
    def needs_layers(self) -> bool:
        """Whether logits after each block are read."""
        return "layer_logits" in self.reads

    def settings(self, scale: Tensor | float, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting of the score by name: those given, and the score's own for the others.

        Args:
            scale: The model's logit scale, `Logits.scale`.
            given: `temperature`, and what else the function takes.

        Raises:
            ValueError: If the score has no such setting, or one without a default is not given.
        """
        unknown = sorted(set(given) - set(self._settings))
        if unknown:
            has = f"it has {', '.join(map(repr, self._settings))}" if self._settings else "it has none"
            raise ValueError(f"{self.name} has no setting {', '.join(map(repr, unknown))}; {has}.")
        settings = dict(self._settings)
        if self.of_cosines:
            settings["temperature"] = scale
        settings.update(given)
        missing = [name for name, value in settings.items() if value is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"{self.name} needs the setting {', '.join(map(repr, missing))}, which has no default.")
        return settings

    def __call__(self, logits: Logits, features: ImageFeatures | None = None, **settings: Any) -> Tensor:
        """The score of some inputs.

        Args:
            logits: Their logits.
            features: Their features, where the score reads them.
            settings: As `settings` gives them.

        Returns:
            (n,) float32.

        Raises:
            ValueError: If something that it reads is missing, or the function's result has another shape.
        """
        values = self.function(**self._read(logits, features), **settings)
        if not isinstance(values, Tensor) or values.shape != logits.pooled.shape[:1] or values.is_complex():
            given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(
                f"The score {self.name} gives {given} for {len(logits.pooled)} inputs; it has to give one number for "
                "each, (n,)."
            )
        return values.float()

    def fit(self, readings: Iterable[Reading], **given: Any) -> Score:
        """The score with what it has to find out on in-distribution inputs first; itself where that is nothing.

        Args:
            readings: What the model says of the inputs; read once.
            given: Settings that the score will be computed with, where they are not its own.
        """
        del readings, given
        return self

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """How the score was made and what `fit` found out, to be saved: plain values (JSON), and tensors."""
        return {}, {}

    def with_state(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Score:
        """The score that `state` is of, from one that `find_score` finds under the same name.

        Raises:
            ValueError: If it is no such state.
        """
        if values or tensors:
            raise ValueError(f"The score {self.name} has nothing to be fitted, and {sorted({*values, *tensors})} came.")
        return self

    def _read(self, logits: Logits, features: ImageFeatures | None) -> dict[str, Tensor]:
        held = {
            "global_logits": logits.pooled,
            "local_logits": logits.local,
            "layer_logits": logits.layers,
            "negative_logits": logits.negative,
            "features": None if features is None else features.pooled,
        }
        read = {name: value for name in sorted(self.reads) if (value := held[name]) is not None}
        missing = sorted(self.reads - set(read))
        if missing:
            listed = "; ".join(f"{name} ({READABLE[name]})" for name in missing)
            how = "Give negative_labels" if "negative_logits" in missing else "Give them"
            raise ValueError(
                f"The score {self.name!r} reads what is not there: {listed}. {how}, or take a score that does without."
            )
        return read


# Name -> the score, and its settings: those that were given, or in full.
ScoresInUse: TypeAlias = Mapping[str, tuple[Score, Mapping[str, Any]]]


def _parameters(function: Callable[..., Tensor], name: str) -> Mapping[str, inspect.Parameter]:
    """Parameters of a score's function, each of which can be given by its name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The score {name} does not say what its parameters are ({error}); wrap it in a function that names them."
        ) from error
    unnamed = [str(one) for one in parameters.values() if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if unnamed:
        raise ValueError(
            f"The score {name} has the parameter {', '.join(unnamed)}, which is not given by name; wrap it in a "
            "function that names what it reads and its settings."
        )
    return parameters


def check_temperature(settings: Mapping[str, Any]) -> None:
    """Refuse a temperature that makes no score, before anything is computed with it."""
    temperature: Any = settings.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature is {temperature!r}; give a finite number above 0.")
