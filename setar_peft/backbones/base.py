"""What a model family tells the rest of the package: its towers, its weights' names, and its features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from setar_peft.backbones.features import ClassWeights, ImageFeatures, Logits
from setar_peft.backbones.grid import PatchGrid, grid_of, pair
from setar_peft.backbones.inputs import named_inputs


@dataclass
class TowerInput:
    """What enters a tower's first block.

    Attributes:
        hidden: Hidden states, (batch, tokens, width).
        args: Further positional arguments of every block.
        kwargs: Keyword arguments of every block.
        context: What the tower needs to know of the inputs further on.
        rows: Images, texts or prompts in the batch; a tower may lay its hidden states out in more rows, or fewer.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Any
    rows: int


class TowerState(NamedTuple):
    """How far some inputs have come in a tower.

    Attributes:
        entry: What the tower was entered with.
        level: The block that is next.
        hidden: Its input, (batch, tokens, width).
        layers: Of the blocks below, what `Tower.class_token` makes of their outputs, (batch, d) each; None where that
            is not wanted.
    """

    entry: TowerInput
    level: int
    hidden: Tensor
    layers: tuple[Tensor, ...] | None


class Tower(ABC):
    """A stack of blocks whose output is one side of the logits.

    Args:
        model: The model that the tower is part of.
        blocks: Full names of the blocks, from the bottom up.
        head: Full names of the modules after the last block that the features go through.

    Attributes:
        name: "vision" or "text".
        blocks: The blocks, from the bottom up.
        block_names: Their full module names.
        head: The modules after the last block, by full name.
    """

    name: str

    def __init__(self, model: nn.Module, blocks: Sequence[str], head: Sequence[str]) -> None:
        self.model: Any = model
        self.block_names = list(blocks)
        self.blocks: list[Any] = [model.get_submodule(name) for name in blocks]
        self.head: Mapping[str, nn.Module] = {name: model.get_submodule(name) for name in head}

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model's own forward over the tower."""

    @abstractmethod
    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        """From the input of the last block to the tower's features.

        What runs before the last block's own forward, and the block up to a searched weight, is shared between the
        candidates of that weight: a tower computes first what depends on the fewest weights.

        Args:
            entry: What the tower was entered with.
            hidden: Input of the last block, (batch, tokens, width).

        Returns:
            The fields of `ImageFeatures`, or (batch, d) alone for a tower that encodes class prompts.
        """

    def context(self, inputs: Mapping[str, Tensor]) -> Any:
        """What the tower needs to know of the inputs further on; nothing by default."""
        del inputs

    def enter(self, inputs: Mapping[str, Tensor]) -> TowerInput:
        """Run the model's own forward up to its first block and return what the block is called with."""
        return self._entries(inputs, whole=False)[0]

    def _entries(self, inputs: Mapping[str, Tensor], *, whole: bool) -> list[TowerInput]:
        """What the first block is called with; or each block, in the model's whole forward."""
        entered: list[TowerInput] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            entered.append(TowerInput(hidden, args[1:], kwargs, self.context(inputs), hidden.shape[0]))
            if not whole:
                raise _FirstBlockReached

        with ExitStack() as hooks, suppress(_FirstBlockReached):
            for block in self.blocks if whole else self.blocks[:1]:
                hooks.callback(block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
            self.run(inputs)
        return entered

    def step(self, entry: TowerInput, level: int, hidden: Tensor) -> Tensor:
        """Run one block: from the input of block `level` to the input of the next."""
        output = self.blocks[level](hidden, *entry.args, **entry.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def start(self, inputs: Mapping[str, Tensor], *, layers: bool = False) -> TowerState:
        """Enter the tower.

        Args:
            inputs: The model's inputs by name.
            layers: Whether the features after each block are wanted, too.

        Raises:
            ValueError: If they are, and the tower has no class token.
        """
        if layers:
            self.check_has_class_token()
        if torch.compiler.is_compiling():
            # A forward that is being exported cannot be stopped; what nobody reads of it is no part of the graph.
            entries = self._entries(inputs, whole=True)
            tokens = tuple(self.class_token(entry.hidden) for entry in entries[1:]) if layers else None
            return TowerState(entries[0], len(entries) - 1, entries[-1].hidden, tokens)
        entry = self.enter(inputs)
        return TowerState(entry, 0, entry.hidden, () if layers else None)

    def advance(self, state: TowerState, level: int) -> TowerState:
        """Run the blocks below a level, which may be that of the last block at most."""
        entry, start, hidden, layers = state
        for below in range(start, level):
            hidden = self.step(entry, below, hidden)
            layers = None if layers is None else (*layers, self.class_token(hidden))
        return TowerState(entry, level, hidden, layers)

    def end(self, state: TowerState) -> ImageFeatures:
        """Features of images or texts, through the blocks that are left."""
        entry, _, hidden, layers = self.advance(state, len(self.blocks) - 1)
        features = ImageFeatures(*self.finish(entry, hidden))
        return features if layers is None else features._replace(layers=torch.stack([*layers, features.pooled], dim=1))

    def features(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Features of some inputs, through every block; see `finish`."""
        state = self.advance(self.start(inputs), len(self.blocks) - 1)
        return self.finish(state.entry, state.hidden)

    def class_token(self, hidden: Tensor) -> Tensor:
        """What the tower would make of the output of a block below the last one, were it the last one's.

        Args:
            hidden: Output of a block, (batch, tokens, width).

        Returns:
            Pooled features, (batch, d).
        """
        raise NotImplementedError(type(self).__name__)

    def check_has_class_token(self) -> None:
        """Raise a `ValueError` if the tower has no class token, or blocks of several widths."""
        if type(self).class_token is Tower.class_token:
            raise ValueError(
                f"{type(self.model).__name__} has no class token that runs through all blocks, so that there are no "
                "features by block; take a score that reads the last one's."
            )

    def parts(self, level: int) -> Mapping[str, nn.Module]:
        """The modules that run at a level, by full name: its block, or the head at the level above the last block."""
        return self.head if level == len(self.blocks) else {self.block_names[level]: self.blocks[level]}

    def modules_at(self, level: int) -> list[nn.Module]:
        """The modules that compute from the input of block `level` on, as far as a target at that level matters."""
        top = len(self.blocks) - 1
        levels = [level] if level < top else [top, top + 1]
        return [module for at in levels for part in self.parts(at).values() for module in part.modules()]


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
        model_type: The family's name in transformers' configurations.
        model_classes: Names of the model classes that this backbone can see that way.
        weight_names: Weight type -> name of the module within a block.
        projection_names: Tower -> full name of its W_p, where there is one.
        input_tower: The tower that reads what is classified.
        needs_prompts: Whether the classes are given by texts, which the "text" tower encodes.
        longest_prompt: Tokens of the longest prompt that the "text" tower takes; 0 where there are no prompts.
        pads_prompts: Whether every prompt has to be padded to that length.
        towers: The towers by name, in the order in which the default search visits them.
    """

    model_type: ClassVar[str]
    model_classes: ClassVar[Sequence[str]]
    weight_names: ClassVar[dict[str, str]]
    projection_names: ClassVar[dict[str, str]] = {}
    input_tower: ClassVar[str] = "vision"
    needs_prompts: ClassVar[bool] = True
    pads_prompts: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.towers: dict[str, Tower] = {}
        self.longest_prompt = 0

    @property
    def prompts_at_once(self) -> int:
        """Class prompts encoded at once unless somebody says otherwise: below this many a GPU waits for launches."""
        return 1024 if self.device.type == "cuda" else 256

    @property
    def kind(self) -> Literal["image", "text"]:
        """What is classified."""
        return "text" if self.input_tower == "text" else "image"

    @classmethod
    def default_targets(cls) -> set[str]:
        """W_up, as PEFT's `target_modules` names it."""
        return {cls.weight_names["W_up"]}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @abstractmethod
    def embed(self, features: Tensor) -> Tensor:
        """Features as the class weights take them, float32 and of the same shape."""

    @abstractmethod
    def class_weights(self, text_features: Tensor | None) -> ClassWeights:
        """The map from embedded features to logits.

        Args:
            text_features: (classes, d) from the text tower, where the classes are given by prompts.
        """

    def check(self, inputs: Mapping[str, Tensor]) -> None:  # noqa: B027 - a family may take anything
        """Raise a `ValueError` if the model cannot take these inputs."""

    def patch_grid(self, inputs: Tensor | Mapping[str, Tensor]) -> PatchGrid:
        """How the patches lie that the local features and logits of these inputs are of.

        Args:
            inputs: As for `image_features`. Where images of a batch may have several grids, give one image.

        Raises:
            ValueError: If the model cannot take them, or they have several grids.
        """
        named = named_inputs(inputs)
        self.check(named)
        return self._grid(named)

    def _grid(self, inputs: Mapping[str, Tensor]) -> PatchGrid:
        config = getattr(self.model.config, "vision_config", self.model.config)
        return grid_of(inputs, pair(config.patch_size))

    def image_features(self, inputs: Tensor | Mapping[str, Tensor], *, layers: bool = False) -> ImageFeatures:
        """Features of images or texts, in the model's dtype and as they come out of the tower.

        Args:
            inputs: Pixel values (images, channels, height, width), or the model's inputs by name, as its processor or
                tokenizer gives them; on any device.
            layers: Whether the features after each block are wanted, too.

        Raises:
            ValueError: If the model cannot take them, or has no features by block.
        """
        tower = self.towers[self.input_tower]
        return tower.end(tower.start(self.on_device(inputs), layers=layers))

    def on_device(self, inputs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's inputs by name, where it computes.

        Raises:
            ValueError: If the model cannot take them.
        """
        named = {name: value.to(self.device) for name, value in named_inputs(inputs).items()}
        self.check(named)
        return named

    def embedded(self, features: ImageFeatures) -> ImageFeatures:
        """Features as the class weights take them, float32."""
        layers = None if features.layers is None else self.embed(features.layers)
        return ImageFeatures(self.embed(features.pooled), self.embed(features.local), features.mask, layers)

    def text_features(self, tokens: Mapping[str, Tensor], batch_size: int | None = None) -> Tensor:
        """Features of class prompts, (classes, d), encoded in batches.

        Args:
            tokens: `input_ids` and, where the tokenizer gives it, `attention_mask`, each (classes, tokens), as
                `Objective.class_tokens` makes them for this backbone; on any device.
            batch_size: Prompts encoded at once; by default `prompts_at_once`.

        Raises:
            ValueError: If the prompts have a length that the model was not trained with.
        """
        tower, device = self.towers["text"], self.device
        batches = range(0, len(tokens["input_ids"]), size := batch_size or self.prompts_at_once)
        parts = ({key: value[start : start + size].to(device) for key, value in tokens.items()} for start in batches)
        return torch.cat([tower.features(part)[0] for part in parts])

    def logits(self, inputs: Tensor | Mapping[str, Tensor], classes: ClassWeights) -> Logits:
        """Global and local logits of images or texts.

        Args:
            inputs: Pixel values (images, channels, height, width), or the model's inputs by name; on any device.
            classes: From `class_weights`, or from `Objective.class_weights`.
        """
        return classes.logits_of(self.embedded(self.image_features(inputs)))

    def locate(self, module_name: str) -> Location:
        """Find a module's tower and level.

        Raises:
            ValueError: If it is in no tower.
        """
        types = {name: weight_type for weight_type, name in self.weight_names.items()}
        for tower in self.towers.values():
            if module_name == self.projection_names.get(tower.name):
                return Location(tower.name, len(tower.blocks), "W_p")
            for level in range(len(tower.blocks) + 1):
                for part in tower.parts(level):
                    if module_name == part or module_name.startswith(f"{part}."):
                        inner = module_name.removeprefix(f"{part}.")
                        return Location(tower.name, level, types.get(inner, inner))
        raise ValueError(
            f"{module_name} is in none of the towers of {type(self.model).__name__} "
            f"({', '.join(self.towers)}), so the search does not know when it runs. Take it out of target_modules, or "
            "give a callable objective, which is evaluated in full."
        )

    def modules_of_type(self, weight_type: str) -> list[str]:
        """Full names of the modules of one weight type, tower by tower from the bottom up.

        Unlike a suffix in `target_modules`, this tells W_down from W_o where both end in "output.dense".

        Args:
            weight_type: "W_up" and so on, or "W_p".

        Raises:
            ValueError: If the family has no such weight.
        """
        if weight_type == "W_p" and self.projection_names:
            return [self.projection_names[tower] for tower in self.towers if tower in self.projection_names]
        if weight_type not in self.weight_names:
            known = [*self.weight_names, *(["W_p"] if self.projection_names else [])]
            raise ValueError(
                f"{type(self.model).__name__} has no weights {weight_type!r}; it has {', '.join(known)}. Name other "
                "modules in target_modules."
            )
        known_names = {name for name, _ in self.model.named_modules()}
        return [
            name
            for tower in self.towers.values()
            for level in range(len(tower.blocks) + 1)
            for part in tower.parts(level)
            if (name := f"{part}.{self.weight_names[weight_type]}") in known_names
        ]
