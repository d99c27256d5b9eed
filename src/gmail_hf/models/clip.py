"""
The two-branch CLIP of GMAIL (Mo & Yun, ICML 2025, section 3).

All modalities share one frozen CLIP. A branch adds a low-rank update to each linear layer of the vision encoder, and
has its own visual projection.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from ..branches.attach import attach_to_tower
from ..branches.peft_folders import has_adapter, read_adapter, write_adapter
from ..branches.routing import branch_head, routed
from ..branches.tower import BranchedTower, Modality
from ..publishing.hub import hub_kwargs
from .auto_modality import is_auto
from .base import GmailModel, ModalityMixin, init_branches
from .checkpoints import GmailCheckpoints, adopt
from .configuration_clip import GmailConfig, GmailVisionConfig
from .loading import StrictLoading, adapter_files, adapters_config, base_arguments, missing_adapter

# Like CLIPVisionModel, the tower loads from a complete checkpoint, and from the layout of transformers 4.
register_checkpoint_conversion_mapping("GmailVisionModel", [PrefixChange(prefix_to_remove="vision_model")])


class _VisionLoading(StrictLoading):
    """Load the image encoder from a [`GmailCLIPModel`]'s checkpoint, complete or only with adapters."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """
        Load the model from its own checkpoint or from a [`GmailCLIPModel`]'s, complete or only with adapters;
        arguments as in `PreTrainedModel`.

        Raises:
            ValueError, OSError: weights are missing. No weights are initialised at random.
        """
        config = adapters_config(pretrained_model_name_or_path, kwargs, GmailConfig)
        if config is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        base, arguments = base_arguments(pretrained_model_name_or_path, config, kwargs)
        arguments |= {"config": config.vision_config.plain(), "use_safetensors": True}
        plain, info = CLIPVisionModelWithProjection.from_pretrained(base, output_loading_info=True, **arguments)
        whole = adopt(plain, GmailVisionModelWithProjection, config.vision_config)
        for name in config.modalities:
            if not has_adapter(whole, name):
                continue
            files = adapter_files(pretrained_model_name_or_path, name, **hub_kwargs(kwargs))
            if files is None:
                raise missing_adapter(pretrained_model_name_or_path, name)
            write_adapter(whole, name, read_adapter(whole, name, *files))
        model = whole if cls is GmailVisionModelWithProjection else whole.vision_model
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model, info) if with_info else model


class GmailVisionModel(BranchedTower, _VisionLoading, CLIPVisionModel):
    """
    The vision encoder of [`GmailCLIPModel`] on its own, without visual projections.

    Args:
        config ([`GmailVisionConfig`]): the encoder's configuration.
    """

    config: GmailVisionConfig
    # Not loaded from a complete checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"]
    _keep_in_fp32_modules_strict = {"adapters", "branches"}

    def __init__(self, config: GmailVisionConfig):
        super().__init__(config)
        attach_to_tower(self, config)

    def pooled(self, pixel_values: torch.Tensor, modality: Modality | None = None) -> torch.Tensor:
        """
        Only the pooled output, without the computations for the patch tokens of the last layer.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): normalised images.
            modality: as in `forward`.

        Returns:
            `torch.FloatTensor` of shape `(images, hidden)`.
        """
        return routed(self.route(modality, pixel_values), self._pooled, pixel_values)

    def _pooled(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        *layers, last = self.encoder.layers
        for layer in layers:
            hidden_states = layer(hidden_states, None)
        return self.post_layernorm(class_token(last, hidden_states)[:, 0])


def class_token(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The output of a CLIP encoder layer for the class token `(images, 1, hidden)`, which attends to all tokens."""
    attention, tokens = layer.self_attn, layer.layer_norm1(hidden_states)  # (images, tokens, hidden)
    heads = (len(tokens), -1, attention.num_heads, attention.head_dim)
    query = attention.q_proj(tokens[:, :1].contiguous()).view(heads).transpose(1, 2)
    key = attention.k_proj(tokens).view(heads).transpose(1, 2)
    value = attention.v_proj(tokens).view(heads).transpose(1, 2)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    dropout = attention.dropout if layer.training else 0.0
    output, _ = attend(attention, query, key, value, None, scaling=attention.scale, dropout=dropout)
    state = hidden_states[:, :1] + attention.out_proj(output.flatten(2).contiguous())
    return state + layer.mlp(layer.layer_norm2(state))


class GmailVisionModelWithProjection(ModalityMixin, _VisionLoading, CLIPVisionModelWithProjection):
    """
    The image encoder of [`GmailCLIPModel`] with the branches' projections, without the text encoder.

    Args:
        config ([`GmailVisionConfig`]): the encoder's configuration; `projection_dim` is the embeddings' dimension.
    """

    config: GmailVisionConfig
    head_name = "visual_projection"
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]
    _keep_in_fp32_modules_strict = {"adapters", "branches"}

    def __init__(self, config: GmailVisionConfig):
        super().__init__(config)
        self.attach()

    def attach(self) -> None:
        attach_to_tower(self.vision_model, self.config, GmailVisionModel)
        if self.config.head == "own":
            branch_head(self.visual_projection, self.config.trainable_modalities)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_branches(self, module)

    def forward(
        self, pixel_values: torch.Tensor | None = None, modality: Modality | None = None, **kwargs: Any
    ) -> Any:
        """
        Image embeddings; arguments and errors as in [`GmailVisionModel.forward`].

        Returns:
            `CLIPVisionModelOutput`: `image_embeds` `(batch, projection_dim)`, not normalised, and the encoder's
            output.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values.")
        return routed(self.tower.route(modality, pixel_values), super().forward, pixel_values, **kwargs)

    @property
    def embed_dim(self) -> int:
        """The dimension of embeddings."""
        return self.config.projection_dim

    def pooled(self, pixel_values: torch.Tensor, modality: Modality | None = None, **kwargs: Any) -> torch.Tensor:
        """The `image_embeds` of `forward`."""
        return self(pixel_values, modality=modality, **kwargs).image_embeds


class GmailCLIPModel(GmailModel, GmailCheckpoints, CLIPModel):
    """
    A CLIP with one image branch for real images and one for generated images (GMAIL, section 3.1 and Figure 2).

    Create one from a pretrained CLIP with `from_base`, and load a trained one with `from_pretrained`. At first every
    branch equals the pretrained CLIP, bit for bit.

    Args:
        config ([`GmailConfig`]): the model's configuration. The weights are initialised at random.
    """

    config: GmailConfig
    base_class = CLIPModel
    tower_class = GmailVisionModel
    head_name = "visual_projection"
    prefix_tokens = 1
    _without_branches = "If it is a plain CLIP, add fresh adapters with `GmailCLIPModel.from_base`."

    @classmethod
    def from_clip(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "GmailCLIPModel":
        """The same as `from_base`."""
        return cls.from_base(pretrained_model_name_or_path, **kwargs)

    def to_clip(self, modality: str) -> CLIPModel:
        """The same as `to_base`."""
        return self.to_base(modality)

    def pooled(
        self, pixel_values: torch.Tensor, modality: Modality | None = None, **images: torch.Tensor
    ) -> torch.Tensor:
        if images or is_auto(modality):  # which also refuses unknown keywords
            return super().pooled(pixel_values, modality, **images)

        def embed() -> torch.Tensor:
            return self.visual_projection(self.vision_model.pooled(pixel_values))

        return routed(self.vision_model.route(modality, pixel_values), embed)


AutoConfig.register("gmail_clip", GmailConfig)
AutoConfig.register("gmail_clip_vision_model", GmailVisionConfig)
AutoModel.register(GmailConfig, GmailCLIPModel)
AutoModel.register(GmailVisionConfig, GmailVisionModel)
AutoModelForZeroShotImageClassification.register(GmailConfig, GmailCLIPModel)
AutoProcessor.register(GmailConfig, CLIPProcessor)
AutoTokenizer.register(GmailConfig, CLIPTokenizer)
