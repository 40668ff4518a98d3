"""`transformers.pipeline("ood-detection", model=<detector>)`: a detector behind transformers' own interface.

Importing this package registers it. This module is imported with `transformers.pipelines`, so it imports nothing else
that is heavy before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import GeneratorType
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.data import Dataset
from transformers import PreTrainedConfig
from transformers.pipelines.base import Pipeline

if TYPE_CHECKING:
    from setar_peft.data.rows import Rows
    from setar_peft.detection.detector import OODDetector

TASK = "ood-detection"

_PROCESSORS = ("tokenizer", "feature_extractor", "image_processor", "video_processor", "processor")

_OF_THE_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# What transformers says of itself; the dtype is checked by the pipeline.
_OF_TRANSFORMERS = ("_from_pipeline", "_commit_hash", "trust_remote_code", "code_revision", "dtype")


class DetectorName:
    """A detector's folder or Hub name, where `transformers.pipeline` expects a model.

    It loads nothing yet: after an error transformers would go on and load a model without its detector.

    Args:
        name: Folder or Hub name.
        settings: How to load it, such as `token`.

    Attributes:
        config: An empty configuration: transformers before 5.18 asks it for a commit.
    """

    config = PreTrainedConfig()

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name, self.settings = name, dict(settings)

    @classmethod
    def from_pretrained(cls, name: str, **settings: Any) -> DetectorName:
        """What transformers calls with the name that it was given, and with settings of its own."""
        return cls(name, settings)

    def load(self) -> OODDetector:
        """The detector.

        Raises:
            ValueError: If there is none, or a setting is none of a detector's.
        """
        from setar_peft.detection.detector import OODDetector

        settings = {name: value for name, value in self.settings.items() if name not in _OF_TRANSFORMERS}
        hub = {name: settings.pop(name) for name in _OF_THE_HUB if settings.get(name) is not None}
        unknown = sorted(name for name, value in settings.items() if value is not None)
        if unknown:
            raise ValueError(
                f"A detector is not loaded with {', '.join(unknown)}. Load it yourself and give it as the model: "
                f"pipeline({TASK!r}, model=OODDetector.from_pretrained({self.name!r}, ...))."
            )
        if "revision" in hub:
            # A plain string: transformers' own knows the commit of the repository that it read a config from, which may
            # be the base's.
            hub["revision"] = str(hub["revision"])
        return OODDetector.from_pretrained(self.name, **hub)


class _RowsDataset(Dataset[Any]):
    """The inputs of a data set of any kind, as transformers goes through a data set."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows.count

    def __getitem__(self, number: int) -> Any:
        return self._rows.input(number)


class _Unread:
    """An input that transformers is to pass on as it is, be it a tensor."""

    def __init__(self, input_: Any) -> None:
        self.input = input_


class OODDetectionPipeline(Pipeline):
    """A detector as a pipeline: `pipeline("ood-detection", model="street-detector")("street.jpg")`.

    It takes what transformers' pipelines take: one input (of images a path, a URL, a PIL image, an array; a text), a
    list of them, a generator, a data set of `datasets` or torch, a `KeyDataset`; with `batch_size` and `num_workers`.
    For one input it gives a dict, for a list a list, for the others an iterator: "label", "probability", "score",
    "is_id", "threshold", "top" (a list of "label" and "probability") and "error", which says why an input could not be
    read or scored and else is None. They are `OODDetector`'s own, to the bit where batches are composed alike.

    Args:
        model: A detector; by `transformers.pipeline` the name of one.
        threshold: Another threshold than the detector's; at construction, or at a call for that call alone.
        tpr: Another level for it, found on the scores that the detector's rests on; likewise.
        top_k: How many of the likeliest classes "top" holds; likewise.
        kwargs: `device`, `dtype` (which has to be the detector's), `batch_size`, `num_workers`, as everywhere.

    Attributes:
        detector: The detector, with the threshold in use. One that was given is not changed, but its model is moved to
            the pipeline's device.

    Raises:
        ValueError: If the detector has no threshold and none is given, or the dtype is another than the detector's.
    """

    _load_processor: ClassVar[bool] = False
    _load_image_processor: ClassVar[bool] = False
    _load_feature_extractor: ClassVar[bool] = False
    _load_tokenizer: ClassVar[bool] = False

    def __init__(self, model: OODDetector | DetectorName, **kwargs: Any) -> None:
        given = [name for name in _PROCESSORS if kwargs.get(name) is not None]
        if given:
            raise ValueError(
                f"There is a {given[0]} beside a detector, whose threshold holds for its own alone; leave it out."
            )
        detector = model.load() if isinstance(model, DetectorName) else model
        if not hasattr(detector, "id_scores"):
            raise ValueError(
                f"The model of an {TASK} pipeline is a detector: the folder or Hub name of one, or an OODDetector, and "
                f"not a {type(detector).__name__}."
            )
        dtype = next(detector.model.parameters()).dtype
        wanted = kwargs.get("dtype")
        if wanted not in (None, "auto", dtype, str(dtype).removeprefix("torch.")):
            raise ValueError(
                f"dtype is {wanted}, and the detector's threshold was found in {dtype}: its scores would be others. "
                "Leave dtype out, or fit a detector with a model of that dtype."
            )
        self.detector = copy.copy(detector)
        super().__init__(model=detector.model, **kwargs)
        # For transformers' collation, which asks for one of them and pads nothing here.
        self.feature_extractor = detector.processor
        self.detector = self._forward_params.pop("detector", self.detector)
        self.detector.on("input")  # refused without a threshold

    def _sanitize_parameters(
        self, threshold: float | None = None, tpr: float | None = None, top_k: int | None = None, **unknown: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"An {TASK} pipeline has no parameter {', '.join(map(repr, unknown))}; it has 'threshold', 'tpr' and "
                "'top_k', beside those of every pipeline."
            )
        forward: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
        if threshold is not None or tpr is not None:
            forward["detector"] = copy.copy(self.detector).at(threshold=threshold, tpr=tpr)
        return {}, forward, {}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Decide; see the class.

        Args:
            inputs: One input, or several.
            *args: None.
            **kwargs: `threshold`, `tpr`, `top_k`, `batch_size`, `num_workers`.

        Raises:
            ValueError: If a parameter is unknown or outside its range, or a data set has no column of inputs.
        """
        from setar_peft.data.rows import is_of_datasets, rows_of
        from setar_peft.data.streams import is_stream, streamed_rows

        kind = self.detector.kind
        if isinstance(inputs, GeneratorType):
            pass  # read one by one: the next may have to be waited for
        elif is_stream(inputs):
            parts = streamed_rows(inputs, kind, None, kwargs.get("batch_size") or self._batch_size or 1)
            inputs = (rows.input(number) for rows in parts for number in range(rows.count))
        elif isinstance(inputs, Dataset) or is_of_datasets(inputs, "Dataset"):
            inputs = _RowsDataset(rows_of(inputs, kind, labelled=False))
        elif isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, *args, **kwargs)

    def preprocess(self, input_: Any) -> dict[str, Any]:
        """An input as it is: the detector reads what there is of a batch at once, in threads."""
        return {"inputs": _Unread(input_)}

    def _forward(self, held: dict[str, Any], detector: Any = None, top_k: int = 1) -> dict[str, Any]:
        inputs = held["inputs"]
        batch = [inputs] if isinstance(inputs, _Unread) else inputs
        records = (detector or self.detector)([each.input for each in batch], top_k=top_k)
        return {"records": list(records)}

    def postprocess(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """A record as a dict."""
        records = outputs["records"]
        record = (records[0] if isinstance(records, list) else records).to_dict()
        del record["id"]  # an input's place in its batch, where it has no path
        return record

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Save the detector, with the threshold in use, by `OODDetector.save_pretrained`."""
        return self.detector.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push the detector, with the threshold in use, by `OODDetector.push_to_hub`."""
        return self.detector.push_to_hub(repo_id, **kwargs)
