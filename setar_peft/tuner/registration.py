"""Registering the method with PEFT, and all that is put around methods of PEFT and transformers.

Neither passes `strict_base` or `key_mapping` on to a tuner, transformers calls no method of a tuner after loading, and
where a load fails half way they leave the adapter in the model; both write cards of their own. Other methods' adapters
pass through unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import register_peft_method
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from setar_peft.tuner.adapter_layers import adapter_layers, remove_adapter
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.loading import CURRENT, Load, key_mapping_as_rename
from setar_peft.tuner.model import SeTARModel


def register(search: Callable[..., Any], cards: Callable[[], Any]) -> None:
    """Make the method known to PEFT; to be called once.

    Args:
        search: `search_rank_ratios`, which stands above the tuner.
        cards: Gives the module that writes model cards, `setar_peft.hub.card`, when the first card is written.
    """

    def write_card(*args: Any) -> None:
        cards().write_model_card(*args)

    register_peft_method(name="setar", config_cls=SeTARConfig, model_cls=SeTARModel)
    SeTARModel.search = staticmethod(search)
    SeTARConfig.write_card = staticmethod(write_card)
    _wrap_saving(cards)
    _wrap_loading()


def _wrap_saving(cards: Callable[[], Any]) -> None:
    upload, write_peft_card = PeftModel._upload_modified_files, PeftModel.create_or_update_model_card

    # PEFT writes a card into the folder that is being saved, also where the adapter goes into a folder below; it names
    # a local base by its path. It is the first thing that it writes.
    def card_without_local_base(self: PeftModel, output_dir: str) -> None:
        is_setar = any(isinstance(config, SeTARConfig) for config in self.peft_config.values())
        if is_setar and not adapter_layers(self):
            raise ValueError(
                "The model has no adapter left to save: merge_and_unload() or unload() took it out. Save before that, "
                "or save the model that they returned."
            )
        write_peft_card(self, output_dir)
        if is_setar:
            cards().forget_local_base(Path(output_dir, cards().CARD_NAME))

    # transformers, which `push_to_hub` comes from, writes its own template over the card that saving has just written,
    # and calls no method in between that an adapter could define: the last step of a push is wrapped.
    def upload_with_card(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        cards().write_pushed_card(self, working_dir)
        return upload(self, working_dir, *args, **kwargs)

    PeftModel._upload_modified_files = upload_with_card
    PeftModel.create_or_update_model_card = card_without_local_base


def _wrap_loading() -> None:
    """Wrap PEFT's two methods that load an adapter from files."""
    from_pretrained: Any = PeftModel.from_pretrained.__func__
    load_adapter = PeftModel.load_adapter

    @functools.wraps(from_pretrained)
    def wrapped_from_pretrained(
        cls: type[PeftModel], model: nn.Module, model_id: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> PeftModel:
        mapping = kwargs.get("key_mapping")
        if mapping is None:  # as PEFT has it
            mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        with _load(model, adapter_name, kwargs.get("strict_base"), key_mapping_as_rename(mapping or {})):
            loaded: PeftModel = from_pretrained(cls, model, model_id, adapter_name, *args, **kwargs)
            return loaded

    @functools.wraps(load_adapter)
    def wrapped_load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        rename = key_mapping_as_rename(kwargs.get("key_mapping") or {})
        with _load(self.get_base_model(), adapter_name, kwargs.pop("strict_base", None), rename):
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    PeftModel.from_pretrained = classmethod(wrapped_from_pretrained)
    PeftModel.load_adapter = wrapped_load_adapter


def load_by_transformers(
    load_adapter: Callable[..., Any],
    model: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What `load_adapter` of transformers' models becomes.

    Args:
        load_adapter: The method as transformers has it.
        model: The model, `self` of that method.
        peft_model_id: As for that method.
        adapter_name: As for that method.
        args: As for that method.
        kwargs: As for that method, and `strict_base`.
    """
    name, strict = adapter_name or "default", kwargs.pop("strict_base", None)
    mapping = getattr(kwargs.get("load_config"), "weight_mapping", None) or kwargs.get("weight_mapping")
    with _load(model, name, strict, _conversions_as_rename(mapping, model)) as load:
        info = load_adapter(model, peft_model_id, adapter_name, *args, **kwargs)
        config = model.peft_config.get(name)
        if load is not None and isinstance(config, SeTARConfig):
            SeTARModel.check_loaded(model, config, name)
        return info


@contextmanager
def _load(
    base: nn.Module, adapter_name: str, strict_base: object, rename: Callable[[str], str]
) -> Iterator[Load | None]:
    """Make a load the current one; if it fails, an adapter that was not there before is taken out of the model."""
    if CURRENT.get() is not None:  # PEFT's from_pretrained goes on in load_adapter
        yield None
        return
    if strict_base is not None and not isinstance(strict_base, bool):
        raise ValueError(f"strict_base is {strict_base!r}; give True or False.")
    there = adapter_name in _configs(base)
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    load = Load(bool(strict_base), rename)
    token = CURRENT.set(load)
    try:
        yield load
    except BaseException:
        if not there and isinstance(_configs(base).get(adapter_name), SeTARConfig):
            remove_adapter(base, adapter_name, trainable)
        raise
    finally:
        CURRENT.reset(token)


def _configs(base: nn.Module) -> Mapping[str, Any]:
    configs = getattr(base, "peft_config", {})
    return configs if isinstance(configs, Mapping) else {}


def _conversions_as_rename(conversions: list[Any] | None, model: Any) -> Callable[[str], str]:
    """What transformers renames the tensors of a file with; as there, a name that the model has stays as it is."""
    conversions = conversions or get_model_conversion_mapping(model)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    modules = {name for name, _ in model.named_modules()}

    def rename(name: str) -> str:
        known = name.rpartition(".")[0] in modules
        return name if known else rename_source_key(name, renamings, converters)[0]

    return rename
