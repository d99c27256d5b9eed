"""
The two-branch CLIP of GMAIL (Mo & Yun, ICML 2025, section 3).

One frozen CLIP serves every image modality. A branch adds a low-rank update to each linear layer of the vision
encoder and a visual projection of its own. Which branch an image takes is an argument, `modality`, that travels from
the model's methods down to each linear layer as a `route`; no module remembers it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput, image_text_contrastive_loss
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .checkpoints import AdapterMixin
from .configuration_clip import GmailConfig
from .layers import ModalityProjection
from .towers import GmailTextModel, GmailVisionModel, Modality, ModalityMixin, init_branches, reject_unknown


@dataclass
class GmailOutput(ModelOutput):
    """
    What [`GmailCLIPModel`] returns for a batch of pairs: embeddings of what was given, L2-normalised.

    [`gmail_loss`] computes the losses from it.

    Args:
        gen_embeds (`torch.FloatTensor` of shape `(pairs, projection_dim)`, *optional*): generated images through
            `generated_modality`, if given.
        real_embeds (same shape, *optional*): real images through `real`, if given.
        text_embeds (same shape, *optional*): captions, if given.
        gen_tokens, real_tokens (`torch.FloatTensor` of shape `(pairs, tokens, hidden)`, *optional*): patch tokens of
            `token_layer`, not normalised, if asked for.
    """

    gen_embeds: torch.FloatTensor | None = None
    real_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    gen_tokens: torch.FloatTensor | None = None
    real_tokens: torch.FloatTensor | None = None


class GmailCLIPModel(ModalityMixin, AdapterMixin, CLIPModel):
    """
    A CLIP with one image branch for real images and one for generated images (GMAIL, section 3.1 and Figure 2).

    Make one from a pretrained CLIP with [`~GmailCLIPModel.from_clip`]; load a trained one with `from_pretrained`.
    At first every branch equals the pretrained CLIP bit for bit.

    Args:
        config ([`GmailConfig`]): the model's configuration; the weights are random.
    """

    config: GmailConfig
    # The loss is a mean over the pairs of a batch, so the trainer divides it among accumulated batches.
    accepts_loss_kwargs = False
    _no_split_modules = [*CLIPModel._no_split_modules, "GmailEncoderLayer"]

    def __init__(self, config: GmailConfig):
        super().__init__(config)
        # `from_pretrained(..., lora_rank=8)` sets fields on the finished config.
        config.validate_lora()
        config.validate_modalities()
        config.share_fields()
        self.vision_model = GmailVisionModel._from_config(config.vision_config)
        if config.text_lora:
            self.text_model = GmailTextModel._from_config(config.text_config, lora=config)
        self.visual_projection = ModalityProjection(
            self.vision_embed_dim, self.projection_dim, config.trainable_modalities
        )
        self.post_init()
        self.freeze_base()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_branches(self, module)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all adapters: LoRA weights and the branches' projections."""
        for name, parameter in self.named_parameters():
            if ".adapters." in name or ".branches." in name:
                yield name, parameter

    def add_text_lora(self) -> None:
        """
        Put a fresh `text` adapter on the text encoder, for stage 2 on a model whose branches are aligned.

        It has the rank and the scale of the image adapters and changes nothing at first.

        Raises:
            ValueError: there is one already.
        """
        if self.config.text_lora:
            raise ValueError("This model has a `text` adapter already.")
        text_model = GmailTextModel._from_config(self.config.text_config, lora=self.config, dtype=self.dtype)
        text_model.load_state_dict({**text_model.state_dict(), **self.text_model.state_dict()})
        self.text_model = text_model.to(self.device).train(self.training)
        self.config.text_lora = True
        self.freeze_base()

    def trains(self, modality: str) -> bool:
        """Whether a branch has an adapter that is not frozen."""
        branches = self.visual_projection.branches
        return modality in branches and branches[modality].requires_grad

    def train(self, mode: bool = True) -> "GmailCLIPModel":
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_model.parameters()):
            self.vision_model.eval()  # what does not train has no use for dropout
        return self

    def freeze_base(self) -> None:
        """Let only the adapters train, as Algorithm 1 of the paper asks."""
        self.requires_grad_(False)
        for _, parameter in self.adapter_parameters():
            parameter.requires_grad_(True)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        modality: Modality | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        Image embeddings, each image through the branch of its modality.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): normalised images.
            interpolate_pos_encoding (`bool`): allow other image sizes than the pretrained one.
            modality (`str` or a list of `batch` of them, *optional*): default `self.modality`.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` `(batch, projection_dim)` holds the embeddings, not
            normalised, as in `CLIPModel`.

        Raises:
            ValueError, TypeError: as [`GmailVisionModel.forward`].
        """
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, modality=modality, **kwargs
        )
        route = self.vision_model.route(modality, pixel_values)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output, route)
        return outputs

    def embed_images(
        self, pixel_values: torch.Tensor, modality: Modality | None = None, mini_batch_size: int | None = None
    ) -> torch.Tensor:
        """
        L2-normalised image embeddings.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): normalised images.
            modality (`str` or a list of `batch` of them, *optional*): as in [`~GmailCLIPModel.get_image_features`].
            mini_batch_size (`int`, *optional*): images a pass.

        Returns:
            `torch.FloatTensor` of shape `(batch, projection_dim)`.

        Raises:
            ValueError, TypeError: as [`GmailVisionModel.forward`].

        With `mini_batch_size`, images pass in mini-batches whose activations are dropped and computed again in the
        backward pass: a contrastive loss then sees the whole batch at the memory of a mini-batch, with the same
        gradient (the gradient caching of Gao et al., 2021, as activation checkpointing).
        """
        return self._embed(pixel_values, modality, mini_batch_size)[0]

    def _embed(
        self,
        pixel_values: torch.Tensor,
        modality: Modality | None,
        mini_batch_size: int | None,
        token_layer: int | None = None,
        scale: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Embeddings as in [`embed_images`] and, if asked for, patch tokens `(batch, tokens, hidden)` of a layer.

        `scale` is the mean and the standard deviation of uint8 images; a mini-batch normalises its own, so that the
        whole batch never exists as floats.
        """
        if len(pixel_values) == 0:
            embeds = self._no_embeds()
            tokens = (0, self.vision_model.embeddings.num_patches, self.vision_embed_dim)
            return embeds, None if token_layer is None else embeds.new_zeros(tokens) + embeds.sum()
        if mini_batch_size is None or mini_batch_size >= len(pixel_values):
            return self._unit_features(pixel_values, modality, token_layer, scale)
        chunks = []
        for start in range(0, len(pixel_values), mini_batch_size):
            rows = slice(start, start + mini_batch_size)
            names = modality if modality is None or isinstance(modality, str) else modality[rows]
            arguments = pixel_values[rows], names, token_layer, scale
            # The backward pass begins with the last mini-batch: its activations may stay.
            last = start + mini_batch_size >= len(pixel_values)
            chunks.append(
                self._unit_features(*arguments)
                if last
                else checkpoint(self._unit_features, *arguments, use_reentrant=False)
            )
        embeds, tokens = zip(*chunks, strict=True)
        return torch.cat(embeds), None if token_layer is None else torch.cat(tokens)

    def _no_embeds(self) -> torch.Tensor:
        """Embeddings of an empty batch, `(0, projection_dim)`: attention refuses those, DDP wants every gradient."""
        zero = sum(parameter.sum() * 0 for _, parameter in self.adapter_parameters())
        return torch.zeros(0, self.projection_dim, dtype=self.dtype, device=self.device) + zero

    def _unit_features(
        self,
        pixel_values: torch.Tensor,
        modality: Modality | None,
        token_layer: int | None,
        scale: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if scale is not None:
            mean, std = (values[:, None, None] for values in scale)  # (channels, 1, 1)
            pixel_values = pixel_values.float().sub_(mean).div_(std)
        hidden = {"pooled_only": True} if token_layer is None else {"output_hidden_states": True}
        outputs = self.get_image_features(pixel_values, modality=modality, **hidden)
        embeds = nn.functional.normalize(outputs.pooler_output, dim=-1)
        return embeds, None if token_layer is None else outputs.hidden_states[token_layer][:, 1:]

    def embed_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        L2-normalised text embeddings `(texts, projection_dim)` of `input_ids` and `attention_mask`, `(texts, tokens)`.
        """
        if len(input_ids) == 0:
            return self._no_embeds()
        features = self.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return nn.functional.normalize(features.pooler_output, dim=-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        modality: Modality | None = None,
        generated_pixel_values: torch.Tensor | None = None,
        real_pixel_values: torch.Tensor | None = None,
        pixel_mean: torch.FloatTensor | None = None,
        pixel_std: torch.FloatTensor | None = None,
        generated_modality: str = "gen",
        mini_batch_size: int | None = None,
        token_layer: int | None = None,
        **kwargs: Any,
    ) -> CLIPOutput | GmailOutput:
        """
        CLIP's forward with a branch or, without `pixel_values`, the embeddings of a batch of pairs for
        [`gmail_loss`].

        Args:
            input_ids (`torch.LongTensor` of shape `(texts, tokens)`), attention_mask (same shape), position_ids: as in
                `CLIPModel`; one caption per pair, *optional* there.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): as in `CLIPModel`.
            return_loss (`bool`): add CLIP's loss. [`gmail_loss`] computes those of pairs.
            modality (`str` or a list with one per image, *optional*): the branch of `pixel_values`; default
                `self.modality`.
            generated_pixel_values (`torch.FloatTensor` or `torch.ByteTensor` of shape
                `(pairs, channels, height, width)`): generated images, embedded by `generated_modality`.
            real_pixel_values (same shape): their real partners, embedded by `real`.
            pixel_mean, pixel_std (`torch.FloatTensor` of shape `(channels,)`): normalise uint8 images of pairs to
                `(pixels - pixel_mean) / pixel_std`.
            generated_modality (`str`): the branch of generated images.
            mini_batch_size (`int`, *optional*): images of pairs per pass, see [`~GmailCLIPModel.embed_images`].
            token_layer (`int`, *optional*): also return the patch tokens of this element of `hidden_states`.

        Returns:
            `CLIPOutput`, or for pairs [`GmailOutput`]. A branch with no trainable weights runs without gradient.

        Raises:
            ValueError: missing or contradicting inputs, unknown modality, images of another size.
            TypeError: an unknown keyword.
        """
        reject_unknown("GmailCLIPModel.forward()", kwargs)
        pairs = {
            "generated_pixel_values": generated_pixel_values,
            "real_pixel_values": real_pixel_values,
            "input_ids": input_ids,
        }
        if generated_pixel_values is not None or real_pixel_values is not None:
            if pixel_values is not None or modality is not None:
                raise ValueError("Pairs take no `pixel_values` or `modality`: their branches are `gen` and `real`.")
        if pixel_values is None and modality is None and any(values is not None for values in pairs.values()):
            counts = {name: len(values) for name, values in pairs.items() if values is not None}
            if len(set(counts.values())) > 1:
                raise ValueError(f"A batch of pairs needs as many rows of each input, got {counts}.")
            scale = None if pixel_mean is None or pixel_std is None else (pixel_mean, pixel_std)
            gen_embeds, gen_tokens = self._embed_side(
                generated_pixel_values, generated_modality, mini_batch_size, token_layer, scale
            )
            real_embeds, real_tokens = self._embed_side(real_pixel_values, "real", mini_batch_size, token_layer, scale)
            return GmailOutput(
                gen_embeds=gen_embeds,
                real_embeds=real_embeds,
                text_embeds=None if input_ids is None else self.embed_text(input_ids, attention_mask),
                gen_tokens=gen_tokens,
                real_tokens=real_tokens,
            )
        if pixel_values is None or input_ids is None:
            raise ValueError(
                "Specify `input_ids` and `pixel_values`, or `generated_pixel_values` and the like for pairs."
            )
        vision_outputs = self.get_image_features(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, modality=modality, **kwargs
        )
        text_outputs = self.get_text_features(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        # CLIPModel's own arithmetic, so that an untrained branch gives its scores bit for bit.
        image_embeds = (
            vision_outputs.pooler_output / vision_outputs.pooler_output.square().sum(-1, keepdim=True).sqrt()
        )
        text_embeds = text_outputs.pooler_output / text_outputs.pooler_output.square().sum(-1, keepdim=True).sqrt()
        logits_per_text = text_embeds @ image_embeds.t() * self.logit_scale.exp()  # (texts, images)
        return CLIPOutput(
            loss=image_text_contrastive_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )

    def _embed_side(
        self,
        pixel_values: torch.Tensor | None,
        modality: str,
        mini_batch_size: int | None,
        token_layer: int | None,
        scale: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Embeddings and, if asked for, patch tokens of the generated or the real images of a batch; None of none."""
        if pixel_values is None:
            return None, None
        if (pixel_values.dtype == torch.uint8) != (scale is not None):
            raise ValueError(
                f"Images of pairs are {pixel_values.dtype}: uint8 images need `pixel_mean` and `pixel_std`, which "
                "others do not take."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains(modality)):
            return self._embed(pixel_values, modality, mini_batch_size, token_layer, scale)
