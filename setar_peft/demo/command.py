"""`setar demo`: which experiment the options mean."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from transformers.utils import logging

from setar_peft.demo.experiment import Settings, digits_experiment, folder_experiment
from setar_peft.demo.run import DemoResult, run
from setar_peft.demo.tiny_clip import STEPS, one_thread
from setar_peft.plots import check_matplotlib


def run_demo(
    settings: Settings,
    *,
    output: str | Path,
    cache: str | Path | None = None,
    model: str | None = None,
    images: str | Path | None = None,
    classes: str | Path | None = None,
    ood: Sequence[str | Path] = (),
    search_images_per_class: int | None = None,
    steps: int = STEPS,
) -> DemoResult:
    """Run the demo on its own digits, or on a model and images of the user's (see `folder_experiment`).

    Args:
        settings: Settings of the run.
        output: Folder for what comes out.
        cache: Folder to keep the demo's own model in.
        model: Folder or Hub name of a CLIP; needs `images`.
        images: Folder with one subfolder of images a class; needs `model`.
        classes: JSON file with the class names.
        ood: Folders of OOD images.
        search_images_per_class: Images of each class for the search.
        steps: Training steps of the demo's own model.

    Raises:
        ValueError: If the options do not fit each other, or as `folder_experiment`, `digits_experiment` and `run`.
    """
    check_matplotlib()
    logging.disable_progress_bar()
    if model is not None and images is not None:
        experiment = folder_experiment(
            model, images, settings, classes=classes, ood=ood, search_images_per_class=search_images_per_class
        )
    else:
        given = {
            "--model": model,
            "--images": images,
            "--classes": classes,
            "--ood": ood or None,
            "--search-images-per-class": search_images_per_class,
        }
        named = [option for option, value in given.items() if value is not None]
        if named:
            missing = [option for option in ("--model", "--images") if given[option] is None]
            raise ValueError(
                f"{', '.join(named)} given without {' and '.join(missing)}; give a model and a folder of images "
                "together, or neither for the digits."
            )
        experiment = digits_experiment(settings, cache, steps=steps)
    threads = one_thread() if model is None else nullcontext()
    with threads, warnings.catch_warnings():
        # PEFT 0.21 asks transformers for an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return run(experiment, output)
