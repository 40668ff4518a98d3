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


def _table(text: str) -> tuple[list[int], list[str]]:
    """The steps in the table of a search, and the lines after it."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.lstrip().startswith("step "))
    rows = [line for line in lines[start + 1 :] if line.split()[1] in ("vision", "text")]
    return [int(row.split()[0]) for row in rows], lines[start + 1 + len(rows) :]


SCREENED = ["--search", "screened", "--candidates", "0.1,0.2,0.4"]


@pytest.mark.parametrize(
    ("order", "evaluations"), [("vision_text", "14 evaluations and 1 gradient"), ("best_first", None)]
)
def test_a_screened_search_says_what_it_took(tmp_path: Path, order: str, evaluations: str | None) -> None:
    code, text = _setar("--output", tmp_path, *SCREENED, "--order", order)
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    steps, (last,) = _table(text)
    assert steps == [row.step for row in trace.rows]
    evaluations = evaluations or f"{len(trace.candidates)} evaluations and 1 gradient"
    losses = f"total {trace.initial.total:.6f} -> {trace.rows[-1].total_loss:.6f} by {evaluations}."
    assert last.startswith(losses)
    assert "predicted_change  exact_change" in text
    assert (tmp_path / "trace.png").stat().st_size > 0
    # What the dry run says is an upper bound.
    counted = next(line for line in text.splitlines() if "candidates" in line)
    assert len(trace.candidates) <= int(counted.split()[-1])
    assert "gradients  1, with vision 4, text 3 block passes back" in text


def test_options_of_a_screened_search_are_the_configs(tmp_path: Path) -> None:
    code, text = _setar("--output", tmp_path, *SCREENED, "--order", "vision", "--verify", "1")
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    assert (trace.settings["search"], trace.settings["verify"], trace.settings["evaluations"]) == ("screened", 1, None)
    assert len(trace.candidates) == len(trace.rows) == 4
    more = ["--order", "best_first", "--evaluations", "2", "--overwrite"]
    code, text = _setar("--output", tmp_path, *SCREENED, *more)
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    assert (trace.settings["order"], trace.settings["evaluations"]) == ("best_first", 2)
    assert len(trace.candidates) == 2
    assert "by 2 evaluations and 1 gradient." in text


def test_of_rounds_the_rows_are_shown_that_changed_something(tmp_path: Path) -> None:
    code, text = _setar("--output", tmp_path, *SCREENED, "--order", "joint", "--weights", "W_up,W_down,W_o")
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    ratios: dict[str, float] = {}
    changed = []
    for row in trace.rows:
        if row.best_ratio != ratios.get(row.module, 0.0):
            changed.append(row.step)
        ratios[row.module] = row.best_ratio
    rounds = len(trace.rows) // len(ratios)
    assert rounds >= 2
    assert 0 < len(changed) < len(trace.rows)
    steps, after = _table(text)
    assert steps == changed
    assert after[0] == (
        f"{len(changed)} of {len(trace.rows)} rows in {rounds} rounds changed a ratio and are shown; trace.csv has all."
    )
    assert len((tmp_path / "trace.csv").read_text().splitlines()) == 1 + len(trace.rows)
    trials = {candidate.trial for candidate in trace.candidates}
    assert f"by {len(trials)} evaluations and {rounds} gradients." in after[1]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_ratios"] == ratios


def test_all_stands_for_the_weights_of_the_blocks(tmp_path: Path) -> None:
    options = ["--output", tmp_path, "--search", "screened", "--order", "joint", "--candidates", "0.4"]
    code, text = _setar(*options, "--evaluations", "1", "--weights", "all, W_p")
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    assert {row.weight_type for row in trace.rows} == {"W_q", "W_k", "W_v", "W_o", "W_up", "W_down", "W_p"}
    assert len({row.module for row in trace.rows}) == 6 * (4 + 3) + 2
    # The prediction is far off for all layers of this model at once, so that nothing is taken.
    assert "None of 44 rows in 1 round changed a ratio; trace.csv has all." in text
    assert "total 1.251323 -> 1.251323 by 1 evaluation and 1 gradient." in text
    code, text = _setar(*options, "--weights", "all", "--dry-run")
    assert code == 0, text
    assert "layers  42" in text


def test_a_long_table_of_any_search_shows_what_changed(tmp_path: Path) -> None:
    options = ["--weights", "all", "--candidates", "0.3", "--order", "vision_text"]
    code, text = _setar("--output", tmp_path, *options)
    assert code == 0, text
    trace = SearchTrace.load(tmp_path / "trace.json")
    changed = [row.step for row in trace.rows if row.best_ratio > 0]
    assert len(trace.rows) == 42
    assert _table(text)[0] == changed
    assert f"{len(changed)} of 42 rows changed a ratio and are shown; trace.csv has all." in text
    assert " by " not in text.splitlines()[-1]


def test_a_dry_run_of_rounds_says_that_they_are_not_known(tmp_path: Path) -> None:
    joint = ["--output", tmp_path, *SCREENED, "--order", "joint", "--dry-run"]
    code, text = _setar(*joint)
    assert code == 0, text
    for piece in ("candidates  3", "gradients  3", "for 3 rounds of one evaluation each", "--evaluations bounds it"):
        assert piece in text
    code, text = _setar(*joint, "--evaluations", "2")
    assert code == 0, text
    assert "rounds" not in text
    for piece in ("candidates  2", "gradients  2, with vision 8, text 6 block passes back"):
        assert piece in text


def test_an_interrupted_search_of_all_layers_at_once_counts_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, save = [*SCREENED, "--order", "joint", "--output"], SearchTrace.save
    code, text = _setar(*options, tmp_path / "whole")
    assert code == 0, text
    whole = SearchTrace.load(tmp_path / "whole" / "trace.json")
    assert len(whole.rows) == 7 * 3
    again = [*options, tmp_path / "again"]
    for rounds, said in (
        (0, "Stopped before anything was decided"),
        (1, "Stopped after 1 round; what was decided is in"),
        (2, "Stopped after 2 rounds; what was decided is in"),
    ):

        def interrupted(trace: SearchTrace, path: Path, rows: int = 7 * rounds) -> None:
            save(trace, path)
            if len(trace.rows) == rows:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(SearchTrace, "save", interrupted)
            code, text = _setar(*again, *(["--resume"] if rounds else []))
        assert code == 130
        assert said in text
        assert "same command with --resume" in text
    code, text = _setar(*again, "--resume")
    assert code == 0, text
    assert SearchTrace.load(tmp_path / "again" / "trace.json") == whole


def test_a_metric_has_no_gradient_to_screen_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before an image is read."""

    def read(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(Image, "open", read)
    code, text = _setar("--output", tmp_path / "out", "--search", "screened", "--criterion", "auroc")
    assert code == 1
    for piece in ("search is 'screened'", "PatchMetricObjective", "--search greedy", "--criterion total, id or ood"):
        assert piece in text
    assert not (tmp_path / "out").exists()


def test_settings_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    options = ["--images", CASES / "images", "--output", tmp_path / "out", "--order", "joint"]
    result = CliRunner().invoke(app, ["search", "no-such-model", *map(str, options)])
    assert result.exit_code == 1
    assert "order is 'joint', which goes by predictions" in result.output


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
        (["--weights", "all,W_q"], "--weights names W_q twice (all stands for W_q, W_k, W_v, W_o, W_up, W_down)"),
        (["--weights", "all,all"], "names W_down, W_k, W_o, W_q, W_up, W_v twice (all stands for"),
        (["--weights", "all,W_p,W_p"], "--weights names W_p twice; name each weight type once"),
        (["--weights", "all,W_x"], "no weights 'W_x'; it has W_q, W_k, W_v, W_o, W_up, W_down, W_p"),
        (["--search", "fast"], "search is 'fast'; give one of 'greedy', 'screened'"),
        (["--verify", "2"], "verify is 2, which search='greedy' with order='vision_text' does not ask for"),
        (["--verify", "2"], "verify is for search='screened' (--search screened)"),
        (["--search", "screened", "--verify", "0"], "verify is 0; give the number of candidates a layer"),
        (["--search", "screened", "--order", "joint", "--verify", "2"], "verify is 2, which search='screened' with"),
        (["--search", "screened", "--evaluations", "9"], "evaluations for the orders 'best_first' and 'joint'"),
        (["--search", "screened", "--order", "joint", "--evaluations", "0"], "evaluations is 0; give the number of"),
        (["--order", "best_first"], "order is 'best_first', which goes by predictions, and search is 'greedy'"),
        (["--order", "best_first"], "add search='screened' (--search screened), or take another order"),
        (["--search", "screened", "--order", "joint", "--passes", "2"], "passes is 2, and order 'joint' goes on"),
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
