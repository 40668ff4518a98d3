"""What users do with the Hub, run in a process of its own that talks to the server named by HF_ENDPOINT.

Usage: python -m tests.hub.client FOLDER, with the path of a base model. Prints one JSON object: step -> traceback or
null. Steps run in order, on one Hub, and a step may need an earlier one's repository.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

import setar_peft.tuner.layer
from setar_peft import OODDetector, SeTARConfig
from setar_peft.tuner.layer import SeTARLayer

X = {
    "pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32),
    "input_ids": torch.tensor([[0, 5, 1]]),
}
FIRST = {"vision_model.encoder.layers.0.mlp.fc1": 0.25, "text_model.encoder.layers.0.mlp.fc1": 0.5}
SECOND = {"vision_model.encoder.layers.1.mlp.fc1": 0.4}

PICTURES = [Image.linear_gradient("L").rotate(angle).convert("RGB") for angle in range(0, 360, 30)]

outputs: dict[str, Tensor] = {}
records: dict[str, Any] = {}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**X).logits_per_image


def base() -> CLIPModel:
    return CLIPModel.from_pretrained("user/base").eval()


def push_base() -> None:
    CLIPModel.from_pretrained(sys.argv[1]).push_to_hub("user/base")
    outputs["base"] = logits(base())


def push_adapter() -> None:
    model = get_peft_model(base(), SeTARConfig(rank_ratios=FIRST))
    outputs["first"] = logits(model)
    model.push_to_hub("user/adapter")
    files = {file.rfilename for file in HfApi().model_info("user/adapter").siblings}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}, files
    assert not torch.equal(outputs["first"], outputs["base"])


def load_adapter() -> None:
    def no_decomposition(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading ran a decomposition")

    real, setar_peft.tuner.layer.decompose = setar_peft.tuner.layer.decompose, no_decomposition
    try:
        model = PeftModel.from_pretrained(base(), "user/adapter")
    finally:
        setar_peft.tuner.layer.decompose = real
    assert torch.equal(logits(model), outputs["first"])
    with model.disable_adapter():
        assert torch.equal(logits(model), outputs["base"])


def load_config() -> None:
    config = PeftConfig.from_pretrained("user/adapter")
    assert isinstance(config, SeTARConfig)
    assert config.rank_ratios == FIRST
    assert config.base_model_name_or_path == "user/base"
    assert SeTARConfig.from_pretrained("user/adapter").rank_ratios == FIRST


def auto_class() -> None:
    model = AutoPeftModel.from_pretrained("user/adapter")
    assert isinstance(model.get_base_model(), CLIPModel)
    assert torch.equal(logits(model), outputs["first"])


def through_transformers() -> None:
    model = base()
    model.load_adapter("user/adapter")
    assert torch.equal(logits(model), outputs["first"])
    assert torch.equal(logits(CLIPModel.from_pretrained("user/adapter")), outputs["first"])


def revision() -> None:
    model = get_peft_model(base(), SeTARConfig(rank_ratios=SECOND, finetune=True, init_weights=False))
    outputs["second"] = logits(model)
    model.push_to_hub("user/adapter", revision="fine-tuned")
    loaded = PeftModel.from_pretrained(base(), "user/adapter", revision="fine-tuned")
    assert torch.equal(logits(loaded), outputs["second"])
    assert torch.equal(logits(PeftModel.from_pretrained(base(), "user/adapter")), outputs["first"])
    sha = HfApi().model_info("user/adapter", revision="fine-tuned").sha
    assert torch.equal(logits(PeftModel.from_pretrained(base(), "user/adapter", revision=sha)), outputs["second"])
    both = PeftModel.from_pretrained(base(), "user/adapter")
    both.load_adapter("user/adapter", "second", revision="fine-tuned")
    both.set_adapter("second")
    assert torch.equal(logits(both), outputs["second"])


def subfolder() -> None:
    model = get_peft_model(base(), SeTARConfig(rank_ratios=SECOND), adapter_name="small")
    expected = logits(model)
    model.push_to_hub("user/several")
    loaded = PeftModel.from_pretrained(base(), "user/several", subfolder="small")
    assert torch.equal(logits(loaded), expected)
    card = ModelCard.load(downloaded("user/several", "small/README.md"))
    assert card.data.base_model == "user/base"


def downloaded(repo: str, file: str) -> str:
    return hf_hub_download(repo, file, local_dir=mkdtemp())


def card() -> None:
    written = ModelCard.load("user/adapter")
    assert written.data.library_name == "peft"
    assert written.data.base_model == "user/base"
    assert "import setar_peft" in written.text
    assert "More Information Needed" not in written.text
    filters = ["setar", "ood-detection", "base_model:adapter:user/base", "peft"]
    found = {info.id for info in HfApi().list_models(filter=filters)}
    assert found == {"user/adapter"}


def readme_of_a_user_survives() -> None:
    text = Path(downloaded("user/adapter", "README.md")).read_text().replace("- setar\n", "- setar\n- my-tag\n")
    assert "my-tag" in text
    text += "\n## Notes\n\nOn the Hub.\n"
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="user/adapter")
    get_peft_model(base(), SeTARConfig(rank_ratios=SECOND)).push_to_hub("user/adapter")
    written = ModelCard.load("user/adapter")
    assert "## Notes\n\nOn the Hub." in written.text
    assert "| `vision_model.encoder.layers.1.mlp.fc1` | 0.4 | 26 of 64 |" in written.text
    assert "my-tag" in written.data.tags


def other_methods_cards_are_theirs() -> None:
    get_peft_model(base(), LoraConfig(target_modules=["fc1"])).push_to_hub("user/lora")
    assert "SeTAR" not in ModelCard.load("user/lora").content


def damaged() -> None:
    HfApi().create_repo("user/broken")
    config, weights = (
        downloaded("user/adapter", name) for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    data = Path(weights).read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 4
    HfApi().upload_file(path_or_fileobj=config, path_in_repo="adapter_config.json", repo_id="user/broken")
    model = base()
    for content, message in (
        (None, "has an adapter_config.json of a saved adapter, but no adapter_model.safetensors"),
        (data[:-8], "is not a whole file of tensors"),
        (bytes(flipped), "is not the file that was saved with its adapter_config.json"),
    ):
        if content is not None:
            HfApi().upload_file(
                path_or_fileobj=content, path_in_repo="adapter_model.safetensors", repo_id="user/broken"
            )
        refused(lambda: PeftModel.from_pretrained(model, "user/broken"), message)
        assert not any(isinstance(module, SeTARLayer) for module in model.modules())
        assert torch.equal(logits(model), outputs["base"])


def not_there() -> None:
    refused(lambda: PeftModel.from_pretrained(base(), "user/nothing"), "Can't find 'adapter_config.json'")
    refused(
        lambda: PeftModel.from_pretrained(base(), "user/adapter", revision="v9"), "Can't find 'adapter_config.json'"
    )


def offline() -> None:
    model = base()
    constants.HF_HUB_OFFLINE = True
    try:
        assert torch.equal(logits(PeftModel.from_pretrained(model, "user/adapter")), outputs["first"])
    finally:
        constants.HF_HUB_OFFLINE = False


def detector(model: Any, score: str = "gl_mcm") -> OODDetector:
    side = model.config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = CLIPProcessor(image_processor=images, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]))
    made = OODDetector(model, processor, ["cat", "dog", "cup"], score=score)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few inputs
        return made.fit(PICTURES)


def said(of: OODDetector) -> list[dict[str, Any]]:
    return of(PICTURES[:3]).to_dicts()


def push_detector() -> None:
    first = detector(get_peft_model(base(), SeTARConfig(rank_ratios=FIRST)))
    records["first"] = said(first)
    address = first.push_to_hub("user/detector")
    assert "/user/detector/commit/" in address
    assert first.folder is None
    files = {file.rfilename for file in HfApi().model_info("user/detector").siblings}
    assert files == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "detector.json", "detector.safetensors"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }, files


def load_detector() -> None:
    loaded = OODDetector.from_pretrained("user/detector")
    assert isinstance(loaded.model, PeftModel)
    assert said(loaded) == records["first"]
    assert said(OODDetector.from_pretrained("user/detector", model=base())) == records["first"]
    assert loaded.folder is not None
    assert (loaded.folder / "detector.json").is_file()
    # It is an adapter, too.
    PeftModel.from_pretrained(base(), "user/detector")


def detector_card() -> None:
    card = ModelCard.load("user/detector")
    assert card.data.base_model == "user/base"
    assert "# Out-of-distribution detector" in card.text
    assert "# SeTAR (training-free) adapter" in card.text
    found = {info.id for info in HfApi().list_models(filter=["ood-detection", "setar"])}
    assert "user/detector" in found


def push_detector_again() -> None:
    text = Path(downloaded("user/detector", "README.md")).read_text() + "\n## Notes\n\nOn the Hub.\n"
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="user/detector")
    stock = detector(base(), "mcm")
    stock.push_to_hub("user/detector", branch="stock")
    stock_files = {file.rfilename for file in HfApi().model_info("user/detector", revision="stock").siblings}
    assert "adapter_config.json" not in stock_files
    assert {"config.json", "model.safetensors"} <= stock_files
    assert said(OODDetector.from_pretrained("user/detector", revision="stock")) == said(stock)
    assert said(OODDetector.from_pretrained("user/detector")) == records["first"]
    with TemporaryDirectory() as folder:
        address = stock.save_pretrained(folder, push_to_hub=True, repo_id="user/detector")
        assert stock.folder == Path(folder)
    assert address is not None
    card = ModelCard.load("user/detector")
    assert "## Notes\n\nOn the Hub." in card.text
    assert "- Score: mcm" in card.text
    assert said(OODDetector.from_pretrained("user/detector")) == said(stock)


def detector_that_cannot_be_saved() -> None:
    model = get_peft_model(base(), SeTARConfig(rank_ratios=FIRST))
    model.merge_adapter()
    refused(lambda: detector(model).push_to_hub("user/merged"), "unmerge_adapter() first")
    assert "user/merged" not in {info.id for info in HfApi().list_models()}


def damaged_detector() -> None:
    first = detector(get_peft_model(base(), SeTARConfig(rank_ratios=FIRST)))
    first.push_to_hub("user/damaged")
    get_peft_model(base(), SeTARConfig(rank_ratios=SECOND)).save_pretrained(other_folder := mkdtemp())
    other = str(Path(other_folder, "adapter_model.safetensors"))
    HfApi().upload_file(path_or_fileobj=other, path_in_repo="adapter_model.safetensors", repo_id="user/damaged")
    refused(
        lambda: OODDetector.from_pretrained("user/damaged"),
        "adapter_model.safetensors is not the file that was saved with detector.json",
    )
    refused(
        lambda: OODDetector.from_pretrained("user/adapter"), "has no detector.json, so that it is no saved detector"
    )
    refused(lambda: OODDetector.from_pretrained("user/nothing"), "There is no detector 'user/nothing'")


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        action()


STEPS = (
    push_base,
    push_adapter,
    load_adapter,
    load_config,
    offline,
    auto_class,
    through_transformers,
    revision,
    subfolder,
    card,
    readme_of_a_user_survives,
    other_methods_cards_are_theirs,
    damaged,
    not_there,
    push_detector,
    load_detector,
    detector_card,
    push_detector_again,
    detector_that_cannot_be_saved,
    damaged_detector,
)


def failure(step: Callable[[], None]) -> str | None:
    try:
        step()
    except Exception:
        return traceback.format_exc()
    return None


def main() -> None:
    results = {step.__name__: failure(step) for step in STEPS}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
