"""The section on a detector in the card of its adapter, or the card of a detector of a stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from setar_peft.hub.card import CARD_NAME, hub_id, with_section
from setar_peft.hub.detector_files import DetectorFiles

MARKER = "setar-detector"

_TAGS = ("out-of-distribution-detection", "ood-detection")
_SHOWN_CLASSES = 20
_LONGEST_PROMPT = 200


def write_detector_card(
    folder: str | Path, files: DetectorFiles, threshold: str | None = None, base_model: str | None = None
) -> None:
    """Write the section on a detector into the card in a folder, on top, or bring the one that is there up to date.

    Text outside our sections, an edited section and other metadata are kept. Where there is no card, as beside a stock
    model, one is made.

    Args:
        folder: The folder of the detector's files.
        files: The detector.
        threshold: Its threshold in words.
        base_model: The model that it was made with, where that is one of the Hub's; a local path is not told.
    """
    path = Path(folder) / CARD_NAME
    card: Any = ModelCard.load(path) if path.is_file() else ModelCard("---\nlibrary_name: transformers\n---\n")
    card.data.tags = sorted({*(card.data.tags or []), *_TAGS})
    if files.adapter_sha256 is None:
        card.data.base_model = hub_id(base_model) or card.data.base_model
    card.text = with_section(card.text, _section(files, threshold), MARKER)
    card.save(path)


def _section(files: DetectorFiles, threshold: str | None) -> str:
    thing, example = ("image", '"street.jpg"') if files.kind == "image" else ("text", '"my card was declined"')
    usage = (
        "from setar_peft import OODDetector\n\n"
        'detector = OODDetector.from_pretrained("path/or/hub-name/of/this/folder")\n'
        f"found = detector({example})\n"
        "print(found.label, found.score, found.is_id)"
    )
    about = (
        f"Says of {'an image' if thing == 'image' else 'a text'} which of {len(files.class_names)} classes it is, and "
        "whether it is any of them at all: in-distribution (ID) from a score of the threshold on, out-of-distribution "
        "(OOD) below it."
    )
    holds = (
        f"The threshold holds for {thing}s like those that it was found on, and for this very score, prompt, list of "
        "classes and model. For others, fit it again: `detector.fit(held_out_id_data, tpr=0.95)`."
    )
    title, install = "# Out-of-distribution detector", "```bash\npip install setar-peft\n```"
    return "\n\n".join([title, about, install, f"```python\n{usage}\n```", "\n".join(_facts(files, threshold)), holds])


def _facts(files: DetectorFiles, threshold: str | None) -> list[str]:
    shown = ", ".join(map(_plain, files.class_names[:_SHOWN_CLASSES]))
    left = len(files.class_names) - _SHOWN_CLASSES
    facts = [f"- Classes: {shown}" + (f" and {left} more" if left > 0 else "")]
    if isinstance(files.prompt, str):
        facts.append(f"- Prompt: {_plain(files.prompt)[:_LONGEST_PROMPT]}")
    elif files.prompt is not None:
        facts.append(f"- Prompts: one a class, such as {_plain(files.prompt[0])[:_LONGEST_PROMPT]}")
    if files.negative_labels:
        facts.append(f"- Negative labels: {len(files.negative_labels)}")
    settings = ", ".join(f"{name} {_number(value)}" for name, value in files.settings.items())
    return [
        *facts,
        f"- Score: {_plain(files.score)}" + (f" ({settings})" if settings else ""),
        f"- Threshold: {threshold or 'none; fit one before it decides'}",
        f"- Model: {files.model_class} in {files.dtype}, "
        + ("as it stands here" if files.adapter_sha256 is None else "with the adapter in this folder"),
        f"- Made with: {', '.join(f'{name} {version}' for name, version in files.versions.items())}",
    ]


def _plain(text: str) -> str:
    """A text as it is shown: in one line, and without marks that would end our section."""
    return " ".join(text.split()).replace("<", "&lt;")


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _plain(str(value))
