"""A detector as one ONNX graph: inputs in, score, decision, label and logits out.

The graph holds the tower that reads the inputs, with the adapters merged, the class weights (the text bank, or the
classifier), the score and the threshold. Whatever the tower computes in, the graph takes float32, and the logits, the
score and its comparison with the threshold are float32.

A graph is compared with the model by onnxruntime before it is put in its place.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from setar_peft.backbones import ClassWeights
from setar_peft.data.sources import source_of
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.onnx_graph import DetectorGraph, GraphOutputs
from setar_peft.detection.scoring import Score
from setar_peft.hub.processors import preprocessing_of
from setar_peft.versions import versions
from setar_peft.writing import whole_files, whole_folder

OnnxDtype = Literal["float32", "float16"]

# torch 2.6 cannot follow Swin, SigLIP and BERT.
OLDEST_TORCH = (2, 8)

# How far scores and logits may be from the model's, as a share of their range: GL-MCM's of 1,000 classes differ in the
# fifth decimal alone. Where all are much alike, as a share of the hundredth of the largest.
TOLERANCE: dict[str, float] = {"float32": 1e-4, "float16": 1e-2}


@dataclass(frozen=True)
class OnnxCheck:
    """What onnxruntime made of a graph beside what the model made of the same inputs.

    Attributes:
        files: The files written, the graph first.
        inputs: How many inputs were compared.
        score_difference: Largest absolute difference of their scores.
        score_range: Largest less smallest score of the model.
        logit_difference: Largest absolute difference of their logits.
        undecided: How many scores are so near to the threshold that rounding decides; all other decisions are the same.
        carried: What the graph carries: name -> what JSON can hold.
    """

    files: tuple[Path, ...]
    inputs: int
    score_difference: float
    score_range: float
    logit_difference: float
    undecided: int
    carried: dict[str, Any]

    def __str__(self) -> str:
        but = f" but for {self.undecided} at the threshold" if self.undecided else ""
        beside = f" Its weights are in {self.files[1].name} beside it." if len(self.files) > 1 else ""
        return (
            f"Wrote {self.files[0]}: on {self.inputs} inputs its scores, over a range of {self.score_range:.1e}, are "
            f"within {self.score_difference:.1e} of the model's, its logits within {self.logit_difference:.1e}, and "
            f"its decisions the same{but}.{beside}"
        )


def export_onnx(
    model: nn.Module,
    classes: ClassWeights,
    score: Score,
    settings: Mapping[str, Any],
    threshold: float,
    path: str | Path,
    example: Tensor | Mapping[str, Tensor],
    *,
    dtype: OnnxDtype = "float32",
    metadata: Mapping[str, Any] | None = None,
) -> OnnxCheck:
    """Write a model, a score and a threshold as one ONNX graph, and check it.

    The graph takes `pixel_values` (batch, channels, height, width), float32, of the height and width of `example`; of a
    text model the names in `example`, each (batch, length), int64. It gives `score` (batch,) float32, `is_id` (batch,)
    bool (score >= threshold), `label` (batch,) int64 (the class of the largest logit) and `logits` (batch, classes)
    float32.

    Args:
        model: A stock model of a known family, or one with adapters, whose active ones are merged in a copy. The model
            itself is left as it was.
        classes: The map from its features to logits.
        score: The score, fitted where it has to be.
        settings: All its settings, as `Score.settings` gives them.
        threshold: An input with a score of at least this is in-distribution.
        path: The file, which must not exist yet; it appears whole or not at all. Only where the weights are larger than
            the 2 GB that one file can hold, they are in `<path>.data` beside it.
        example: One or more inputs as the model's processor makes them: they give the graph the names and sizes of its
            inputs, and are among those that it is checked on.
        dtype: What the tower computes in.
        metadata: What the graph carries beside score, settings, threshold, dtype and versions, such as class names and
            preprocessing: name -> what JSON can hold.

    Returns:
        How far the graph is from the model, which computes in float32 for the comparison.

    Raises:
        ValueError: If a package is missing, the file exists, the model or the score cannot be exported, or the graph
            does not give what the model gives.

    Warns:
        UserWarning: If the model does not compute in float32: its threshold was found on other scores than the graph's.
    """
    check_packages()
    if dtype not in get_args(OnnxDtype):
        raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(map(repr, get_args(OnnxDtype)))}.")
    if not math.isfinite(threshold):
        raise ValueError(f"The threshold is {threshold!r}, with which no score can be compared; fit the detector.")
    path = Path(path)
    for file in (path, path.with_name(f"{path.name}.data")):
        if file.exists():
            raise ValueError(f"{file} exists; give another path, so that no file is overwritten.")
    graph = DetectorGraph(model, classes, score, settings, threshold, example)
    carried = {
        **(metadata or {}),
        "score": score.name,
        "settings": graph.settings,
        "threshold": graph.threshold.item(),
        "dtype": dtype,
        "versions": versions(),
    }
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in carried.items()}
    batches = list(_batches(graph))
    with torch.no_grad():
        expected = [graph(*batch.values()) for batch in batches]
    graph.merge(getattr(torch, dtype))
    with whole_files(path.parent) as folder:
        graph.write(folder / path.name, texts)
        actual = _run(folder / path.name, batches)
        figures = _compared(expected, actual, graph.threshold, TOLERANCE[dtype])
        files = tuple(path.parent / file.name for file in sorted(folder.iterdir()))
    return OnnxCheck(files, *figures, carried)


def export_detector(detector: OODDetector, folder: str | Path, dtype: OnnxDtype = "float32") -> OnnxCheck:
    """Write a fitted detector as `model.onnx`, and beside it `detector.json`, which says how to use it.

    `detector.json` holds the names of the classes, the settings of the image processor, the score with its settings,
    and the threshold with what it rests on; the graph carries the same. A text detector's tokenizer is beside it. See
    docs/onnx.md, with an example that needs onnxruntime, Pillow and NumPy alone.

    Args:
        detector: A detector with a threshold, and with a processor that takes pictures or texts.
        folder: A new or empty folder; all files appear in it, or none.
        dtype: What the model computes in.

    Returns:
        How far the graph is from the model, on made-up pictures or texts and on noise.

    Raises:
        ValueError: If the detector has no threshold, the folder holds files, or as `export_onnx`.

    Warns:
        UserWarning: As `export_onnx`.
    """
    check_packages()
    if detector.threshold is None:
        raise ValueError("The detector has no threshold, so that its graph could not decide; call fit(id_data) first.")
    samples = (
        made_up_pictures() if detector.kind == "image" else [f"A word on {name}." for name in detector.class_names]
    )
    example, _ = next(source_of(samples, detector.processor, detector.kind, batch_size=4).batches())
    described = {
        "kind": detector.kind,
        "class_names": list(detector.class_names),
        "prompt": detector.prompt,
        "threshold_found": asdict(detector.threshold),
        "preprocessing": preprocessing_of(detector.processor, detector.kind),
    }
    folder = Path(folder)
    with whole_folder(folder) as unfinished:
        if detector.kind == "text":
            getattr(detector.processor, "tokenizer", detector.processor).save_pretrained(unfinished)
        check = export_onnx(
            detector.model,
            detector.class_weights,
            detector.score,
            detector.settings,
            detector.threshold.value,
            unfinished / "model.onnx",
            example,
            dtype=dtype,
            metadata=described,
        )
        document = json.dumps(check.carried, indent=2, ensure_ascii=False)
        (unfinished / "detector.json").write_text(f"{document}\n", encoding="utf-8")
    return replace(check, files=tuple(folder / file.name for file in check.files))


def made_up_pictures(count: int = 4) -> list[Image.Image]:
    """Pictures that have what photographs have: shades, edges, shapes before a ground, and a little noise; seeded."""
    generator = np.random.default_rng(0)
    height, width = 240, 320
    rows, columns = np.mgrid[0:height, 0:width] / height
    found = []
    for _ in range(count):
        colours = generator.uniform(0, 255, (3, 3))
        picture = colours[0] * rows[..., None] + colours[1] * (1 - rows[..., None])
        x, y, radius = generator.uniform(0.3, 1.0), generator.uniform(0.3, 0.7), generator.uniform(0.1, 0.3)
        picture[(columns - x) ** 2 + (rows - y) ** 2 < radius**2] = colours[2]
        picture += generator.normal(0, 8, picture.shape)
        found.append(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))
    return found


def check_packages() -> None:
    """Raise a `ValueError` where a package is missing or too old, before anything long has run."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}, not installed here: pip install setar-peft[onnx]")
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        raise ValueError(
            f"ONNX needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, which follows every model; this "
            f"is {torch.__version__}. Update torch, or export with a newer one elsewhere."
        )


def _batches(graph: DetectorGraph) -> Iterator[dict[str, Tensor]]:
    """Three inputs and one, of the example and of noise; a text alone is cut to half its length."""
    generator = torch.Generator().manual_seed(0)
    example = {name: value[torch.arange(3) % len(value)] for name, value in graph.example.items()}
    noise = dict(example)
    for name, value in example.items():
        if value.is_floating_point():
            noise[name] = torch.randn(value.shape, generator=generator)
        elif name == "input_ids":
            noise[name] = torch.randint(graph.model.config.vocab_size, value.shape, generator=generator)
    for inputs in (example, noise):
        alone = {name: value[-1:] for name, value in inputs.items()}
        if graph.backbone.kind == "text":
            attended = alone.get("attention_mask", torch.ones_like(alone["input_ids"]))[0].nonzero().flatten()
            alone = {name: value[:, attended[: max(2, len(attended) // 2)]] for name, value in alone.items()}
        yield from (inputs, alone)


def _run(path: Path, batches: Iterable[Mapping[str, Tensor]]) -> list[GraphOutputs]:
    """What onnxruntime makes of the batches."""
    import onnxruntime

    feeds = ({name: value.numpy() for name, value in batch.items()} for batch in batches)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return [GraphOutputs(*map(torch.from_numpy, session.run(GraphOutputs._fields, feed))) for feed in feeds]
    except Exception as error:  # of a dozen classes of its own
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} does not run the graph, so that nothing was written: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _compared(
    expected: Sequence[GraphOutputs], actual: Sequence[GraphOutputs], threshold: Tensor, tolerance: float
) -> tuple[int, float, float, float, int]:
    """All of `OnnxCheck` between the files and what is carried.

    Raises:
        ValueError: If the outputs are further apart than the tolerance, or decide otherwise than it explains.
    """
    theirs, ours = (GraphOutputs(*map(torch.cat, zip(*outputs, strict=True))) for outputs in (expected, actual))
    apart, ranges, allowed = {}, {}, {}
    for name in ("score", "logits"):
        wanted, given = getattr(theirs, name), getattr(ours, name)
        apart[name] = (given - wanted).abs().max().item()
        ranges[name] = (wanted.max() - wanted.min()).item()
        allowed[name] = tolerance * max(ranges[name], 0.01 * wanted.abs().max().item())
        if not apart[name] <= allowed[name]:
            raise ValueError(
                f"onnxruntime's {name} differs from the model's by up to {apart[name]:.1e}, where {allowed[name]:.1e} "
                "is allowed, so that nothing was written. In float16 activations may overflow: export float32."
            )
    undecided = (theirs.score - threshold).abs() <= allowed["score"]
    first, second = theirs.logits.topk(min(2, theirs.logits.shape[1])).values.T[[0, -1]]
    unsure = first - second <= 2 * allowed["logits"]
    wrong = (ours.is_id != theirs.is_id) & ~undecided | (ours.label != theirs.label) & ~unsure
    if wrong.any() or not ours.is_id.equal(ours.score >= threshold):
        raise ValueError(
            f"onnxruntime decides otherwise than the model on {int(wrong.sum())} of {len(wrong)} inputs, though scores "
            "and logits agree, so that nothing was written. Try another version of onnxruntime."
        )
    return len(wrong), apart["score"], ranges["score"], apart["logits"], int(undecided.sum())
