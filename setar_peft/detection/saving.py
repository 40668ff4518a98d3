"""A detector in a folder or on the Hub: its model or adapter, processor, text bank and threshold, saved and loaded."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import HfApi, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from numpy.typing import NDArray

from setar_peft.backbones import ClassWeights, base_of
from setar_peft.backbones.loading import torch_device
from setar_peft.data.inputs import checked_batch_size
from setar_peft.data.labels import ClassNames
from setar_peft.data.rows import Kind
from setar_peft.detection.detector_model import (
    ModelFacts,
    check_nothing_is_lost,
    load_detector_model,
    save_detector_model,
)
from setar_peft.detection.model_state import ModelState
from setar_peft.detection.scores import chosen_score, find_score
from setar_peft.detection.scoring import Score
from setar_peft.detection.threshold import Threshold
from setar_peft.hub.card import CARD_NAME
from setar_peft.hub.detector_card import write_detector_card
from setar_peft.hub.detector_files import DETECTOR_NAME, DetectorFiles, SavedThreshold, detector_folder
from setar_peft.hub.processors import check_preprocessing, load_saved_processor, preprocessing_of
from setar_peft.objectives.class_prompts import PROMPT, ClassPrompts
from setar_peft.versions import versions
from setar_peft.writing import whole_files

if TYPE_CHECKING:
    from typing import Self

# What of an older detector is no longer true where a new one has no file of that name.
_OUTDATED = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors"),
    *("model.safetensors.index.json", "processor_config.json", "preprocessor_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model"),
)


class HubDetector(ModelHubMixin):
    """What `OODDetector` is saved and loaded by; see there for the attributes."""

    model: Any
    processor: Any
    kind: Kind
    class_names: list[str]
    prompt: str | Sequence[str] | None
    batch_size: int
    score_name: str
    settings: dict[str, Any]
    threshold: Threshold | None
    id_scores: NDArray[np.float32]
    folder: Path | None
    _prompts: ClassPrompts
    _score: Score
    _unfitted_score: Score
    _bank: ClassWeights
    _model_state: ModelState
    # Why the threshold that was saved does not hold, in brackets.
    _lost_threshold: str

    @property
    def config(self) -> Any:
        """The model's configuration, for which transformers asks what is given to its `pipeline`."""
        return self.model.config

    @abstractmethod
    def _start(
        self,
        model: Any,
        processor: Any,
        score: Any,
        temperature: float | None,
        batch_size: int,
        bank: ClassWeights | None,
    ) -> None:
        """Set up all but the classes, which are there."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102 - nobody calls it
        del args, kwargs
        detector = super().__new__(cls)
        # Else the mixin writes the arguments as a config.json, which transformers takes for a model's.
        detector._hub_mixin_config = None
        return detector

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Save the detector into a folder: all files, or none.

        That is the model's active adapter, or the model itself where it has none; the processor; `detector.json` and
        `detector.safetensors` with classes, text bank, score, settings and threshold; and a card. An older detector
        there is replaced; what was written into its card besides our sections is kept.

        Args:
            save_directory: The folder.
            repo_id: For `push_to_hub`; by default the folder's name.
            push_to_hub: Whether to push the detector afterwards.
            push_to_hub_kwargs: For `push_to_hub`.

        Returns:
            The address of the commit on the Hub, where it was pushed.

        Raises:
            ValueError: If the model has merged or several active adapters, or was changed since the detector was made;
                if processor or score cannot be saved; or if the folder holds a model of its own.
        """
        folder = Path(save_directory)
        if not push_to_hub and (repo_id is not None or push_to_hub_kwargs):
            given = ", ".join(["repo_id"] * (repo_id is not None) + sorted(push_to_hub_kwargs))
            raise ValueError(f"{given}: only for push_to_hub=True; leave it out, or push.")
        outdated = _OUTDATED if (folder / DETECTOR_NAME).is_file() else ()
        with whole_files(folder, outdated) as unfinished:
            if (folder / CARD_NAME).is_file():
                shutil.copy(folder / CARD_NAME, unfinished)
            super().save_pretrained(unfinished)
            check_nothing_is_lost(folder, unfinished)
        self.folder = folder.absolute()
        return self.push_to_hub(repo_id or folder.name, **push_to_hub_kwargs) if push_to_hub else None

    def push_to_hub(  # type: ignore[override] # what the mixin takes besides would leave files of the folder out
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload detector",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Save the detector into a repository on the Hub, in one commit; the card there is brought up to date.

        Args:
            repo_id: Name of the repository, which is made where there is none.
            commit_message: Message of the commit.
            private: Whether a new repository is private.
            token: By default that of `hf auth login`.
            branch: Branch to push to, which is made where there is none; by default "main".
            create_pr: Whether to open a pull request instead.

        Returns:
            The address of the commit.

        Raises:
            ValueError: As `save_pretrained`.
        """
        api = HfApi(token=token)
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        with tempfile.TemporaryDirectory() as work:
            folder, before = Path(work, "detector"), self.folder
            folder.mkdir()
            with contextlib.suppress(RepositoryNotFoundError, EntryNotFoundError, RevisionNotFoundError):
                shutil.copy(hf_hub_download(repo_id, CARD_NAME, revision=branch, token=token), folder)
            # What cannot be saved is said before a repository is made.
            self.save_pretrained(folder)
            self.folder = before
            api.create_repo(repo_id, private=private, exist_ok=True)
            if branch is not None and not create_pr:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                delete_patterns=list(_OUTDATED),
            )

    @classmethod
    def from_pretrained(  # type: ignore[override] # the mixin's takes whatever `__init__` does
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        model: Any = None,
        processor: Any = None,
        device: Any = None,
        score: Any = None,
        temperature: float | None = None,
        class_names: Any = None,
        prompt: Any = None,
        batch_size: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Load a detector from a folder or the Hub: no prompt is encoded, and no processor guessed.

        On the same device it gives the same scores, to the bit. A threshold holds for what it was found with: another
        model, adapter, processor, class list or prompt is refused, and with another score or temperature the detector
        gives `scores` and has to be fitted before it decides.

        Args:
            pretrained_model_name_or_path: Folder, or name on the Hub.
            model: The base model, or the base with the detector's adapter; by default the base that the adapter names,
                or the model in the folder.
            processor: By default the one in the folder.
            device: Where to put the model; by default where it is.
            score: As for `OODDetector`, to have another; and for a score that is none of this package's, what it was
                made with.
            temperature: To have another.
            class_names: Refused unless they are the detector's own.
            prompt: Refused unless it is the detector's own.
            batch_size: Inputs a batch; by default as it was, for the last digits of a score depend on it.
            revision: Branch, tag or commit on the Hub.
            token: For the Hub; by default that of `hf auth login`.
            cache_dir: Where what comes from the Hub is kept.
            force_download: Whether to download what is there already.
            local_files_only: Whether to do without the Hub.

        Raises:
            ValueError: If a file is missing or damaged, or something is not what the detector was saved with.
        """
        folder = detector_folder(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        files = DetectorFiles.read(folder)
        threshold = _threshold_of(files, folder)
        keys = None if files.class_keys is None else tuple(files.class_keys)
        classes = ClassNames(tuple(files.class_names), keys)
        if class_names is not None:
            _check_same("class_names", list(ClassNames.of(class_names).names), list(files.class_names), folder)
        if prompt is not None:
            _check_same("prompt", prompt if isinstance(prompt, str) else list(prompt), files.prompt, folder)
        # All that can be refused is, before an adapter is put into a model that was given.
        unfitted, fitted, settings = _scoring(files, folder, score, temperature)
        where = None if device is None else torch_device(str(device))
        checked_batch_size(files.batch_size if batch_size is None else batch_size)
        if processor is None:
            processor = load_saved_processor(folder, files.preprocessing)
        check_preprocessing(files.preprocessing, processor, files.kind)
        detector = cls.__new__(cls)
        detector._prompts = ClassPrompts(
            processor,
            classes,
            PROMPT if files.prompt is None else files.prompt,
            negative_labels=list(files.negative_labels) or None,
        )
        model = load_detector_model(files, folder, model, where)
        where = next(model.parameters()).device
        bank = files.class_weights.to(where)
        if fitted is not None:
            tensors = {name: tensor.to(where) for name, tensor in files.state_tensors.items()}
            fitted = unfitted.with_state(files.state, tensors)
        chosen = {unfitted if fitted is None else fitted: settings}
        detector._start(model, processor, chosen, None, files.batch_size if batch_size is None else batch_size, bank)
        detector._unfitted_score = unfitted
        detector.folder = folder.absolute()
        if fitted is not None:
            detector.threshold = threshold
            if files.id_scores is not None:
                detector.id_scores = files.id_scores.numpy()
        elif threshold is not None:
            found_with = ", ".join([files.score, *(f"{key} {value}" for key, value in files.settings.items())])
            detector._lost_threshold = f" (the one in its folder was found with another score: {found_with})"
        return detector

    def _save_pretrained(self, save_directory: Path) -> None:
        self._model_state.check(self.model, thorough=True)
        facts = ModelFacts.of(self.model)
        preprocessing = preprocessing_of(self.processor, self.kind)
        save_detector_model(self.model, save_directory)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)
        state, tensors = self._score.state()
        found = self.threshold
        files = DetectorFiles(
            kind=self.kind,
            class_names=self.class_names,
            class_keys=self._prompts.classes.keys,
            prompt=self.prompt,
            negative_labels=self._prompts.negative_labels,
            score=self.score_name,
            settings=self.settings,
            unfitted=self._unfitted_score.state()[0],
            state=state,
            preprocessing=preprocessing,
            batch_size=self.batch_size,
            versions=versions(),
            class_weights=self._bank,
            threshold=None if found is None else SavedThreshold(**vars(found)),
            id_scores=torch.from_numpy(self.id_scores) if len(self.id_scores) else None,
            state_tensors=tensors,
            **facts._asdict(),
        )
        files.write(save_directory)
        threshold = None if found is None else str(found)
        write_detector_card(save_directory, files, threshold, base_of(self.model).name_or_path)


def _scoring(
    files: DetectorFiles, folder: Path, score: Any, temperature: float | None
) -> tuple[Score, Score | None, dict[str, Any]]:
    """The score of a detector that is loaded, as it was made and as it was saved, and its settings in full.

    Where another score, or other settings, are asked for, there is none that was saved.
    """
    try:
        own = find_score(files.score)
    except ValueError as error:
        own = None
        if score is None:
            raise ValueError(
                f"The detector in {folder} has the score {files.score!r}, which is none of this package's; give what "
                "it was made with, score=..., or register it first (register_score)."
            ) from error
    found, given = chosen_score(own if score is None else score, temperature)
    # One that only the user has is taken for what it is called; another may have been made otherwise.
    is_own = found.name == files.score and (
        own is None or found.state()[0] in (own.state()[0], dict(files.unfitted), dict(files.state))
    )
    settings = found.settings(float(files.class_weights.scale), {**files.settings, **given} if is_own else given)
    if not is_own or settings != files.settings:
        return found, None, settings
    return found.with_state(files.unfitted, {}), found.with_state(files.state, files.state_tensors), settings


def _threshold_of(files: DetectorFiles, folder: Path) -> Threshold | None:
    """The saved threshold.

    Raises:
        ValueError: If it is not the one that its own scores give.
    """
    if files.threshold is None:
        return None
    threshold = Threshold(**vars(files.threshold))
    if threshold.tpr is not None:
        assert files.id_scores is not None
        with warnings.catch_warnings():
            # That the scores are few was said when they were made, and stands in the interval.
            warnings.simplefilter("ignore")
            right = Threshold.of(files.id_scores.numpy(), threshold.tpr)
        if threshold.value != right.value or not _near(threshold.interval, right.interval):
            raise ValueError(
                f"{folder / DETECTOR_NAME} has the threshold {threshold}, and the scores that it was found on give "
                f"{right}. Copy or download the detector again, or save it again."
            )
    return threshold


def _near(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    """Whether two intervals are one: the last digits are scipy's."""
    return one is not None and other is not None and all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))


def _check_same(name: str, given: Any, own: Any, folder: Path) -> None:
    if given != own:
        raise ValueError(
            f"{name} is {given!r:.200}, and the detector in {folder} was made with {own!r:.200}, for which alone its "
            f"text bank and threshold hold. Leave {name} out, or make a new detector and fit it: "
            "OODDetector(model, processor, class_names, prompt=...)."
        )
