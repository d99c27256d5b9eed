"""
The base class of captioners on a model with branches: a causal language model continues a prefix of token embeddings.

They train on f_g(generated) and serve f_r(real photograph): stages 2 and 3 of GMAIL's Algorithm 1.
"""

import copy
import math
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import can_return_tuple

from ..branches.tower import Modality, keywords_of, reject_unknown
from ..models.base import ModalityMixin
from ..models.image_encoder import image_encoder_config, load_image_encoder, new_image_encoder
from ..models.loading import StrictLoading, check_nothing_missing
from ..publishing.provenance import name_publicly
from .configuration_captioner import CaptionerConfig
from .mapping import MAPPERS, TransformerMapper

MAX_NEW_TOKENS = 64  # default if the language model's generation config has none
KEYWORDS = keywords_of(PreTrainedModel.forward)  # keywords of every model of transformers
# Inputs of image encoders next to `pixel_values`; an encoder refuses those it does not know.
IMAGE_KEYWORDS = ("interpolate_pos_encoding", "pixel_attention_mask", "spatial_shapes")
IGNORED = -100  # the label that the loss ignores


class Captioner(ModalityMixin, StrictLoading, PreTrainedModel, GenerationMixin):
    """
    An image encoder with branches, a mapping network and a causal language model.

    Create one with [`~Captioner.from_vision_text_pretrained`], and load a trained one with `from_pretrained`. Image
    embeddings are L2-normalised before the mapping network, because the branches are aligned only on the unit sphere.
    They are then scaled by the square root of their dimension, because linear layers are initialised for entries of
    that size.

    The image encoder is frozen and in evaluation mode, also in training.

    Args:
        config ([`CaptionerConfig`]): the model's configuration.
        vision_model (`PreTrainedModel`, *optional*): the image encoder, a [`GmailVisionModelWithProjection`] for CLIP,
            otherwise a model with branches, without its text encoder; by default a random one with
            `config.vision_config`.
        text_model (`PreTrainedModel`, *optional*): the causal language model; by default a random one with
            `config.text_config`.
    """

    config: CaptionerConfig
    prefix_keywords: tuple[str, ...] = ()  # keywords of `forward` that are passed to `make_prefix`
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: CaptionerConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        # For a loss that does not shift labels, because the first caption token is predicted from the prefix. The
        # Trainer counts the tokens in `labels` accordingly.
        self.loss_type = "ForMaskedLM"
        self.vision_model = vision_model or new_image_encoder(config.vision_config)
        self.text_model = text_model or AutoModelForCausalLM.from_config(config.text_config)
        hidden = self.text_model.get_input_embeddings().weight.shape[1]
        mapper = MAPPERS[config.mapping_type](config, self.vision_model.embed_dim, hidden)
        self.mapping_network = mapper.to(self.text_model.dtype)
        self.generation_config = caption_generation_config(self.text_model.generation_config)
        self.post_init()
        self.vision_model.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only called for the mapping network. As in ClipCap, it has torch's default scale, which depends on the width,
        # instead of transformers' constant 0.02.
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, TransformerMapper):
            init.normal_(module.prefix_const)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | os.PathLike,
        text_model_name_or_path: str | os.PathLike,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        **fields: Any,
    ) -> "Captioner":
        """
        Connect a trained image encoder to a pretrained language model by a fresh mapping network.

        Args:
            vision_model_name_or_path: a Hub id or folder of a model with branches, such as a [`GmailCLIPModel`],
                [`GmailSiglipModel`] or [`GmailDinov2Model`], whose image encoder is used.
            text_model_name_or_path: a Hub id or folder of a causal language model.
            vision_revision, text_revision (`str`, *optional*): their revisions on the Hub.
            dtype, attn_implementation: as in `PreTrainedModel.from_pretrained`. A checkpoint has one dtype: if those
                of the parts differ, all get the language model's.
            fields: fields of the configuration, such as `prefix_length`.

        Raises:
            ValueError: the image encoder has no branches, a checkpoint lacks weights, or a field is unknown.
            huggingface_hub.errors.StrictDataclassClassValidationError: a field is out of range, the language model is
                not causal, or an IFCap gets an image encoder without a text encoder.
        """
        cls.config_class.check_fields(list(fields))
        vision_config = image_encoder_config(vision_model_name_or_path, vision_revision)
        text_config = AutoConfig.from_pretrained(text_model_name_or_path, revision=text_revision)
        config = cls.config_class(vision_config=vision_config, text_config=text_config, **fields)
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        vision_model = load_image_encoder(
            vision_model_name_or_path, vision_config, revision=vision_revision, **options
        )
        text_model, info = AutoModelForCausalLM.from_pretrained(
            text_model_name_or_path, revision=text_revision, output_loading_info=True, use_safetensors=True, **options
        )
        check_nothing_missing(text_model_name_or_path, info["missing_keys"])
        config.vision_config, config.text_config = vision_model.config, text_model.config
        name_publicly(config)
        return cls(config, vision_model.to(text_model.dtype), text_model).eval()

    def after_loading(self) -> None:
        self.vision_model.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.text_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_output_embeddings(value)

    def freeze_text_model(self) -> None:
        """Train only the mapping network. The language model is frozen and has no dropout."""
        self.text_model.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Captioner":
        super().train(mode)
        # No dropout in frozen parts, which could not adapt to it.
        for module in (self.vision_model, self.text_model):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def get_prefix_embeds(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        modality: Modality | None = None,
        **images: Any,
    ) -> torch.Tensor:
        """
        The prefix of each image as token embeddings `(batch, prefix_length, hidden)`.

        Arguments and errors as in [`~Captioner.forward`].
        """
        image_embeds = self._image_embeds(pixel_values, image_embeds, modality, images)
        return self.make_prefix(image_embeds)[0][:, : self.config.prefix_length]

    def make_prefix(self, image_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The input that the language model continues.

        Args:
            image_embeds (`torch.Tensor` of shape `(batch, embed_dim)`): image embeddings, which need not be
                normalised.

        Returns:
            Token embeddings `(batch, tokens, hidden)`, the first `prefix_length` from the mapping network, and their
            mask `(batch, tokens)`, 0 on padding; None if there is no padding.
        """
        return self.mapping_network(self._scaled(image_embeds)), None

    def _scaled(self, embeds: torch.Tensor) -> torch.Tensor:
        """Scale embeddings for the mapping network."""
        embeds = nn.functional.normalize(embeds.float(), dim=-1) * math.sqrt(embeds.shape[-1])
        return embeds.to(self.text_model.dtype)

    def _image_embeds(
        self,
        pixel_values: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        modality: Modality | None,
        images: dict[str, Any],
    ) -> torch.Tensor:
        """Image embeddings `(batch, embed_dim)`, given or computed."""
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("Pass either `pixel_values` or `image_embeds`.")
        dim = self.vision_model.embed_dim
        if image_embeds is None:
            if isinstance(modality, str):  # a captioner has no detector for "auto"
                self.vision_model.tower.check_modalities([modality])
            image_embeds = self.vision_model.pooled(pixel_values, modality, **images)
        elif modality is not None:
            raise ValueError("`image_embeds` already come from a branch: `modality` is only for `pixel_values`.")
        elif image_embeds.ndim != 2 or image_embeds.shape[1] != dim:
            raise ValueError(
                f"`image_embeds` has shape {tuple(image_embeds.shape)}; this model needs (batch, {dim}), the "
                "embeddings of its image encoder."
            )
        return image_embeds

    def _room(self, prefix: torch.Tensor) -> int | None:
        """The maximum number of caption tokens after a prefix; None if the context has no limit."""
        context = self.config.context_length
        return None if context is None else context - prefix.shape[1]

    def _inputs(
        self,
        prefix: torch.Tensor,
        prefix_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The language model's `inputs_embeds` and `attention_mask` for prefix and tokens."""
        if prefix_mask is None:
            prefix_mask = prefix.new_ones(prefix.shape[:2], dtype=torch.long)
        if input_ids is None or input_ids.shape[1] == 0:
            return {"inputs_embeds": prefix, "attention_mask": prefix_mask}
        if len(input_ids) != len(prefix):
            raise ValueError(f"{len(prefix)} images, but {len(input_ids)} rows of `input_ids`.")
        room = self._room(prefix)
        if room is not None and input_ids.shape[1] > room:
            raise ValueError(
                f"`input_ids` has {input_ids.shape[1]} tokens, but after the prefix of {prefix.shape[1]} the language "
                f"model's context has room for {room}. Truncate: `CaptionCollator(tokenizer, max_length={room})`."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        tokens = self.get_input_embeddings()(input_ids)  # (batch, tokens, hidden)
        return {
            "inputs_embeds": torch.cat([prefix.to(tokens.dtype), tokens], dim=1),
            "attention_mask": torch.cat([prefix_mask.to(attention_mask.dtype), attention_mask], dim=1),
        }

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        modality: Modality | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """
        Score captions of images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`): normalised images.
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): captions, each with its end-of-text
                token, padded on the right.
            attention_mask (same shape, *optional*): 0 on padding; defaults to ones.
            labels (same shape, *optional*): `input_ids` with -100 on padding, see [`CaptionCollator`].
            image_embeds (`torch.FloatTensor` of shape `(batch, embed_dim)`): precomputed embeddings from one of the
                branches, instead of `pixel_values`. They are L2-normalised here.
            modality (`str` or a list with one name per image, *optional*): the branch for `pixel_values`; defaults to
                `self.modality`, which is initially `"real"`.
            kwargs: other inputs of the image encoder: `interpolate_pos_encoding` (`bool`), to allow other image sizes
                than the pretrained one, and `pixel_attention_mask` and `spatial_shapes` of a [`GmailSiglip2Model`].

        Returns:
            `CausalLMOutput`: `logits` `(batch, prefix + tokens, vocabulary)` for the next token at each position, with
            padding last, and with `labels` the `loss`, the mean cross-entropy of the caption tokens (ClipCap, Eq. 2).

        Raises:
            ValueError: both images and embeddings or neither; embeddings of the wrong dimension; `modality` with
                embeddings, unknown or with a length that differs from the batch size; labels and tokens of different
                shapes; more tokens than the language model's context has room for; `use_cache=True`.
            TypeError: an unknown keyword.
        """
        own, images = _take(self.prefix_keywords, kwargs), _take(IMAGE_KEYWORDS, kwargs)
        reject_unknown(f"{type(self).__name__}.forward()", KEYWORDS, kwargs)
        if kwargs.pop("use_cache", None):
            raise ValueError("`use_cache=True` is not supported: forward() returns no cache, generate() has its own.")
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"`labels` has shape {tuple(labels.shape)}, `input_ids` {shape}: they must be equal.")
        prefix, prefix_mask = self.make_prefix(self._image_embeds(pixel_values, image_embeds, modality, images), **own)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        inputs = self._inputs(prefix, prefix_mask, input_ids, attention_mask)
        if labels is not None:
            labels = nn.functional.pad(labels, (prefix.shape[1], 0), value=IGNORED)
        if prefix_mask is not None:  # move padding to the end, because positions count from the first token
            inputs, labels = _reordered(inputs, 1 - inputs["attention_mask"], labels)
        outputs = self.text_model(**inputs, use_cache=False, return_dict=True, **kwargs)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                outputs.logits[:, self.config.prefix_length - 1 : -1].contiguous(),  # (batch, tokens, vocabulary)
                labels[:, self.config.prefix_length :].contiguous(),
                vocab_size=outputs.logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutput(
            loss=loss, logits=outputs.logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        modality: Modality | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Generate captions of images, by default with the settings of the language model, which for GPT-2 are greedy.

        Args:
            pixel_values or image_embeds, modality: as in [`~Captioner.forward`].
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): beginnings of the captions, without
                special tokens except padding.
            attention_mask (same shape, *optional*): 0 on padding.
            generation_config (`GenerationConfig`, *optional*): unset values are taken from `self.generation_config`,
                the language model's own, whose `max_new_tokens` defaults to 64. New tokens are limited by the language
                model's context.
            kwargs: other inputs of the image encoder, as in `forward`, and arguments of `GenerationMixin.generate`,
                such as `num_beams`, `max_new_tokens` and `do_sample`. `max_length` counts the given beginnings too.

        Returns:
            `torch.LongTensor` of shape `(batch * num_return_sequences, tokens)`, including the given beginnings, or an
            output object with `return_dict_in_generate=True`.

        Raises:
            ValueError: as in `forward`; also for unknown keywords, beginnings that leave no room for a caption, and
                embeddings that are not finite, for example because an image is unreadable.
        """
        if image_embeds is not None and not torch.isfinite(image_embeds).all():
            rows = (~torch.isfinite(image_embeds).flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(f"The `image_embeds` of rows {rows} are not finite. Leave out unreadable images.")
        prefix, prefix_mask = self.make_prefix(
            self._image_embeds(pixel_values, image_embeds, modality, _take(IMAGE_KEYWORDS, kwargs))
        )
        config = copy.deepcopy(generation_config or self.generation_config)
        asked = {**(generation_config.to_dict() if generation_config else {}), **kwargs}
        if asked.get("max_length") is not None and asked.get("max_new_tokens") is None:
            # transformers would prefer the default of `max_new_tokens`.
            config.max_new_tokens = asked["max_length"] - (0 if input_ids is None else input_ids.shape[1])
        config.max_length = None
        kwargs.pop("max_length", None)
        config.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        model_kwargs = config.update(**kwargs)
        inputs = self._inputs(prefix, prefix_mask, input_ids, attention_mask)
        room = self._room(prefix)
        if room is not None and config.max_new_tokens is not None:
            room -= inputs["inputs_embeds"].shape[1] - prefix.shape[1]
            if room < 1:
                raise ValueError("The beginnings in `input_ids` fill the language model's context: shorten them.")
            config.max_new_tokens = min(config.max_new_tokens, room)
        # Move padding to the front, because the caption continues after the last token.
        inputs, _ = _reordered(inputs, inputs["attention_mask"])
        outputs = self.text_model.generate(**inputs, generation_config=config, **model_kwargs)
        if input_ids is None or input_ids.shape[1] == 0:
            return outputs
        # With `inputs_embeds`, the language model returns only new tokens. Prepend the beginnings, as other models do.
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        beginnings = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([beginnings, sequences], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return outputs


def _take(names: tuple[str, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def _reordered(
    inputs: dict[str, torch.Tensor], keys: torch.Tensor, labels: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Sort each row's positions by `keys` `(batch, tokens)`, in a stable order."""
    order = keys.argsort(dim=1, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    inputs = {name: values[rows, order] for name, values in inputs.items()}
    return inputs, None if labels is None else labels[rows, order]


def caption_generation_config(text: GenerationConfig) -> GenerationConfig:
    """A language model's generation config with a limit for new tokens and a padding token, if it has none."""
    config = copy.deepcopy(text)
    if config.max_new_tokens is None:
        config.max_new_tokens, config.max_length = MAX_NEW_TOKENS, None
    if config.pad_token_id is None and config.eos_token_id is not None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return config
