"""`attach_branches`: two branches on the vision tower of any model of transformers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration import TEXT_ADAPTER, AdapterFields
from .routing import RoutedLinear, branch_head, change_class, route_modules
from .tower import AdaptedText, BranchedTower, is_adapter_weight, keywords_of

# Where models of transformers keep their vision tower.
TOWER_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder")


@dataclass(frozen=True)
class AttachedBranches:
    """
    What [`attach_branches`] changed.

    Args:
        tower (`str`): the tower's name in the model; empty if the model is the tower.
        layers (`int`): linear layers with LoRA.
        parameters (`int`): weights of the branches.
        total (`int`): weights of the model without them.
    """

    tower: str
    layers: int
    parameters: int
    total: int

    def __str__(self) -> str:
        share = self.parameters / self.total
        where = f"'{self.tower}'" if self.tower else "the model"
        return f"Branches on {self.layers} linear layers of {where}: {self.parameters:,} parameters, {share:.2%} more."


def attach_branches(
    model: PreTrainedModel,
    rank: int = 4,
    alpha: float = 8,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    modalities: Sequence[str] = ("real", "gen"),
    trainable_modalities: Sequence[str] = ("gen",),
    tower: str | None = None,
) -> AttachedBranches:
    """
    Put fresh branches on the vision tower of a model, in place.

    The tower's `forward` then takes `modality`: a branch's name, or a list with one name per image. At first every
    branch equals the model as it was, bit for bit. The tower's own weights are frozen.

    Args:
        model (`PreTrainedModel`): a vision tower, or a model with one, such as a vision-language model.
        rank (`int`): rank of every LoRA update.
        alpha (`float`): updates are scaled by `alpha / rank`.
        dropout (`float`): dropout on the input of the updates, in training.
        targets (`Sequence[str]`, *optional*): names of the linear layers that get an update, such as `"q_proj"`; by
            default every linear layer of the encoder.
        modalities, trainable_modalities (`Sequence[str]`): the branches, and those with their own weights.
        tower (`str`, *optional*): the tower's name in `model`, where there are several.

    Returns:
        [`AttachedBranches`]: print it to see what was changed.

    Raises:
        ValueError: no vision tower, or several; branches already; a target that matches nothing or would do nothing;
            quantised linear layers; a setting out of range.
    """
    name, module = find_tower(model, tower)
    if isinstance(module, BranchedTower):
        raise ValueError(f"The vision tower '{name}' has branches already.")
    fields = AdapterFields(
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        lora_targets=None if targets is None else list(targets),
        modalities=list(modalities),
        trainable_modalities=list(trainable_modalities),
    )
    fields.validate_lora()
    fields.validate_modalities()
    total = model.num_parameters()
    attach_to_tower(module, fields)
    module.requires_grad_(False)
    for weight, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter_weight(weight))
    own = sum(parameter.numel() for weight, parameter in module.named_parameters() if is_adapter_weight(weight))
    layers = sum(isinstance(layer, RoutedLinear) for layer in module.modules())
    return AttachedBranches(name, layers, own, total)


def find_tower(model: nn.Module, tower: str | None = None) -> tuple[str, nn.Module]:
    """
    The vision tower of a model with its name, `""` if the model is one.

    Raises:
        ValueError: there is none of that name, none at all, or several.
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
        f"{[name for name, _ in found] or list(TOWER_NAMES)}: name it by `tower`."
    )


@cache
def _tower_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gmail{base.__name__}", (BranchedTower, base), {})


@cache
def _text_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gmail{base.__name__}", (AdaptedText, base), {})


def attach_to_tower(
    tower: nn.Module, fields: AdapterFields, tower_class: type[nn.Module] | None = None, head: str | None = None
) -> None:
    """
    Make a vision tower a [`BranchedTower`] by the settings in `fields`.

    Args:
        tower: of transformers.
        fields: the settings, usually the tower's configuration.
        tower_class: the class to change to; by default one is made.
        head: the name of the module inside the tower that makes the pooled embedding, if it has one.

    Raises:
        ValueError: see [`attach_branches`].
    """
    fields.lora_targets = _add_lora(tower, fields, fields.trainable_modalities)
    if head is not None and fields.head == "own":
        branch_head(tower.get_submodule(head), fields.trainable_modalities)
    if not isinstance(tower, BranchedTower):
        change_class(tower, tower_class or _tower_class(type(tower)))
    tower.keywords = keywords_of(super(BranchedTower, tower).forward)
    tower.adapter_fields = fields
    tower.modality = fields.default_modality


def attach_to_text(text_model: nn.Module, fields: AdapterFields) -> None:
    """Give a text encoder the `text` adapter, with the rank, scale and targets of the image branches."""
    _add_lora(text_model, fields, [TEXT_ADAPTER])
    change_class(text_model, _text_class(type(text_model)))


def _add_lora(module: nn.Module, fields: AdapterFields, adapters: Sequence[str]) -> list[str]:
    """Add LoRA to the encoder's linear layers; returns the names of the targets."""
    layers = [name for name, part in module.named_modules() if isinstance(part, GradientCheckpointingLayer)]
    names = {
        name: type(linear)
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and any(name.startswith(f"{layer}.") for layer in layers)
    }
    possible = sorted({name.rpartition(".")[-1] for name, kind in names.items() if kind is nn.Linear})
    targets = possible if fields.lora_targets is None else fields.lora_targets
    quantised = sorted({kind.__name__ for kind in names.values() if kind.__module__.startswith("bitsandbytes")})
    if quantised:
        raise ValueError(
            f"The linear layers are quantised ({', '.join(quantised)}), which branches do not support: load the model "
            "without `quantization_config`, for example in `dtype=torch.bfloat16`."
        )
    unknown = sorted(set(targets) - set(possible))
    if unknown or not possible:
        raise ValueError(
            f"`lora_targets` {unknown} match no linear layer of {type(module).__name__}'s encoder that an update can "
            f"change; possible names are {possible}."
        )
    chosen = {name for name, kind in names.items() if kind is nn.Linear and name.rpartition(".")[-1] in targets}
    route_modules(
        module,
        adapters,
        chosen.__contains__,
        rank=fields.lora_rank,
        scaling=fields.adapter_scaling,
        dropout=fields.lora_dropout,
    )
    return list(targets)
