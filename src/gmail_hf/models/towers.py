"""
CLIP's encoders with adapters, each on its own: images through the branch that an argument names, captions through the
`text` adapter.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionModelOutput
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ..publishing.hub import adapters_config
from .checkpoints import check_nothing_missing
from .configuration_clip import TEXT_ADAPTER, GmailConfig, GmailVisionConfig
from .layers import LoRAAdapter, ModalityProjection, Route, encoder_layers

Modality = str | Sequence[str]

# The tower alone loads from a whole checkpoint, and from the layout of transformers 4, as CLIPVisionModel does.
register_checkpoint_conversion_mapping("GmailVisionModel", [PrefixChange(prefix_to_remove="vision_model")])


def reject_unknown(method: str, kwargs: dict[str, Any]) -> None:
    """CLIP swallows keywords it does not know; here `modalty="gen"` must not pass for the default branch."""
    known = {*TransformersKwargs.__annotations__, "return_dict", "is_causal", "use_cache"}
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise TypeError(f"{method} got unexpected keyword argument(s) {unknown}.")


class ModalityMixin:
    """The default branch of a model is that of its `vision_model`."""

    @property
    def modality(self) -> str:
        """The branch used where a call names none; `config.default_modality` at first."""
        return self.vision_model.modality

    @modality.setter
    def modality(self, value: str) -> None:
        self.vision_model.modality = value

    def using(self, modality: str):
        """Make `modality` the default branch inside a `with` block."""
        return self.vision_model.using(modality)


class _VisionCheckpoints:
    """Loading a part of a [`GmailCLIPModel`]'s checkpoint."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """
        Load the model from its own checkpoint or from a [`GmailCLIPModel`]'s, whole or adapters alone; arguments as in
        `PreTrainedModel`.

        Raises:
            ValueError: weights are missing; nothing is made up at random.
        """
        with_info = kwargs.pop("output_loading_info", False)
        if config := adapters_config(pretrained_model_name_or_path, kwargs):
            # Auto class: the whole model's module imports this one.
            whole, info = AutoModel.from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **{**kwargs, "config": config}
            )
            model = cls._from_whole(whole).requires_grad_(True)
            model.name_or_path = model.config.name_or_path = whole.name_or_path
            return (model, info) if with_info else model
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **{**kwargs, "use_safetensors": True}
        )
        check_nothing_missing(pretrained_model_name_or_path, info["missing_keys"])
        return (model, info) if with_info else model


class GmailVisionModel(_VisionCheckpoints, CLIPVisionModel):
    """
    The vision encoder of [`GmailCLIPModel`] on its own, without visual projections.

    Args:
        config ([`GmailVisionConfig`]): the encoder's configuration.
    """

    config: GmailVisionConfig
    # Loaded from a whole checkpoint, these are left behind.
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"]
    _no_split_modules = [*CLIPVisionModel._no_split_modules, "GmailEncoderLayer"]

    def __init__(self, config: GmailVisionConfig):
        super().__init__(config)
        self.encoder.layers = encoder_layers(config, config, config.trainable_modalities)
        self.modality = config.default_modality
        self.post_init()

    @classmethod
    def _from_whole(cls, whole: Any) -> "GmailVisionModel":
        return whole.vision_model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LoRAAdapter):
            module.reset_parameters()

    @property
    def modality(self) -> str:
        """The branch used where a call names none."""
        return self._modality

    @modality.setter
    def modality(self, value: str) -> None:
        self.check_modalities([value])
        self._modality = value

    @contextmanager
    def using(self, modality: str) -> Iterator[None]:
        """Make `modality` the default branch inside a `with` block."""
        previous, self.modality = self.modality, modality
        try:
            yield
        finally:
            self.modality = previous

    def check_modalities(self, names: Sequence[str]) -> None:
        unknown = sorted({str(name) for name in names if name not in self.config.modalities})
        if unknown:
            raise ValueError(f"Unknown modality {unknown}; this model's branches are {self.config.modalities}.")

    def route(self, modality: Modality | None, images: torch.Tensor) -> Route:
        """
        What `modality` means to the linear layers, for a batch of `images` of shape `(batch, ...)`.

        Raises:
            ValueError: a name is no branch of this model, or a list has not one name for each image.
            TypeError: neither a name nor a list of names.
        """
        if modality is None:
            modality = self.modality
        if not isinstance(modality, Sequence):
            raise TypeError(f"`modality` is a name or a list of one name an image, got {modality!r}.")
        names = [modality] if isinstance(modality, str) else list(modality)
        self.check_modalities(names)
        if not isinstance(modality, str) and len(names) != len(images):
            raise ValueError(f"`modality` lists {len(names)} branches for a batch of {len(images)} images.")
        adapters = self.config.trainable_modalities
        if len(set(names)) == 1:
            return names[0] if names[0] in adapters else None
        gates = [[float(name == adapter) for adapter in adapters] for name in names]
        return torch.tensor(gates, dtype=self.dtype, device=images.device)  # (batch, adapters)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        modality: Modality | None = None,
        pooled_only: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        Encode images, each through the branch of its modality, in one pass.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): normalised images.
            interpolate_pos_encoding (`bool`): allow other image sizes than the pretrained one.
            modality (`str` or a list of `batch` of them, *optional*): the branch of all, or of each; default
                `self.modality`.
            pooled_only (`bool`): leave out what only the patch tokens of the last layer need; `last_hidden_state` is
                then `(batch, 1, hidden)`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(batch, tokens, hidden)`, `pooler_output`
            `(batch, hidden)`.

        Raises:
            ValueError: unknown modality, a list of another length than the batch, images of another size.
            TypeError: an unknown keyword.
        """
        reject_unknown("GmailVisionModel.forward()", kwargs)
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values.")
        return super().forward(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            route=self.route(modality, pixel_values),
            pooled_only=pooled_only,
            **kwargs,
        )


def init_branches(model: PreTrainedModel, module: nn.Module) -> None:
    """
    The part of `_init_weights` for a model with a `visual_projection`: a branch that no checkpoint filled starts as
    CLIP's own projection, so it is copied again whenever that may have been drawn anew. Inside another model no method
    but `_init_weights` is called on loading.
    """
    branches = getattr(model.visual_projection, "branches", {})  # CLIP's own constructor comes before branches
    if module in (branches, model.visual_projection, model):
        for weight in branches.values():
            init.copy_(weight, model.visual_projection.weight)  # leaves loaded weights alone


class GmailVisionModelWithProjection(ModalityMixin, _VisionCheckpoints, CLIPVisionModelWithProjection):
    """
    The image side of [`GmailCLIPModel`]: the encoder and the branches' projections, without the text encoder.

    Args:
        config ([`GmailVisionConfig`]): the encoder's configuration; `projection_dim` is the embeddings' dimension.
    """

    config: GmailVisionConfig
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]
    _no_split_modules = [*CLIPVisionModelWithProjection._no_split_modules, "GmailEncoderLayer"]

    def __init__(self, config: GmailVisionConfig):
        super().__init__(config)
        self.vision_model = GmailVisionModel._from_config(config)
        self.visual_projection = ModalityProjection(
            config.hidden_size, config.projection_dim, config.trainable_modalities
        )
        self.post_init()

    @classmethod
    def _from_whole(cls, whole: Any) -> "GmailVisionModelWithProjection":
        model = cls._from_config(whole.config.vision_config, dtype=whole.dtype)
        model.vision_model, model.visual_projection = whole.vision_model, whole.visual_projection
        return model.train(whole.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_branches(self, module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        modality: Modality | None = None,
        **kwargs: Any,
    ) -> CLIPVisionModelOutput:
        """
        Image embeddings; arguments and errors as in [`GmailVisionModel.forward`].

        Returns:
            `CLIPVisionModelOutput`: `image_embeds` `(batch, projection_dim)`, not normalised, and the encoder's own.
        """
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, modality=modality, **kwargs
        )
        route = self.vision_model.route(modality, pixel_values)
        return CLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output, route),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GmailTextModel(CLIPTextModel):
    """CLIP's text encoder with a LoRA adapter that is always on: the `text` adapter of stage 2."""

    def __init__(self, config: CLIPTextConfig, lora: GmailConfig):
        super().__init__(config)
        self.encoder.layers = encoder_layers(config, lora, [TEXT_ADAPTER])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LoRAAdapter):
            module.reset_parameters()

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return super().forward(*args, route=TEXT_ADAPTER, **kwargs)
