"""`setar search` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

from setar_peft import LoCoOpObjective, plots
from setar_peft.backbones import Tower
from setar_peft.cli import app
from setar_peft.search.trace import SearchTrace
from tests.conftest import GOLDEN
from tests.search.processes import in_two_processes

CASES = GOLDEN / "cases"
COMMON = [
    "search",
    str(CASES / "clip_tiny"),
    "--images",
    str(CASES / "images"),
    "--classes",
    str(CASES / "folders.json"),
]


def _setar(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*COMMON, *map(str, arguments)])
    return result.exit_code, result.output


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(tmp_path: Path) -> None:
    code, text = _setar("--output", tmp_path / "out", "--dry-run")
    assert code == 0
    for piece in (
        "images  24",
        "candidates  56",
        "vision 88, text 51",
        "FLOP",
        "kept",
        "disk",
        "above the model's",
        "time",
    ):
        assert piece in text
    assert list(tmp_path.iterdir()) == []


def test_search_writes_adapter_and_trace_and_resumes(tmp_path: Path) -> None:
    options = ["--output", tmp_path, "--weights", "W_up,W_p", "--candidates", "0.2,0.4", "--order", "vision"]
    code, text = _setar(*options)
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    assert [row.weight_type for row in trace.rows] == ["W_p", "W_up", "W_up", "W_up", "W_up"]
    assert {candidate.rank_ratio for candidate in trace.candidates} == {0.2, 0.4}
    assert (tmp_path / "trace.csv").read_text().splitlines()[0].startswith("step,tower_type")
    assert (tmp_path / "trace.png").stat().st_size > 0
    ratios = json.loads((tmp_path / "adapter_config.json").read_text())["rank_ratios"]
    assert ratios == {row.module: row.best_ratio for row in trace.rows}
    code, text = _setar(*options, "--resume")
    assert code == 0, text
    assert SearchTrace.load(tmp_path / "trace.json") == trace


QUICK = ["--order", "text", "--candidates", "0.2", "--weights", "W_up, W_q"]


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_finished_work_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    options = ["--output", tmp_path, *QUICK]
    code, text = _setar(*options)
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    assert [row.weight_type for row in trace.rows] == ["W_up", "W_q"] * 3
    before = _contents(tmp_path)
    code, text = _setar(*options, "--prune", "principal")
    assert code == 1
    for piece in ("trace.json is there already", "--resume", "--overwrite", "--output"):
        assert piece in text
    assert _contents(tmp_path) == before
    (tmp_path / "trace.json").unlink()
    for resume in ([], ["--resume"]):
        code, text = _setar(*options, *resume)
        assert (code, "holds an adapter, and no trace to continue" in text) == (1, True)
    code, text = _setar(*options, "--prune", "principal", "--overwrite")
    assert code == 0, text
    assert SearchTrace.load(tmp_path / "trace.json").settings["prune"] == "principal"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["prune"] == "principal"


def test_an_interrupted_search_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, save = ["--output", tmp_path, *QUICK], SearchTrace.save

    def interrupted(trace: SearchTrace, path: Path) -> None:
        save(trace, path)
        if len(trace.rows) == 2:
            raise KeyboardInterrupt

    def at_once(trace: SearchTrace, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchTrace, "save", interrupted)
        code, text = _setar(*options)
    assert code == 130
    for piece in ("Stopped after 2 layers", "trace.json", "same command with --resume"):
        assert piece in text
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    assert "adapter" not in text
    code, text = _setar(*options, "--resume")
    assert code == 0, text
    assert len(SearchTrace.load(tmp_path / "trace.json").rows) == 6
    # What an earlier search left is not taken for this one's.
    for save_or_not, said in (
        (at_once, "before the first layer; nothing was"),
        (interrupted, "is an earlier search's"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(SearchTrace, "save", save_or_not)
            code, text = _setar(*options, "--overwrite")
        assert code == 130
        assert said in text


def test_a_batch_that_does_not_fit_does_not_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(tower: Tower, inputs: Any) -> Any:
        if tower.name == "vision" and len(inputs["pixel_values"]) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tower, inputs)

    real = Tower.enter
    monkeypatch.setattr(Tower, "enter", enter)
    with pytest.warns(RuntimeWarning, match="Out of memory with 24 images or prompts a batch; .* with 12"):
        code, text = _setar("--output", tmp_path, *QUICK)
    assert code == 0, text
    assert "cannot be said: a batch of this size does not fit in memory" in text
    assert (tmp_path / "adapter_config.json").exists()


def test_what_was_found_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is saved whole or not at all, and before anything is drawn or said."""
    options = ["--output", tmp_path, *QUICK]

    def half(_: object, folder: str) -> None:
        Path(folder, "adapter_model.safetensors").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", half)
        code, text = _setar(*options)
    assert code == 1
    assert "No space left on device" in text
    assert "same command with --resume" in text
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]

    def no_figure(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "search_figure", no_figure)
        code, text = _setar(*options, "--resume")
    assert code == 1
    assert sorted(_contents(tmp_path)) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "trace.csv", "trace.json"),
    ]
    code, text = _setar(*options, "--resume")
    assert code == 0, text


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose classes are not in alphabetical order, and its folders of grey images, 16 bits deep."""
    root = tmp_path_factory.mktemp("classifier")
    names = ["T-shirt/top", "Trouser", "Ankle boot", "Bag"]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    ViTForImageClassification(config).save_pretrained(root / "model")
    size = {"height": 8, "width": 8}
    ViTImageProcessorPil(image_mean=[0.5], image_std=[0.5], size=size).save_pretrained(root / "model")
    noise = np.random.default_rng(0).integers(0, 65536, (8, 8, 8), dtype=np.uint16)
    for index, pixels in enumerate(noise):
        folder = root / "images" / names[index // 2].replace("/", " ").lower()
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (root / "classes.json").write_text(json.dumps({"t-shirt top": "T-shirt/top"}))
    np.save(root / "noise.npy", noise)
    return root


def test_folders_are_a_classifiers_classes_by_name(classifier: Path, tmp_path: Path) -> None:
    command = ["search", classifier / "model", "--images", classifier / "images", "--candidates", "0.3"]
    options = ["--output", tmp_path / "out", "--top-k", "2", "--classes", classifier / "classes.json"]
    result = CliRunner().invoke(app, list(map(str, [*command, *options])))
    assert result.exit_code == 0, result.output
    said = "Matched by name: ankle boot -> Ankle boot, bag -> Bag, t-shirt top -> T-shirt/top, trouser -> Trouser."
    assert said in result.stdout
    model = ViTForImageClassification.from_pretrained(classifier / "model").eval()
    eight_bits = (np.load(classifier / "noise.npy").astype(int) + 128) // 257
    pixels = torch.as_tensor(eight_bits / 127.5 - 1, dtype=torch.float32)[:, None]
    expected = LoCoOpObjective(None, model.config.id2label, pixels, torch.arange(8) // 2, top_k=2).losses(model)
    assert SearchTrace.load(tmp_path / "out" / "trace.json").initial == pytest.approx(expected, abs=1e-5)
    # ... and not what the folders' alphabetical order would give.
    alphabetical = torch.tensor([2, 2, 3, 3, 0, 0, 1, 1])
    other = LoCoOpObjective(None, model.config.id2label, pixels, alphabetical, top_k=2).losses(model)
    assert other.id_loss != pytest.approx(expected.id_loss, abs=1e-4)
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 1
    assert "'t-shirt top' fits none" in result.output


def test_a_metric_of_ood_patches_and_an_explicit_order(tmp_path: Path) -> None:
    layers = ["text_model.encoder.layers.1.mlp.fc1", "vision_model.encoder.layers.0.mlp.fc1"]
    options = ["--output", tmp_path, "--criterion", "auroc", "--order", ", ".join(layers), "--recording-memory", "0"]
    code, text = _setar(*options)
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    assert [row.module for row in trace.rows] == layers
    assert trace.settings["objective"]["metric"] == "auroc"
    assert 0 <= trace.rows[-1].total_loss <= trace.initial.total <= 1
    code, text = _setar(*options[:2], *options[4:], "--criterion", "fpr95", "--resume")
    assert code == 1
    assert "objective.metric was 'auroc' and is 'fpr95'" in text


def test_of_two_processes_the_first_speaks_and_writes(tmp_path: Path) -> None:
    """The result is that of one process, and no file is written twice."""
    folders = [tmp_path / "first", tmp_path / "second"]
    options = ["--candidates", "0.2,0.4", "--output"]
    said = in_two_processes(lambda rank: ["-m", "setar_peft", *COMMON, *options, str(folders[rank])])
    alone = tmp_path / "alone"
    code, text = _setar("--output", alone, "--candidates", "0.2,0.4")
    assert code == 0, text
    assert not folders[1].exists()
    assert sorted(file.name for file in folders[0].iterdir()) == sorted(file.name for file in alone.iterdir())
    ratios = [json.loads((folder / "adapter_config.json").read_text())["rank_ratios"] for folder in (folders[0], alone)]
    assert ratios[0] == ratios[1]
    assert "block passes" in said[0].output
    assert said[1].output == ""


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        (["--weights", "W_x"], "no weights 'W_x'"),
        (["--candidates", "a lot"], "no list of numbers"),
        (["--candidates", "1.2"], "candidate_ratios is 1.2"),
        (["--top-k", "7"], "top_k is 7 with 6 classes"),
        (["--order", "sideways"], "order is 'sideways'"),
        (["--weights", "W_up, W_q,W_up"], "--weights names W_up twice"),
        (["--weights", "W_up,"], "--weights names nothing between two commas"),
        (["--candidates", "0.1,0.1"], "give each ratio once"),
        (["--dtype", "int8"], "The precision is 'int8'; give one of float32, tf32, bfloat16, float16."),
        (["--dtype", "tf32", "--device", "cpu"], "--dtype tf32 is how CUDA GPUs multiply, and the device is cpu"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--criterion", "beauty"], "--criterion is 'beauty'; give one of total, id, ood, auroc, fpr95."),
        (["--order", "vision_model.encoder.layers.9.mlp.fc1"], "order names layers that are not searched"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--recording-memory", "-1"], "recording_memory is -1"),
    ],
)
def test_wrong_options_get_a_sentence(tmp_path: Path, options: list[str], piece: str) -> None:
    code, text = _setar("--output", tmp_path / "out", *options)
    assert code == 1
    assert piece in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
