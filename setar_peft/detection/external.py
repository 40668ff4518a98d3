"""Detectors of pytorch-ood as scores: fitted on this model's features, saved as those features and fitted again."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from setar_peft.detection.scoring import Reading, Score

# pytorch-ood's detectors of one feature vector an input, and whether they read its label. Not SHE, which compares the
# labels with predictions, and is wrong in silence where they are numbered otherwise.
DETECTORS = {
    "DICE": False,
    "GMM": True,
    "KNN": False,
    "Mahalanobis": True,
    "NCI": False,
    "NNGuide": False,
    "PNML": False,
    "RMD": True,
    "ReAct": False,
    "VRA": False,
    "ViM": False,
    "fDBD": False,
}

# No options: what a detector is given by this, and the function that ReAct and its kin score the clipped logits with.
_NO_OPTIONS = {"encoder", "backbone", "head", "w", "b", "detector"}


class PytorchOOD(Score):
    """A detector of pytorch-ood, fitted on the features of in-distribution inputs; its sign turned, higher meaning ID.

    It needs the extra: `pip install setar-peft[pytorch-ood]`. That brings torchvision along, and with it the torch that
    it was built for; these detectors need no torchvision, and `pip install --no-deps pytorch-ood` leaves torch alone.

    Features are those that the class weights take: of unit length for CLIP. Detectors that read the classifier (ViM,
    ReAct, DICE, ...) get the class weights, with the logit scale inside; ReAct and VRA take the features for maps of
    one pixel. All is computed on the CPU in float32. Nothing is pickled: what is saved are the features that it was
    fitted on, their labels and the class weights, 20 MB for 10,000 features of 512 numbers. Loading fits it again,
    which on one machine with as many threads gives the same scores to the bit.

    Source: https://pytorch-ood.readthedocs.io, whose documentation names the paper of each.

    Args:
        detector: Its name there: a key of `DETECTORS`. With options as in the score's name, "KNN(k=5)".
        options: Its own options by name, plain values, such as `k=50` for KNN or `d=128` for ViM.

    Attributes:
        detector: As given.
        options: As given.

    Raises:
        ValueError: If pytorch-ood is missing, the detector is unknown or takes something else than features, or has no
            such option, or needs one that is not given.
    """

    def __init__(self, detector: str, **options: Any) -> None:
        self.detector, parsed = _parsed(detector)
        self.options = {**parsed, **options}
        if self.detector not in DETECTORS:
            raise ValueError(
                f"pytorch-ood's detector is {detector!r}; write one of {', '.join(map(repr, DETECTORS))}, which take "
                "one feature vector an input."
            )
        made_with = ", ".join(f"{option}={value!r}" for option, value in self.options.items())
        super().__init__(self._negated, name=f"pytorch_ood:{self.detector}" + (f"({made_with})" if made_with else ""))
        self._check_options()
        self._state: dict[str, Tensor] = {}
        self._fitted: Any = None

    @property
    def needs_fit(self) -> bool:
        """Whether it is still to be fitted."""
        return self._fitted is None

    def fit(self, readings: Iterable[Reading], **given: Any) -> PytorchOOD:
        """The same, fitted.

        Args:
            readings: What the model says of in-distribution inputs, with labels for Mahalanobis, RMD and GMM, and with
                `classes` for detectors that read the classifier.
            given: There are no settings.

        Raises:
            ValueError: If there are no inputs, labels are missing that are read, or the detector cannot be fitted on
                them, such as KNN on fewer than k.
        """
        self.settings(1.0, given)
        features, labels, classes = [], [], None
        for reading in readings:
            features.append(reading.features.pooled.float().cpu())
            labels.append(reading.labels.cpu())
            classes = reading.classes
        if not features:
            raise ValueError(f"{self.name} is fitted on in-distribution inputs, and there are none.")
        state = {"features": torch.cat(features), "labels": torch.cat(labels).long()}
        if self._reads_classifier:
            if classes is None:
                raise ValueError(f"{self.name} reads the classifier; give readings with classes, the class weights.")
            weight = classes.weight.float().cpu()
            bias = torch.zeros(len(weight)) if classes.bias is None else classes.bias.float().cpu()
            state |= {"weight": weight, "bias": bias}
        return self._fit(state)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The detector, its options and the version of pytorch-ood; and what it was fitted on, nothing before."""
        version = importlib.metadata.version("pytorch-ood")
        return {"detector": self.detector, "options": self.options, "version": version}, dict(self._state)

    def with_state(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PytorchOOD:
        """The detector that `state` is of, fitted again.

        Warns if another version of pytorch-ood is installed.

        Raises:
            ValueError: If it is no such state, or of another detector.
        """
        own, _ = self.state()
        wanted = {"features", "labels", *(("weight", "bias") if self._reads_classifier else ())}
        if set(values) != set(own) or set(tensors) not in (set(), wanted):
            raise ValueError(
                f"This is no state of {self.name}: it has {', '.join(sorted([*values, *tensors])) or 'nothing'}; "
                f"{', '.join(sorted([*own, *wanted]))} are needed."
            )
        if any(values[key] != own[key] for key in ("detector", "options")):
            raise ValueError(
                f"This is no state of {self.name}, but of {values['detector']} with the options {values['options']}."
            )
        if values["version"] != own["version"]:
            warnings.warn(
                f"{self.name} was saved with pytorch-ood {values['version']} and is fitted again with "
                f"{own['version']}, whose scores may be others; fit the threshold anew, or install that version.",
                UserWarning,
                stacklevel=2,
            )
        return self._fit(tensors) if tensors else PytorchOOD(self.detector, **self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, as for another process, it is its state, too: pytorch-ood's own classes need its whole package."""
        return _restored, (self.detector, self.options, *self.state())

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the detector is made with."""
        return inspect.signature(getattr(_detectors(), self.detector)).parameters

    @property
    def _reads_classifier(self) -> bool:
        return not {"head", "w", "b"}.isdisjoint(self._parameters)

    def _negated(self, features: Tensor) -> Tensor:
        """Minus the detector's score, (n,), of features (n, d)."""
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{self.name} is computed by pytorch-ood and not by torch alone, so it cannot be exported."
            )
        if self._fitted is None:
            raise ValueError(f"{self.name} has not been fitted yet; call fit with in-distribution inputs.")
        if not len(features):
            return features.new_zeros(0)
        width = self._state["features"].shape[1]
        if features.shape[1] != width:
            raise ValueError(f"{self.name} was fitted on features of {width}, and these are of {features.shape[1]}.")
        predict = getattr(self._fitted, "predict_features", None) or self._fitted.predict_feature_maps
        with torch.no_grad():
            return -predict(features.float().cpu()).to(features.device)

    def _fit(self, state: Mapping[str, Tensor]) -> PytorchOOD:
        # In memory of torch's own: a matrix at another alignment, as in a file that is mapped, is multiplied otherwise.
        state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        features, labels = state["features"], state["labels"]
        if DETECTORS[self.detector]:
            unlabelled = int((labels < 0).sum())
            if unlabelled:
                raise ValueError(
                    f"{self.name} compares classes, and {unlabelled} of {len(labels)} inputs have no label; fit it on "
                    "labelled inputs, such as an ImageSource with class_names, or take one without classes: KNN or ViM."
                )
            # Classes without an input have no centre; the others are numbered as pytorch-ood wants them.
            labels = torch.unique(labels, return_inverse=True)[1]
        else:
            # Below 0 means OOD there.
            labels = torch.zeros_like(labels)
        width = features.shape[-1]
        if self.detector == "ViM" and not 1 <= self.options["d"] < width:
            raise ValueError(f"{self.name} has d={self.options['d']} for features of {width}; give 1 to {width - 1}.")
        try:
            detector = getattr(_detectors(), self.detector)(**self._arguments(state))
            fit = getattr(detector, "fit_features", None) or detector.fit_feature_maps
            with torch.no_grad():
                fit(features, labels)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"pytorch-ood's {self.detector} cannot be fitted on features {tuple(features.shape)} of "
                f"{len(torch.unique(labels))} classes ({type(error).__name__}: {error or 'no reason given'}). Give "
                "other inputs, or other options."
            ) from error
        fitted = PytorchOOD(self.detector, **self.options)
        fitted._fitted, fitted._state = detector, state
        if not fitted._negated(features[:100]).isfinite().all():
            raise ValueError(f"{self.name} gives no finite score for what it was fitted on; take other options.")
        return fitted

    def _arguments(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Values for those."""
        known: dict[str, Any] = {"encoder": None, "backbone": None}
        if "weight" in state:
            weight, bias = state["weight"], state["bias"]
            head = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            known |= {"head": head, "w": weight, "b": bias}
        return {name: known[name] for name in self._parameters if name in known} | self.options

    def _check_options(self) -> None:
        own = [
            one
            for one in self._parameters.values()
            if one.kind is one.POSITIONAL_OR_KEYWORD and one.name not in _NO_OPTIONS
        ]
        unknown = sorted(set(self.options) - {one.name for one in own})
        if unknown:
            listed = ", ".join(one.name for one in own) or "none"
            raise ValueError(f"pytorch-ood's {self.detector} takes no option {', '.join(unknown)}; it has {listed}.")
        missing = [one.name for one in own if one.default is one.empty and one.name not in self.options]
        if missing:
            raise ValueError(
                f"pytorch-ood's {self.detector} needs the option {', '.join(missing)}: "
                f"PytorchOOD({self.detector!r}, {missing[0]}=...)."
            )
        strange = [
            one
            for one, value in self.options.items()
            if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value))
        ]
        if strange:
            raise ValueError(
                f"The option {strange[0]} of pytorch-ood's {self.detector} is {self.options[strange[0]]!r}; give a "
                "number, a text, True or False, which can be saved."
            )


def _restored(detector: str, options: Any, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PytorchOOD:
    return PytorchOOD(detector, **options).with_state(values, tensors)


def _parsed(detector: Any) -> tuple[str, dict[str, Any]]:
    """A detector as a score's name has it: "KNN", or "KNN(k=5)"."""
    try:
        call = ast.parse(detector, mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, TypeError, ValueError):
        pass
    raise ValueError(f"pytorch-ood's detector is {detector!r}; write its name, such as 'KNN', or 'KNN(k=5)'.")


def _detectors() -> Any:
    """pytorch-ood's detectors, without its data sets and models, which need torchvision.

    Raises:
        ValueError: If it is not installed, or cannot be imported.
    """
    how = "pip install setar-peft[pytorch-ood], or pip install --no-deps pytorch-ood to leave torch as it is"
    loaded = sys.modules.get("pytorch_ood.detector")
    if loaded is not None:
        return loaded
    spec = importlib.util.find_spec("pytorch_ood")
    if spec is None:
        raise ValueError(f"pytorch-ood is not installed: {how}.")
    # A submodule can be imported while the package itself is there by name and has not been run.
    sys.modules["pytorch_ood"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("pytorch_ood.detector")
    except ImportError as error:
        raise ValueError(f"pytorch-ood cannot be imported ({error}): {how}.") from error
    finally:
        del sys.modules["pytorch_ood"]
