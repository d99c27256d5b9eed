"""
A pretrained model with branches on its vision tower: what all bases share (GMAIL, section 3).

Every method that encodes images takes `modality`, which selects the branch of each image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ..branches.attach import attach_to_text, attach_to_tower
from ..branches.peft_folders import adapter_tensors, changes_base
from ..branches.routing import BranchedLinear, BranchedModule, branch_head, routed
from ..branches.tower import (
    BranchedTower,
    Modality,
    adapter_of,
    init_adapters,
    is_adapter_weight,
    keywords_of,
    reject_unknown,
)
from .auto_modality import AutoModality, is_auto
from .packing import unpadded

SIDES = {"generated": "gen", "real": "real"}
ONLY_PAIRS = "Pairs take no `pixel_values` and no `modality`: their branches are `gen` and `real`."
TEXT_PARTS = ("text_model", "text_projection", "logit_scale", "logit_bias")  # parts that image embeddings do not need


@dataclass
class GmailOutput(ModelOutput):
    """
    The output for a batch of pairs. Embeddings are L2-normalised and only those of this process.

    Args:
        gen_embeds (`torch.FloatTensor` of shape `(pairs, dim)`, *optional*): generated images through their branch, if
            given.
        real_embeds (same shape, *optional*): real images through `real`, if given.
        text_embeds (same shape, *optional*): captions, if given.
        gen_tokens, real_tokens (`torch.FloatTensor` of shape `(pairs, tokens, hidden)`, *optional*): patch tokens, if
            `token_layer` is given.
    """

    gen_embeds: torch.FloatTensor | None = None
    real_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    gen_tokens: torch.FloatTensor | None = None
    real_tokens: torch.FloatTensor | None = None


class ModalityMixin:
    """Mixin for a model whose default branch is that of its vision tower."""

    tower_name = "vision_model"

    @property
    def tower(self) -> BranchedTower:
        """The vision tower."""
        return self.get_submodule(self.tower_name)  # the model itself for ""

    @property
    def modality(self) -> str:
        """The branch used if a call passes no `modality`; initially `config.default_modality`."""
        return self.tower.modality

    @modality.setter
    def modality(self, value: str) -> None:
        self.tower.modality = value

    def using(self, modality: str):
        """Make `modality` the default branch inside a `with` block."""
        return self.tower.using(modality)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.tower.parameters()):
            self.tower.eval()  # no dropout in a frozen tower
        return self


class GmailModel(AutoModality, ModalityMixin):
    """
    Mixin for a model with branches.

    A base defines `tower_name`, the name of its vision tower; `head_name`, the name of the module that computes the
    pooled embedding, None if there is none; `prefix_tokens`, the number of tokens before the patches; and
    `tower_class`, the class of the tower with branches.
    """

    head_name: str | None
    tower_class: type[nn.Module] | None = None
    prefix_tokens = 0
    base_kwargs: dict[str, Any] = {}  # arguments of the base's constructor
    accepts_loss_kwargs = False
    # Half precision would lose small steps; the base may have any precision.
    _keep_in_fp32_modules_strict = {"adapters", "branches"}

    def __init__(self, config: PreTrainedConfig, **kwargs: Any):
        super().__init__(config, **{**self.base_kwargs, **kwargs})
        self.attach()

    def attach(self) -> None:
        """Add fresh branches to this model according to its configuration; called once."""
        config, fields = self.config, self.tower.config
        # `from_pretrained(..., lora_rank=8)` sets fields on the finished configuration.
        config.validate_lora()
        config.validate_modalities()
        config.share_fields()
        plain = super()
        self.method_keywords = {
            name: keywords_of(getattr(plain, name))
            for name in ("forward", "get_image_features")
            if hasattr(plain, name)
        }
        attach_to_tower(self.tower, fields, self.tower_class)
        config.lora_targets = fields.lora_targets
        if self.head_name is not None and config.head == "own":
            branch_head(self.get_submodule(self.head_name), config.trainable_modalities)
        if getattr(config, "text_lora", False):
            attach_to_text(self.text_model, config)
        self.freeze_base()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_branches(self, module)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all adapters: LoRA weights and the branches' heads."""
        for name, parameter in self.named_parameters():
            if is_adapter_weight(name):
                yield name, parameter

    def add_text_lora(self) -> None:
        """
        Add a fresh `text` adapter to the text encoder, for stage 2 on a model with aligned branches.

        It has the rank and the scale of the image adapters, and is initially zero.

        Raises:
            ValueError: there is no text encoder, or it already has an adapter.
        """
        if getattr(self, "text_model", None) is None:
            raise ValueError(f"{type(self).__name__} has no text encoder, so it takes no `text` adapter.")
        if self.config.text_lora:
            raise ValueError("This model already has a `text` adapter.")
        attach_to_text(self.text_model, self.config)
        self.config.text_lora = True
        self.freeze_base()

    def remove_text_encoder(self):
        """
        Remove the text encoder, for a model that only needs image embeddings. A vision-only model has none.

        Returns:
            This model.
        """
        for name in TEXT_PARTS:
            if hasattr(self, name):
                delattr(self, name)
        return self

    def trains(self, modality: str) -> bool:
        """Whether a branch has parameters that train."""
        return any(
            parameter.requires_grad for name, parameter in self.named_parameters() if adapter_of(name) == modality
        )

    def is_base(self, modality: str) -> bool:
        """Whether a branch equals the pretrained model: it has no adapter, or an untrained one."""
        return modality not in self.config.trainable_modalities or not changes_base(
            self, adapter_tensors(self, modality)
        )

    def freeze_base(self) -> None:
        """Train only the adapters, as in Algorithm 1 of the paper."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_adapter_weight(name))

    after_loading = freeze_base

    def get_image_features(self, pixel_values: torch.Tensor, *args: Any, modality: Modality | None = None, **kwargs):
        """
        Image embeddings, with each image through the branch of its modality.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): normalised images.
            modality (`str` or a list with one name per image, *optional*): defaults to `self.modality`. With
                `"auto"` a detector decides, see [`~GmailCLIPModel.detect_modality`].
            args, kwargs: the arguments of the base's `get_image_features`, and for `modality="auto"` a `threshold`,
                0.5 by default.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(batch, dim)` holds the embeddings, not normalised, as in
            the base. With `modality="auto"` [`AutoModalityOutput`], which holds the decisions.

        Raises:
            ValueError: unknown modality, the length of the list differs from the batch size, images of the wrong size,
                or `modality="auto"` without a detector or in training mode.
            TypeError: an unknown keyword.
        """
        if is_auto(modality):
            return self.auto_features(pixel_values, *args, **kwargs)
        reject_unknown(
            f"{type(self).__name__}.get_image_features()", self.method_keywords["get_image_features"], kwargs
        )
        route = self.tower.route(modality, pixel_values)
        return routed(route, super().get_image_features, pixel_values, *args, **kwargs)

    def embed_images(
        self,
        pixel_values: torch.Tensor,
        modality: Modality | None = None,
        mini_batch_size: int | None = None,
        **images: torch.Tensor,
    ) -> torch.Tensor:
        """
        L2-normalised image embeddings.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): normalised images.
            modality (`str` or a list with one name per image, *optional*): as in `get_image_features`, which
                also returns the decisions of `"auto"`.
            mini_batch_size (`int`, *optional*): images per forward pass. The activations of a mini-batch are dropped
                and recomputed in the backward pass, so a contrastive loss over the complete batch needs the memory of
                a mini-batch, with the same gradient (gradient caching, Gao et al., 2021, as activation checkpointing).
            images: other image inputs of the base, such as SigLIP 2's `spatial_shapes`, one row per image.

        Returns:
            `torch.FloatTensor` of shape `(batch, dim)`.

        Raises:
            ValueError, TypeError: as in `get_image_features`.
        """
        return self._embed(pixel_values, modality, mini_batch_size, **images)[0]

    def _embed(
        self,
        pixel_values: torch.Tensor,
        modality: Modality | None,
        mini_batch_size: int | None = None,
        token_layer: int | None = None,
        **images: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings as in [`embed_images`] and, with `token_layer`, its patch tokens `(batch, tokens, hidden)`."""
        if len(pixel_values) == 0:  # attention refuses an empty batch, and DDP needs every gradient
            tokens = None if token_layer is None else self._empty(1, self.tower.config.hidden_size)
            return self._empty(self.embed_dim), tokens
        if mini_batch_size is None or mini_batch_size >= len(pixel_values):
            return self._unit_features(pixel_values, modality, token_layer, images)
        if modality is None:  # the recomputation may take place outside of a `using` block
            modality = self.modality
        chunks = []
        for start in range(0, len(pixel_values), mini_batch_size):
            rows = slice(start, start + mini_batch_size)
            names = modality if isinstance(modality, str) else modality[rows]
            chunk = {name: values[rows] if values.dim() > 1 else values for name, values in images.items()}
            arguments = pixel_values[rows], names, token_layer, chunk
            # The backward pass begins with the last mini-batch, so its activations are kept.
            last = start + mini_batch_size >= len(pixel_values)
            chunks.append(
                self._unit_features(*arguments)
                if last
                else checkpoint(self._unit_features, *arguments, use_reentrant=False)
            )
        embeds, tokens = zip(*chunks, strict=True)
        return torch.cat(embeds), None if token_layer is None else torch.cat(tokens)

    def _empty(self, *size: int) -> torch.Tensor:
        """A tensor of shape `(0, *size)` that gives every adapter a zero gradient."""
        zero = sum(parameter.sum() * 0 for _, parameter in self.adapter_parameters())
        return torch.zeros(0, *size, dtype=self.dtype, device=self.device) + zero

    @property
    def embed_dim(self) -> int:
        """The dimension of embeddings."""
        return self.config.projection_dim

    def _unit_features(
        self,
        pixel_values: torch.Tensor,
        modality: Modality | None,
        token_layer: int | None,
        images: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if pixel_values.dtype == torch.uint8:
            images = dict(images)  # a recomputation needs the original
            mean, std = images.pop("pixel_mean"), images.pop("pixel_std")
            pixel_values = normalise(pixel_values, mean, std, self.dtype)
        if token_layer is None:
            return nn.functional.normalize(self.pooled(pixel_values, modality, **images), dim=-1), None
        outputs = self.get_image_features(pixel_values, modality=modality, output_hidden_states=True, **images)
        tokens = outputs.hidden_states[token_layer][:, self.prefix_tokens :]
        if (mask := images.get("pixel_attention_mask")) is not None:  # padded patches
            tokens = unpadded(tokens, mask.sum(dim=-1), mask.bool())
        return nn.functional.normalize(outputs.pooler_output, dim=-1), tokens

    def pooled(
        self, pixel_values: torch.Tensor, modality: Modality | None = None, **images: torch.Tensor
    ) -> torch.Tensor:
        """Image embeddings `(batch, dim)`, not normalised; arguments and errors as in [`~GmailModel.embed_images`]."""
        return self.get_image_features(pixel_values, modality=modality, **images).pooler_output

    def embed_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """L2-normalised text embeddings `(texts, dim)` of `input_ids` and `attention_mask`, `(texts, tokens)`."""
        if len(input_ids) == 0:
            return self._empty(self.embed_dim)
        features = self.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return nn.functional.normalize(features.pooler_output, dim=-1)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        modality: Modality | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        The base's forward pass through a branch or, with images of pairs, their embeddings for [`gmail_loss`].

        Args:
            input_ids (`torch.LongTensor` of shape `(texts, tokens)`), attention_mask (same shape): captions; one per
                pair for pairs.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): as in the base.
            modality (`str` or a list with one name per image, *optional*): the branch of `pixel_values`; defaults to
                `self.modality`. Not allowed for pairs.
            generated_pixel_values (`torch.Tensor` of shape `(pairs, channels, height, width)`): generated images,
                either normalised, or uint8 with `pixel_mean` and `pixel_std`.
            real_pixel_values (same shape): their real partners. One of the two may be missing.
            generated_modality (`str`): the branch for generated images.
            mini_batch_size (`int`, *optional*): see [`~GmailModel.embed_images`].
            token_layer (`int`, *optional*): also return the patch tokens in this element of `hidden_states`.
            pixel_mean, pixel_std (`torch.FloatTensor` of shape `(channels,)`): mean and standard deviation for uint8
                images, in units of their pixels.
            kwargs: other arguments of the base's `forward`. For pairs, other inputs of images have the prefix
                `generated_` or `real_`.

        Returns:
            The base's output, or [`GmailOutput`] for pairs. Branches that do not train are computed without gradient.

        Raises:
            ValueError: missing or contradictory inputs, unknown modality, or images of the wrong size.
            TypeError: an unknown keyword.
        """
        if not takes_pairs(kwargs) and (input_ids is None or pixel_values is not None or modality is not None):
            reject_unknown(f"{type(self).__name__}.forward()", self.method_keywords["forward"], kwargs)
            if pixel_values is None or input_ids is None:
                raise ValueError(
                    "Pass `input_ids` and `pixel_values`, or `generated_pixel_values` and `real_pixel_values` "
                    "for pairs."
                )
            route = self.tower.route(modality, pixel_values)
            inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
            return routed(route, super().forward, **inputs, **kwargs)
        if pixel_values is not None or modality is not None:
            raise ValueError(ONLY_PAIRS)
        return self._embed_pairs(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def _embed_pairs(
        self,
        generated_pixel_values: torch.Tensor | None = None,
        real_pixel_values: torch.Tensor | None = None,
        generated_modality: str = "gen",
        mini_batch_size: int | None = None,
        token_layer: int | None = None,
        pixel_mean: torch.Tensor | None = None,
        pixel_std: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **images: torch.Tensor,
    ) -> GmailOutput:
        """Embed a batch of pairs; arguments as in [`forward`]. All inputs need the same number of rows."""
        rows = {"generated": generated_pixel_values, "real": real_pixel_values, "input_ids": input_ids}
        scale = pixel_mean, pixel_std
        extra = {side: _take_prefixed(images, f"{side}_") for side in SIDES}
        reject_unknown(f"{type(self).__name__}.forward()", self.method_keywords["forward"], images)
        counts = {
            name if name == "input_ids" else f"{name}_pixel_values": len(values)
            for name, values in rows.items()
            if values is not None
        }
        if len(set(counts.values())) > 1:
            raise ValueError(f"A batch of pairs needs the same number of rows in each input, got {counts}.")
        output = GmailOutput()
        for side, short in SIDES.items():
            pixels = rows[side]
            if pixels is None:
                continue
            if (pixels.dtype == torch.uint8) != all(values is not None for values in scale):
                raise ValueError(
                    f"The images of pairs are {pixels.dtype}: uint8 images need `pixel_mean` and `pixel_std`, other "
                    "images do not take them."
                )
            if pixels.dtype == torch.uint8:
                extra[side] |= dict(zip(("pixel_mean", "pixel_std"), scale, strict=True))
            branch = generated_modality if side == "generated" else "real"
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains(branch)):
                embeds, tokens = self._embed(pixels, branch, mini_batch_size, token_layer, **extra[side])
            output[f"{short}_embeds"] = embeds
            if tokens is not None:
                output[f"{short}_tokens"] = tokens
        if input_ids is not None:
            output["text_embeds"] = self.embed_text(input_ids, attention_mask)
        return output


def takes_pairs(kwargs: dict[str, Any]) -> bool:
    """Whether keywords of `forward` contain images of pairs. Such keywords with None are removed."""
    names = [f"{side}_pixel_values" for side in SIDES]
    for name in names:
        if name in kwargs and kwargs[name] is None:
            del kwargs[name]
    return any(name in kwargs for name in names)


def init_branches(model: Any, module: nn.Module) -> None:
    """The part of `_init_weights` of `model` for a module with branches."""
    init_adapters(module)
    # A branch that is not in the checkpoint starts as the base's head. It is copied again whenever the head may have
    # been initialised again. Inside another model, loading calls only `_init_weights`.
    head = model.get_submodule(model.head_name) if model.head_name else None
    if isinstance(head, (BranchedLinear, BranchedModule)) and (module is model or module in head.modules()):
        init_adapters(head)


def text_options(model: Any) -> dict[str, Any]:
    """
    Tokenizer arguments for the captions of a model, with or without branches: `padding`, `truncation`, `max_length`.

    The model's context length overrides the tokenizer's limit, which is still 77 for long-context CLIPs. SigLIP is
    trained on captions padded to the context length, and pools the last position.
    """
    padding = "max_length" if "siglip" in model.config.model_type else True
    return {"padding": padding, "truncation": True, "max_length": context_length(model)}


def context_length(model: Any) -> int:
    """The maximum number of text tokens of a model."""
    return model.config.text_config.max_position_embeddings


def _take_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): kwargs.pop(name) for name in list(kwargs) if name.startswith(prefix)}


def normalise(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Normalise 8-bit pixels as the image processor does, on their device.

    Args:
        pixels (`torch.ByteTensor` of shape `(images, channels, height, width)`).
        mean, std (`torch.FloatTensor` of shape `(channels,)`): in units of the pixels.
        dtype: the dtype of the result.
    """
    mean, std = (values.to(pixels.device, torch.float32).view(-1, 1, 1) for values in (mean, std))
    return pixels.float().sub_(mean).div_(std).to(dtype)
