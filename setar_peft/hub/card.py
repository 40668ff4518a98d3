"""The model card of a saved adapter: what it is, how to load it, which ratios it has, and what the Hub filters by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from setar_peft.tuner.config import CardFacts, SeTARConfig

CARD_NAME = "README.md"
TAGS = ("setar", "out-of-distribution-detection", "ood-detection")
CITATION = """@inproceedings{li2024setar,
  title     = {{SeTAR}: Out-of-Distribution Detection with Selective Low-Rank Approximation},
  author    = {Li, Yixia and Xiong, Boya and Chen, Guanhua and Chen, Yun},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {37},
  year      = {2024}
}"""

_PIPELINE_TAGS = {"CLIPModel": "zero-shot-image-classification"}
_NOTE = "written on every save, until it is edited"
_PRUNE = {
    "minor": "the smallest singular values are removed (the paper's method)",
    "principal": "the largest singular values are removed",
    "random": "singular values drawn at random are removed",
}


def write_model_card(folder: str | Path, config: SeTARConfig, auto_mapping: Mapping[str, str] | None = None) -> None:
    """Write the card of the adapter in a folder, or bring the one that is there up to date.

    Text outside our section, an edited section and other metadata are kept (but PEFT rewrites `tags` on every save:
    further tags belong into `CardFacts`). A base that came from a local folder is not named: its path is of no use to
    others.

    Args:
        folder: The folder of the adapter's files; ranks are read from its weights file, if it is there.
        config: The adapter's config, with the resolved map of ratios; its `card` holds what is known besides.
        auto_mapping: PEFT's `base_model_class` and `parent_library` of the base model.
    """
    path = Path(folder) / CARD_NAME
    card: Any = ModelCard.load(path) if path.is_file() else ModelCard("---\nlibrary_name: peft\n---\n")
    base_model = hub_id(config.base_model_name_or_path)
    base_class = "AutoModel"
    if auto_mapping and auto_mapping["parent_library"].startswith("transformers."):
        base_class = auto_mapping["base_model_class"]
    _set_metadata(card.data, base_model, config.card, base_class)
    card.text = with_section(card.text, _section(Path(folder), config, base_model, base_class), "setar")
    card.save(path)


def hub_id(name_or_path: str | None) -> str | None:
    """The name if it is one of the Hub's; `None` for a local folder, which an existing path is taken for."""
    if not name_or_path or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def _set_metadata(data: ModelCardData, base_model: str | None, facts: CardFacts, base_class: str) -> None:
    data.library_name = "peft"
    data.base_model = base_model
    data["base_model_relation"] = "adapter" if base_model else None
    # PEFT has just written these tags; the one that names the base does so by path if it is local.
    kept = [tag for tag in data.tags or [] if not tag.startswith("base_model:")]
    named = [f"base_model:adapter:{base_model}"] if base_model else []
    data.tags = sorted({*kept, *TAGS, *facts.tags, *named})
    data.pipeline_tag = data.pipeline_tag or _PIPELINE_TAGS.get(base_class)
    data.license = facts.license or data.license


def with_section(text: str, section: str, marker: str) -> str:
    """A card's text with a section of ours, brought up to date where it stands, or put on top; an edited one is kept.

    Args:
        text: The card's text without its metadata.
        section: What the section is to say.
        marker: What the section is marked with in comments, one word.
    """
    digest = hashlib.sha256(section.encode()).hexdigest()[:12]
    marked = f"<!-- {marker} {digest}: {_NOTE} -->\n{section}\n<!-- /{marker} -->"
    pattern = rf"<!-- {marker} (?P<digest>[0-9a-f]{{12}}): .*? -->\n(?P<body>.*?)\n<!-- /{marker} -->"
    found = re.search(pattern, text, re.DOTALL)
    if found:
        edited = hashlib.sha256(found["body"].encode()).hexdigest()[:12] != found["digest"]
        return text if edited else text[: found.start()] + marked + text[found.end() :]
    rest = text.strip()
    # What PEFT and transformers write where there is no card yet: a form to fill in, with one sentence or none.
    generated = [line for line in text.splitlines() if line.endswith("has been automatically generated.")]
    for description in [None, *generated]:
        form = ModelCard.from_template(ModelCardData(), model_description=description)
        rest = rest.removeprefix(form.text.strip()).strip()
    return f"{marked}\n\n{rest}\n" if rest else f"{marked}\n"


def forget_local_base(path: Path) -> None:
    """Take the path of a local base model out of the metadata of a card that PEFT wrote."""
    if not path.is_file() or "\nlibrary_name: peft\n" not in path.read_text(encoding="utf-8", errors="replace"):
        return
    card: Any = ModelCard.load(path)
    name = card.data.base_model
    if isinstance(name, str) and hub_id(name) is None:
        card.data.base_model = None
        card.data.tags = [tag for tag in card.data.tags or [] if tag != f"base_model:adapter:{name}"]
        card.save(path)


def _section(folder: Path, config: SeTARConfig, base_model: str | None, base_class: str) -> str:
    facts = config.card
    kind = "SeTAR+FT (fine-tuned)" if config.finetune else "SeTAR (training-free)"
    loaded = f'"{base_model}"' if base_model else '"path/of/the/base/model"'
    about = (
        "SeTAR makes a model better at telling out-of-distribution (OOD) inputs from in-distribution ones by removing "
        "a share of the singular components of a few weight matrices. Which layers and how much of each is found by a "
        f"{config.search} search on a few in-distribution images; the base model itself is not changed."
    )
    usage = (
        "import setar_peft  # registers SeTAR with PEFT; needed once, before loading\n"
        "from peft import PeftModel\n"
        f"from transformers import {base_class}\n\n"
        f"base = {base_class}.from_pretrained({loaded})\n"
        'model = PeftModel.from_pretrained(base, "path/or/hub-name/of/this/adapter")'
    )
    parts = [
        f"# {kind} adapter",
        about,
        "## Use",
        "```bash\npip install setar-peft\n```",
        f"```python\n{usage}\n```",
        "## The adapter",
        "\n".join(_facts_of(config, facts, base_model)),
        *_ratio_table(config, _ranks(folder)),
    ]
    if facts.objective:
        parts += ["## Objective of the search", _bullets(facts.objective)]
    if facts.metrics:
        parts += ["## Results", _metric_table(facts.metrics)]
    return "\n\n".join([*parts, "## Citation", f"```bibtex\n{CITATION}\n```"])


def _facts_of(config: SeTARConfig, facts: CardFacts, base_model: str | None) -> list[str]:
    link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model in a local folder"
    return [
        f"- Base model: {link}",
        f"- Pruning: {config.prune}; {_PRUNE[config.prune]}",
        f"- Trained: {'factors B, A of the removed components' if config.finetune else 'nothing'}",
        *([f"- Trained in full: {', '.join(sorted(config.modules_to_save))}"] if config.modules_to_save else []),
        f"- License: {facts.license or 'not stated by the author'}",
    ]


def _ratio_table(config: SeTARConfig, ranks: Mapping[str, tuple[int, int]]) -> list[str]:
    if not isinstance(config.rank_ratios, dict):
        return []
    truncated = {name: ratio for name, ratio in config.rank_ratios.items() if ratio > 0}
    count = f"{len(truncated)} of {len(config.rank_ratios)} adapted layers are truncated."
    if not truncated:
        return [count]
    lines = ["| layer | ratio | components removed |", "| --- | ---: | ---: |"]
    for name, ratio in truncated.items():
        rank, full = ranks.get(name, (None, None))
        removed = "" if rank is None else f"{rank} of {full}"
        lines.append(f"| `{name}` | {ratio:g} | {removed} |")
    return [count, "\n".join(lines)]


def _ranks(folder: Path) -> dict[str, tuple[int, int]]:
    """Module name -> (components removed, components in all), from the header of the weights file."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError):
        return {}
    ranks = {}
    for key, shape in shapes.items():
        module = key.removesuffix(".setar_B0")
        if module != key and f"{module}.setar_A0" in shapes:
            full = min(shape[0], shapes[f"{module}.setar_A0"][1])
            ranks[module.removeprefix("base_model.model.")] = (shape[1], full)
    return ranks


def _bullets(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in values.items())


def _metric_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(name for values in metrics.values() for name in values))
    lines = [f"| data | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for data, values in metrics.items():
        cells = [f"{values[name]:.2f}" if name in values else "" for name in columns]
        lines.append(f"| {data} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_pushed_card(model: PeftModel, folder: str | Path) -> None:
    """Write the card of a model's adapter into the folder that is about to be pushed; other methods' is left alone."""
    config = model.peft_config.get("default")
    if isinstance(config, SeTARConfig):
        base = type(model.get_base_model())
        write_model_card(folder, config, {"base_model_class": base.__name__, "parent_library": base.__module__})
