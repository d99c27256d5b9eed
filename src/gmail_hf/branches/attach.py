"""Find the vision tower of a model and add branches to it."""

import inspect
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration import TEXT_ADAPTER, AdapterFields
from .routing import change_class, pickled_as, route_modules
from .tower import AdaptedText, BranchedTower, keywords_of

# Names of the vision tower in models of transformers.
TOWER_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder")


def find_tower(model: nn.Module, tower: str | None = None) -> tuple[str, nn.Module]:
    """
    Find the vision tower of a model.

    Returns:
        The tower's name and the tower. The name is `""` if the model itself is a tower.

    Raises:
        ValueError: there is no module of the name `tower`, no vision tower, or more than one.
    """
    if isinstance(model, BranchedTower):
        return "", model
    if tower is not None:
        try:
            return tower, model.get_submodule(tower)
        except AttributeError:
            raise ValueError(f"{type(model).__name__} has no module '{tower}'.") from None
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[-1] in TOWER_NAMES and isinstance(module, PreTrainedModel)
    ]
    found = [entry for entry in found if not any(entry[0].startswith(f"{other}.") for other, _ in found)]
    if len(found) == 1:
        return found[0]
    inputs = inspect.signature(model.forward).parameters
    if not found and "input_ids" not in inputs and ("pixel_values" in inputs or "grid_thw" in inputs):
        return "", model
    raise ValueError(
        f"{type(model).__name__} has {'no' if not found else 'more than one'} vision tower "
        f"{[name for name, _ in found] or list(TOWER_NAMES)}: pass its name as `tower`."
    )


@cache
def _tower_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gmail{base.__name__}", (BranchedTower, base), pickled_as(_tower_class, base))


@cache
def _text_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gmail{base.__name__}", (AdaptedText, base), pickled_as(_text_class, base))


def attach_to_tower(tower: nn.Module, fields: AdapterFields, tower_class: type[nn.Module] | None = None) -> None:
    """
    Turn a vision tower into a [`BranchedTower`] with the settings in `fields`.

    Args:
        tower: a vision tower of transformers.
        fields: the settings, usually the tower's configuration.
        tower_class: the class to change to; by default one is created.

    Raises:
        ValueError: see [`attach_branches`].
    """
    fields.lora_targets = _add_lora(tower, fields, fields.trainable_modalities)
    if not isinstance(tower, BranchedTower):
        change_class(tower, tower_class or _tower_class(type(tower)))
    tower.keywords = keywords_of(super(BranchedTower, tower).forward)
    tower.adapter_fields = fields
    tower.modality = fields.default_modality


def attach_to_text(text_model: nn.Module, fields: AdapterFields) -> None:
    """Add the `text` adapter to a text encoder, with the rank, scale and targets of the image branches."""
    _add_lora(text_model, fields, [TEXT_ADAPTER])
    change_class(text_model, _text_class(type(text_model)))


def _add_lora(module: nn.Module, fields: AdapterFields, adapters: Sequence[str]) -> list[str]:
    """Add LoRA to the encoder's linear layers and return the names of the targets."""
    layers = target_layers(module, fields.lora_targets)
    route_modules(
        module,
        adapters,
        layers.__contains__,
        rank=fields.lora_rank,
        scaling=fields.adapter_scaling,
        dropout=fields.lora_dropout,
    )
    return fields.lora_targets or sorted({name.rpartition(".")[-1] for name in layers})


def target_layers(module: nn.Module, targets: Sequence[str] | None) -> set[str]:
    """
    Names of the encoder's linear layers that get a LoRA update. Without `targets`, all layers that can have one.

    Raises:
        ValueError: a target matches nothing or would have no effect, or linear layers are quantised.
    """
    layers = [name for name, part in module.named_modules() if isinstance(part, GradientCheckpointingLayer)]
    linears = {
        name: linear
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and any(name.startswith(f"{layer}.") for layer in layers)
    }
    # Quantisation changes the class of layers (bitsandbytes, quanto) or the type of weights (torchao).
    quantised = {
        f"{type(linear).__module__}.{type(linear).__name__}"
        for linear in linears.values()
        if not type(linear).__module__.startswith("torch.") or type(linear.weight.data) is not torch.Tensor
    }
    if quantised:
        raise ValueError(
            f"The linear layers of {type(module).__name__} are quantised or wrapped ({', '.join(sorted(quantised))}), "
            "which branches do not support. Load the vision tower with `dtype=torch.bfloat16`. To quantise only the "
            "language model, list the vision tower in `llm_int8_skip_modules`."
        )
    plain = [name for name, linear in linears.items() if type(linear) is nn.Linear]
    possible = sorted({name.rpartition(".")[-1] for name in plain})
    targets = possible if targets is None else targets
    unknown = sorted(set(targets) - set(possible))
    if unknown or not possible:
        raise ValueError(
            f"`lora_targets` {unknown} match no linear layer in the encoder of {type(module).__name__} that LoRA can "
            f"change. Possible names are {possible}."
        )
    return {name for name in plain if name.rpartition(".")[-1] in targets}
