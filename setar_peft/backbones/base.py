"""What a model family tells the rest of the package: its towers, its weights' names, and its features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from setar_peft.losses import ClassWeights


class ImageFeatures(NamedTuple):
    """Features of some images.

    Attributes:
        pooled: Of the whole images, (images, d).
        local: Of their patches, (images, patches, d).
    """

    pooled: Tensor
    local: Tensor


class Logits(NamedTuple):
    """Logits of some images, float32.

    Attributes:
        pooled: Of the whole images, (images, classes).
        local: Of their patches, (images, patches, classes).
    """

    pooled: Tensor
    local: Tensor


@dataclass
class TowerInput:
    """What enters a tower's first block.

    Attributes:
        hidden: Hidden states, (batch, tokens, width).
        args: Further positional arguments of every block.
        kwargs: Keyword arguments of every block.
        context: What `Tower.finish` needs to know of the inputs.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Any = None


class Tower(ABC):
    """A stack of blocks whose output is one side of the logits.

    Attributes:
        name: "vision" or "text".
        blocks: The blocks, from the bottom up.
        block_names: Their full module names.
        head: The modules after the last block, by full name.
    """

    name: str
    blocks: Sequence[nn.Module]
    block_names: Sequence[str]
    head: Mapping[str, nn.Module]

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model's own forward over the tower."""

    @abstractmethod
    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        """From the input of the last block to the tower's features.

        Args:
            entry: What the tower was entered with.
            hidden: Input of the last block, (batch, tokens, width).
        """

    def context(self, inputs: Mapping[str, Tensor]) -> Any:
        """What `finish` needs to know of the inputs; nothing by default."""
        del inputs

    def enter(self, inputs: Mapping[str, Tensor]) -> TowerInput:
        """Run the model's own forward up to its first block and return what the block is called with."""
        entered: list[TowerInput] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            entered.append(TowerInput(hidden, args[1:], kwargs, self.context(inputs)))
            raise _FirstBlockReached

        handle = self.blocks[0].register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            self.run(inputs)
        except _FirstBlockReached:
            pass
        finally:
            handle.remove()
        return entered[0]

    def step(self, entry: TowerInput, level: int, hidden: Tensor) -> Tensor:
        """Run one block: from the input of block `level` to the input of the next."""
        output = self.blocks[level](hidden, *entry.args, **entry.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def features(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Features of some inputs, through every block."""
        entry = self.enter(inputs)
        hidden = entry.hidden
        for level in range(len(self.blocks) - 1):
            hidden = self.step(entry, level, hidden)
        return self.finish(entry, hidden)

    def modules_at(self, level: int) -> list[nn.Module]:
        """The modules that compute from the input of block `level` on, as far as a target at that level matters."""
        top = len(self.blocks) - 1
        modules = list(self.blocks[min(level, top)].modules())
        return modules if level < top else [*modules, *self.head.values()]


class _FirstBlockReached(Exception):  # noqa: N818 - it ends a forward pass on purpose
    """Ends a forward pass at the first block."""


class Location(NamedTuple):
    """Where a module sits.

    Attributes:
        tower: Name of the tower.
        level: Index of the block, from the bottom; the number of blocks for a module after the last block.
        weight_type: "W_up" and so on, or the module's name within the block where it has no such name.
    """

    tower: str
    level: int
    weight_type: str


class Backbone(ABC):
    """A model, seen as towers that make features and a linear map from features to logits.

    Args:
        model: A stock transformers model of the family.

    Attributes:
        towers: The towers by name, in the order in which the default search visits them.
    """

    model_type: ClassVar[str]
    # Weight type -> name of the module within a block.
    weight_names: ClassVar[dict[str, str]]
    # Names of the W_p modules, by tower.
    projection_names: ClassVar[dict[str, str]] = {}

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.towers: dict[str, Tower] = {}

    @abstractmethod
    def embed(self, features: Tensor) -> Tensor:
        """Features as the class weights take them, float32 and of the same shape."""

    @abstractmethod
    def class_weights(self, text_features: Tensor | None) -> ClassWeights:
        """The map from embedded features to logits.

        Args:
            text_features: (classes, d) from the text tower, where there is one.
        """

    def check_pixels(self, pixel_values: Tensor) -> None:  # noqa: B027 - most families take any size
        """Raise a `ValueError` if the model cannot take images of this size."""

    def image_features(self, pixel_values: Tensor) -> ImageFeatures:
        """Projected features of images, in the model's dtype and not normalised.

        Args:
            pixel_values: (images, channels, height, width), as the model's processor gives them.

        Raises:
            ValueError: If the images do not have the model's size.
        """
        self.check_pixels(pixel_values)
        return ImageFeatures(*self.towers["vision"].features({"pixel_values": pixel_values}))

    def text_features(self, tokens: Mapping[str, Tensor], batch_size: int = 256) -> Tensor:
        """Projected features of class prompts, (classes, d), encoded in batches of `batch_size`.

        Args:
            tokens: `input_ids` and `attention_mask`, each (classes, tokens).
            batch_size: Prompts encoded at once.
        """
        tower = self.towers["text"]
        count = len(tokens["input_ids"])
        return torch.cat(
            [
                tower.features({key: value[start : start + batch_size] for key, value in tokens.items()})[0]
                for start in range(0, count, batch_size)
            ]
        )

    def logits(self, pixel_values: Tensor, classes: ClassWeights) -> Logits:
        """Global and local logits of images.

        Args:
            pixel_values: (images, channels, height, width).
            classes: From `class_weights`.
        """
        return Logits(*(classes.logits(self.embed(features)) for features in self.image_features(pixel_values)))

    def locate(self, module_name: str) -> Location:
        """Find a module's tower and level.

        Raises:
            ValueError: If it is in no tower.
        """
        for tower in self.towers.values():
            for level, block_name in enumerate(tower.block_names):
                if module_name.startswith(f"{block_name}."):
                    inner = module_name.removeprefix(f"{block_name}.")
                    types = {name: weight_type for weight_type, name in self.weight_names.items()}
                    return Location(tower.name, level, types.get(inner, inner))
            if module_name in tower.head:
                is_projection = module_name == self.projection_names.get(tower.name)
                return Location(tower.name, len(tower.blocks), "W_p" if is_projection else module_name)
        raise ValueError(
            f"{module_name} is in none of the towers of {type(self.model).__name__} "
            f"({', '.join(self.towers)}), so the search does not know when it runs. Take it out of target_modules, or "
            "give a callable objective, which is evaluated in full."
        )


BackboneFactory = Callable[[nn.Module], Backbone]
