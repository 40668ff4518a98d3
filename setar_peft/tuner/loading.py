"""The load that is going on: what its caller asked for, which PEFT and transformers do not pass on to a tuner."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from setar_peft.decomposition import Residual

# What torch.compile, FSDP and activation checkpointing put into the names of modules.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_T = TypeVar("_T")


@dataclass
class Load:
    """An adapter on its way from a file into a model.

    Attributes:
        strict_base: Refuse a base that the factors are not known to come from.
        rename: The name of a tensor of the file -> its name in this model.
        strongest: Module name in the file -> the strongest of the components that it removes; `None` where nobody has
            read the file yet and found its values finite.
    """

    strict_base: bool
    rename: Callable[[str], str]
    strongest: dict[str, Residual] | None = None

    def module_name(self, name: str) -> str:
        """The name in this model of a module that has another in the file."""
        # Patterns are made for names of tensors, so that they may look at what follows a module's name.
        return plain_name(self.rename(f"{name}.setar_B0").removesuffix(".setar_B0"))

    def by_module(self, values: Mapping[str, _T]) -> dict[str, _T]:
        """A mapping of the file's modules as one of this model's.

        Raises:
            ValueError: If two modules of the file would be one in the model.
        """
        renamed: dict[str, _T] = {}
        origin: dict[str, str] = {}
        for name, value in values.items():
            new = self.module_name(name)
            if new in renamed:
                raise ValueError(
                    f"key_mapping gives {origin[new]!r} and {name!r} the same name {new!r}. Give each module of the "
                    "adapter a name of its own."
                )
            renamed[new], origin[new] = value, name
        return renamed


CURRENT: ContextVar[Load | None] = ContextVar("load", default=None)


def plain_name(name: str) -> str:
    """A module's or tensor's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def key_mapping_as_rename(key_mapping: Mapping[str, str]) -> Callable[[str], str]:
    """PEFT's `key_mapping` as a function: the first pattern that occurs in a name is replaced."""

    def rename(name: str) -> str:
        for pattern, replacement in key_mapping.items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        return name

    return rename
