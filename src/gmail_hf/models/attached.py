"""`attach_branches`: branches on the vision tower of any model of transformers, without a class for it."""

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ..branches.attach import find_tower, target_layers
from ..branches.configuration import ATTACHED, AdapterFields
from ..branches.peft_folders import (
    PEFT_PREFIX,
    check_base,
    has_adapter,
    read_adapter,
    read_signature,
    write_adapter,
)
from ..branches.routing import RoutedLinear, pickled_as
from ..branches.tower import BranchedTower, Modality, is_adapter_weight
from ..publishing.hub import hub_kwargs
from .auto import MODELS
from .loading import adapter_files
from .packing import packed_features
from .vision import GmailVisionOnly, VisionFields
from .vision_language import take_modality

# Weights of embeddings, in transformers' names, whose tokens precede the patches.
PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens", "cls_register_token")


@dataclass(frozen=True)
class AttachedBranches:
    """
    The result of [`attach_branches`].

    Args:
        tower (`str`): the tower's name in the model; empty if the model is the tower.
        layers (`int`): number of linear layers with LoRA.
        parameters (`int`): number of parameters of the branches.
        total (`int`): number of parameters of the model without branches.
    """

    tower: str
    layers: int
    parameters: int
    total: int

    def __str__(self) -> str:
        share = self.parameters / self.total
        where = f"'{self.tower}'" if self.tower else "the model"
        return f"Branches on {self.layers} linear layers of {where}: {self.parameters:,} parameters, {share:.2%} more."


class AttachedTower(GmailVisionOnly):
    """
    Mixin for a tower that [`attach_branches`] changed: a vision-only model with the methods of [`GmailModel`].

    An embedding is the tower's pooled output, or the mean of its tokens if it has none. Some towers take more than
    `pixel_values`: Qwen-VL takes `image_grid_thw` `(images, 3)`, with patches padded to `(images, patches, values)`;
    Gemma 4 takes `image_position_ids` `(images, patches, 2)`; Pixtral takes `image_sizes` `(images, 2)`. Their
    embedding is the mean of an image's tokens, after merging patches if the tower merges them.
    """

    @property
    def embed_dim(self) -> int:
        """The dimension of embeddings."""
        return getattr(self.config, "out_hidden_size", None) or self.config.hidden_size

    @property
    def prefix_tokens(self) -> int:
        """The number of class tokens and registers, found by their names in transformers."""
        weights = [(name.split("."), weight) for name, weight in self.named_parameters()]
        prefix = [weight for names, weight in weights if "embeddings" in names and names[-1] in PREFIX_TOKENS]
        return sum(1 if weight.dim() == 1 else weight.shape[-2] for weight in prefix)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        modality: Modality | None = None,
        image_grid_thw: torch.Tensor | None = None,
        image_position_ids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's output with a `pooler_output` `(images, dim)`; arguments as in `forward`."""
        sizes = image_grid_thw, image_position_ids, image_sizes
        if "image_sizes" in self.keywords or any(size is not None for size in sizes):
            return packed_features(self, pixel_values, *sizes, modality=modality, **kwargs)
        outputs = self(pixel_values, modality=modality, **kwargs)
        if getattr(outputs, "pooler_output", None) is None:
            tokens, mask = outputs.last_hidden_state, kwargs.get("pixel_attention_mask")
            mask = tokens.new_ones(tokens.shape[:2]) if mask is None else mask  # (images, tokens)
            outputs.pooler_output = (tokens * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return outputs


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
    Add fresh branches to the vision tower of a model, in place.

    `forward` of the tower, and `forward` and `generate` of the model that contains it, then take `modality`: the name
    of a branch, or a list with one name per image. At first every branch equals the original model, bit for bit. The
    tower's own weights are frozen. [`GmailTrainer`] trains the branches, [`save_branches`] and [`load_branches`] save
    and load them.

    Args:
        model (`PreTrainedModel`): a vision tower, or a model with one, such as a vision-language model.
        rank (`int`): rank of the LoRA updates.
        alpha (`float`): updates are scaled by `alpha / rank`.
        dropout (`float`): dropout on the input of the updates, in training.
        targets (`Sequence[str]`, *optional*): names of the linear layers that get an update, such as `"q_proj"`; by
            default every linear layer of the encoder.
        modalities, trainable_modalities (`Sequence[str]`): the branches, and those with their own weights.
        tower (`str`, *optional*): the tower's name in `model`, if there are several.

    Returns:
        [`AttachedBranches`], whose representation says what was changed.

    Raises:
        ValueError: the model has no vision tower, several, or one with branches; a target matches nothing or would
            have no effect; linear layers are quantised.
        huggingface_hub.errors.StrictDataclassClassValidationError: a setting is out of range.
    """
    fields = {
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "lora_targets": None if targets is None else list(targets),
        "modalities": list(modalities),
        "trainable_modalities": list(trainable_modalities),
        **_origin(model),
    }
    return _attach(model, fields, tower)


def from_vlm(
    pretrained_model_name_or_path: str | os.PathLike,
    gmail: str | os.PathLike | None = None,
    gmail_revision: str | None = None,
    tower: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    Load a vision-language model with branches on its vision tower.

    Args:
        pretrained_model_name_or_path: a Hub id or folder of an image-text-to-text model.
        gmail: a Hub id or folder with branches for this tower, see [`load_branches`]. By default, the branches are
            fresh.
        gmail_revision (`str`, *optional*): the revision of `gmail`.
        tower: as in [`attach_branches`].
        kwargs: `lora_rank`, `lora_alpha` and other fields of [`AdapterFields`] for fresh branches. All others, such as
            `dtype` and `device_map`, are passed to `AutoModelForImageTextToText.from_pretrained`. Branches do not
            record a `subfolder`: load them with `gmail=` again.

    Raises:
        ValueError: the model has no language model, or as in [`attach_branches`] and [`load_branches`].
        OSError, StrictDataclassClassValidationError: as in [`attach_branches`] and [`load_branches`].
    """
    _check_vlm(pretrained_model_name_or_path, **hub_kwargs(kwargs))
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in AdapterFields.__dataclass_fields__}
    if fields and gmail is not None:
        raise ValueError(f"The branches of '{gmail}' have their own settings: remove {sorted(fields)}.")
    model, info = AutoModelForImageTextToText.from_pretrained(
        pretrained_model_name_or_path, output_loading_info=True, **{**kwargs, "use_safetensors": True}
    )
    if any(is_adapter_weight(name) for name in info["unexpected_keys"]):
        raise ValueError(
            f"'{pretrained_model_name_or_path}' has weights of branches, which would be lost, without their settings. "
            "Branches are saved with `save_branches`. To use them with this model, load it with "
            "`AutoModelForImageTextToText` and save it again, which removes its branches, then pass their folder as "
            "`gmail=`."
        )
    if gmail is None:
        _attach(model, {**fields, **_origin(model)}, tower)
    else:
        hub = {name: value for name, value in hub_kwargs(kwargs).items() if name != "subfolder"}  # of the model
        load_branches(model, gmail, tower, **{**hub, "revision": gmail_revision})
    if kwargs.get("subfolder"):  # saved branches would look for their model in the main folder, so it has no name
        config = attached_tower(model).config
        config.base_model_name_or_path = config.base_model_revision = None
    return model


def _check_vlm(source: str | os.PathLike, **hub: Any) -> None:
    values, _ = PreTrainedConfig.get_config_dict(source, **hub)
    if "trainable_modalities" in values:
        raise ValueError(
            f"'{source}' has branches and no language model: pass it as `gmail=`, after the vision-language model."
        )
    if "trainable_modalities" in (values.get("vision_config") or {}):
        raise ValueError(f"'{source}' already has branches: load it with `AutoModelForImageTextToText`.")
    if values.get("model_type") in {model.base_class.config_class.model_type for model in MODELS}:
        raise ValueError(
            f"'{source}' is of type '{values['model_type']}', which has no language model: load it with "
            "`gmail_hf.from_base`."
        )


def from_branches(
    pretrained_model_name_or_path: str | os.PathLike, revision: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """
    Load what [`save_branches`] wrote onto the vision-language model that it names.

    Args:
        pretrained_model_name_or_path, revision: of the branches.
        kwargs: of [`from_vlm`].

    Raises:
        ValueError, OSError: as [`from_vlm`]; the branches name no model.
    """
    hub = {name: value for name, value in hub_kwargs(kwargs).items() if name != "subfolder"}  # of the model
    values, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **{**hub, "revision": revision})
    base, at = values.get("base_model_name_or_path"), values.get("base_model_revision")
    if base is None:
        raise ValueError(
            f"The branches in '{pretrained_model_name_or_path}' name no model; in Python, `from_vlm` takes them as "
            "`gmail=`."
        )
    return from_vlm(base, gmail=pretrained_model_name_or_path, gmail_revision=revision, revision=at, **kwargs)


def save_branches(model: nn.Module, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """
    Save the branches of a model that [`attach_branches`] changed: one PEFT folder per branch, and their settings.

    `PeftModel.from_pretrained(plain, save_directory, subfolder="gen")` loads a branch onto the original model.

    Args:
        model: the model, or its tower.
        save_directory, kwargs: as in [`GmailCheckpoints.save_adapters`].

    Raises:
        TypeError: `model` has no attached branches.
        ValueError: as in `save_adapters`.
    """
    attached_tower(model).save_adapters(save_directory, **kwargs)


def load_branches(
    model: PreTrainedModel,
    pretrained_model_name_or_path: str | os.PathLike,
    tower: str | None = None,
    **kwargs: Any,
) -> None:
    """
    Load branches into a model's vision tower. They are attached first if there are none.

    Args:
        model: a model with the tower that the branches were trained on, or that tower.
        pretrained_model_name_or_path: a Hub id or folder written by [`save_branches`] or by a training, which may be
            that of a [`GmailCLIPModel`] or [`GmailSiglipModel`] with this tower. Their heads are not loaded, because a
            language model does not use them. Saved again, branches attached here name `model` as their base.
        tower: as in [`attach_branches`].
        kwargs: `revision`, `token`, `cache_dir` and other arguments for downloads.

    Raises:
        ValueError: the branches have another base, or other settings than the attached ones.
        OSError: a file is missing or damaged.
    """
    source, hub = pretrained_model_name_or_path, hub_kwargs(kwargs)
    values, _ = PreTrainedConfig.get_config_dict(source, **hub)
    if "trainable_modalities" not in values:
        raise ValueError(f"'{source}' is of type '{values.get('model_type')}' and has no branches.")
    module, origin = find_tower(model, tower)[1], {}
    if not isinstance(module, BranchedTower):
        origin = _origin(model) if model.name_or_path else {}
        if (files := adapter_files(source, values["modalities"][0], **hub)) and isinstance(
            signature := read_signature(files[1]), dict
        ):
            check_base(module, files[1], values.get("base_model_name_or_path"), signature)  # before the model changes
        fields = {name: values[name] for name in VisionFields.__dataclass_fields__ if name in values}
        _attach(model, {**fields, "head": "shared"}, tower)
    module = attached_tower(model)
    loaded = {}
    for name in module.config.modalities:
        files = adapter_files(source, name, **hub)
        if files is None:
            raise OSError(f"'{source}' has no adapter '{name}': expected {name}/adapter_config.json.")
        loaded[name] = read_adapter(module, name, *files)
    for name, tensors in loaded.items():
        if has_adapter(module, name):
            write_adapter(module, name, tensors)
    # Only now, because folders without a signature are checked by the name of their base.
    for field, value in origin.items():
        setattr(module.config, field, value)


def attached_tower(model: nn.Module) -> AttachedTower:
    """
    Find the tower in `model` that [`attach_branches`] changed.

    Raises:
        TypeError: there is none, or more than one.
    """
    towers = [module for module in model.modules() if isinstance(module, AttachedTower)]
    if len(towers) != 1:
        raise TypeError(
            f"Expected a model with one vision tower with branches, but {type(model).__name__} has {len(towers)}. Use "
            "`gmail_hf.from_base` for a base with a class here, and `attach_branches` for any other."
        )
    return towers[0]


def _origin(model: PreTrainedModel) -> dict[str, str | None]:
    commit = getattr(model.config, "_commit_hash", None)
    return {"base_model_name_or_path": model.name_or_path or None, "base_model_revision": commit}


def _attach(model: PreTrainedModel, fields: dict[str, Any], tower: str | None) -> AttachedBranches:
    name, module = find_tower(model, tower)
    if isinstance(module, BranchedTower):
        raise ValueError(f"The vision tower '{name}' already has branches.")
    target_layers(module, fields.get("lora_targets"))  # checks the targets before the model changes
    total, training = model.num_parameters(), module.training
    _tower_class(type(module)).adopt(module, **fields).train(training)
    if name:
        module.outer_prefix = f"{name}.".removeprefix(PEFT_PREFIX)  # PEFT may wrap the language model
        take_modality(model, name)
    own = sum(parameter.numel() for weight, parameter in module.named_parameters() if is_adapter_weight(weight))
    layers = sum(isinstance(layer, RoutedLinear) for layer in module.modules())
    return AttachedBranches(name, layers, own, total)


@cache
def _config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    kind = f"{ATTACHED}{base.model_type}"
    fields = {"model_type": kind, "base_config_class": base, "__module__": __name__, **pickled_as(_config_class, base)}
    return strict(type(f"Gmail{base.__name__}", (VisionFields, base), fields))


@cache
def _tower_class(base: type[PreTrainedModel]) -> type[AttachedTower]:
    names = {"config_class": _config_class(base.config_class), "base_class": base, "__module__": __name__}
    if "add_pooling_layer" in inspect.signature(base.__init__).parameters:
        names["base_kwargs"] = property(lambda self: {"add_pooling_layer": getattr(self, "pooler", None) is not None})
    return type(f"Gmail{base.__name__}", (AttachedTower, base), names | pickled_as(_tower_class, base))
