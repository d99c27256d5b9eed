"""
LLaVA on GMAIL's vision tower with two branches (Mo & Yun, ICML 2025, Algorithm 1, stages 2 and 3).

Generated images use the tower's `gen` branch in training, photographs use its `real` branch in serving. LLaVA reads
patch features of an inner layer, so the branches differ only by their LoRA updates, not by their projections.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging

from ..branches.peft_folders import SIGNATURE_TOLERANCE, some
from ..branches.tower import adapter_of, cast_base, is_adapter_weight
from ..models.clip import GmailVisionModel
from ..models.configuration import plain_values
from ..models.configuration_clip import GmailConfig, GmailVisionConfig
from ..models.loading import StrictLoading
from ..models.vision_language import BranchedVLM, assemble, take_modality
from ..publishing.provenance import name_publicly
from .configuration_gmail_llava import GmailLlavaConfig
from .processing import check_processor, end_of_turn, tower_config

TOWER_FIELDS = (
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)

# LLaVA's checkpoints of transformers 4 have other names.
register_checkpoint_conversion_mapping("gmail_llava", get_checkpoint_conversion_mapping("llava"))


class GmailLlavaForConditionalGeneration(BranchedVLM, StrictLoading, LlavaForConditionalGeneration):
    """
    A LLaVA with the branch `gen` for generated images and the branch `real` for photographs.

    Create one from a LLaVA ([`~GmailLlavaForConditionalGeneration.from_llava`]) or from a language model
    ([`~GmailLlavaForConditionalGeneration.from_vision_text_pretrained`]), with the tower of a trained
    [`GmailCLIPModel`]. Load a trained one with `from_pretrained`. The tower is frozen, as f_g is in this stage of the
    paper.

    Args:
        config ([`GmailLlavaConfig`]): the model's configuration. The weights are initialised at random.
    """

    config: GmailLlavaConfig
    tower_name = "model.vision_tower"
    _keep_in_fp32_modules_strict = {"adapters"}
    _without_branches = "Add branches to a plain LLaVA with `GmailLlavaForConditionalGeneration.from_llava`."

    def __init__(self, config: GmailLlavaConfig):
        super().__init__(config)
        take_modality(self, self.tower_name)
        self.freeze_vision_tower()

    def after_loading(self) -> None:
        self.freeze_vision_tower()

    @classmethod
    def from_llava(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        gmail: str | os.PathLike,
        gmail_revision: str | None = None,
        **kwargs: Any,
    ):
        """
        Load a pretrained LLaVA with the adapters of a [`GmailCLIPModel`] on its vision tower.

        The `real` branch equals the original LLaVA bit for bit, unless it was trained.

        Args:
            pretrained_model_name_or_path: a Hub id or folder of a `LlavaForConditionalGeneration`.
            gmail: a Hub id or folder of a [`GmailCLIPModel`] whose base is that LLaVA's vision tower.
            gmail_revision (`str`, *optional*): the revision of `gmail`.
            kwargs: arguments of `from_pretrained`, such as `revision`, `dtype`, `attn_implementation`, `device_map`.

        Raises:
            ValueError: `gmail` has no branches, its base has another shape or other weights than the tower, or weights
                are missing.
        """
        kwargs["use_safetensors"] = True
        hub = {key: kwargs[key] for key in ("token", "cache_dir") if key in kwargs}
        llava_config = AutoConfig.from_pretrained(
            pretrained_model_name_or_path, revision=kwargs.get("revision"), **hub
        )
        if llava_config.model_type != "llava":
            raise ValueError(
                f"'{pretrained_model_name_or_path}' is a {llava_config.model_type}, not a LLaVA "
                "(LlavaForConditionalGeneration)."
            )
        vision_config = _gmail_vision_config(gmail, gmail_revision, **hub)
        for field in TOWER_FIELDS:
            theirs, ours = getattr(llava_config.vision_config, field), getattr(vision_config, field)
            if theirs != ours:
                raise ValueError(
                    f"The vision tower of '{pretrained_model_name_or_path}' has {field}={theirs}, but the base of "
                    f"'{gmail}' has {field}={ours}. Align generated images on LLaVA's own CLIP first."
                )
        config = GmailLlavaConfig.from_llava_config(llava_config, vision_config)
        name_publicly(config)
        with _without_report():  # the checkpoint has no adapters
            model, info = super(StrictLoading, cls).from_pretrained(
                pretrained_model_name_or_path, config=config, output_loading_info=True, **kwargs
            )
        missing = [key for key in info["missing_keys"] if not is_adapter_weight(key)]
        if missing:
            raise ValueError(f"'{pretrained_model_name_or_path}' lacks {some(missing)}.")
        tower = GmailVisionModel.from_pretrained(gmail, revision=gmail_revision, **hub).state_dict()
        _check_same_base(model.model.vision_tower, tower, str(pretrained_model_name_or_path), str(gmail))
        with torch.no_grad():
            for name, parameter in model.model.vision_tower.named_parameters():
                if is_adapter_weight(name):
                    parameter.copy_(tower[name])
        model.freeze_vision_tower()
        return model

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | os.PathLike,
        text_model_name_or_path: str | os.PathLike,
        processor: LlavaProcessor,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        vision_feature_layer: int | list[int] = -2,
        **kwargs: Any,
    ):
        """
        Connect the tower of a [`GmailCLIPModel`] to a causal language model, such as Llama 3, by a fresh projector.

        Args:
            vision_model_name_or_path: a Hub id or folder of a [`GmailCLIPModel`].
            text_model_name_or_path: a Hub id or folder of a `LlamaForCausalLM` or another model with its layout.
            processor (`LlavaProcessor`): the result of [`build_processor`] for the two models. The embeddings of the
                language model are resized to its tokenizer.
            vision_revision, text_revision (`str`, *optional*): revisions.
            vision_feature_layer (`int` or a list of them): the tower's layers whose patch features are projected. -2,
                as in LLaVA, is the second-to-last layer.
            kwargs: arguments of both `from_pretrained`, such as `dtype`, `attn_implementation`.

        Returns:
            A model in the dtype of the language model.

        Raises:
            ValueError: a model is of another type, or the processor does not fit the models.
        """
        kwargs["use_safetensors"] = True
        _gmail_vision_config(vision_model_name_or_path, vision_revision)
        tower = GmailVisionModel.from_pretrained(vision_model_name_or_path, revision=vision_revision, **kwargs)
        language_model, info = AutoModelForCausalLM.from_pretrained(
            text_model_name_or_path, revision=text_revision, output_loading_info=True, **kwargs
        )
        if info["missing_keys"]:
            raise ValueError(f"'{text_model_name_or_path}' lacks {some(info['missing_keys'])}.")
        strange = [name for name in language_model.state_dict() if not name.startswith(("model.", "lm_head.weight"))]
        if strange:
            raise ValueError(
                f"'{text_model_name_or_path}', a {language_model.config.model_type}, does not have the layout of "
                f"Llama, `model.*` and `lm_head.weight`: it has {strange[0]}."
            )
        cast_base(tower, language_model.dtype)  # the projector and the language model read its features
        tower.config.dtype = language_model.dtype
        config = GmailLlavaConfig(
            dtype=language_model.dtype,
            vision_config=tower.config,
            text_config=language_model.config,
            image_token_index=processor.image_token_id,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=processor.vision_feature_select_strategy,
            tie_word_embeddings=language_model.config.tie_word_embeddings,
        )
        name_publicly(config)
        check_processor(processor, config)
        weights = {f"model.vision_tower.{name}": weight for name, weight in tower.state_dict().items()}
        for name, weight in language_model.state_dict().items():
            weights[re.sub(r"^model\.", "model.language_model.", name)] = weight
        projector = LlavaMultiModalProjector(config).to(language_model.dtype)
        for name, weight in projector.state_dict().items():
            weights[f"model.multi_modal_projector.{name}"] = weight
        model = assemble(cls, config, weights, language_model)
        if len(processor.tokenizer) > config.text_config.vocab_size:
            model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), end_of_turn(processor)} - {None}
        model.generation_config.eos_token_id = sorted(ends)
        model.freeze_vision_tower()
        return model

    def freeze_vision_tower(self) -> None:
        """Freeze the tower and its adapters, which is the default for a new or loaded model."""
        self.model.vision_tower.requires_grad_(False)

    def train_vision_adapters(self, modalities: Sequence[str] = ("gen",)) -> None:
        """
        Train the adapters of some branches, in the layers that the patch features depend on.

        Layers above `vision_feature_layer` get no gradient, on which DDP fails, so they stay frozen.

        Raises:
            ValueError: a name is not a branch with an adapter.
        """
        tower = self.model.vision_tower
        unknown = [name for name in modalities if name not in tower.config.trainable_modalities]
        if unknown:
            raise ValueError(f"{unknown} have no adapter; branches with one are {tower.config.trainable_modalities}.")
        self.freeze_vision_tower()
        chosen = self.config.vision_feature_layer
        states = tower.config.num_hidden_layers + 1  # the embeddings come first
        reached = max(index % states for index in ([chosen] if isinstance(chosen, int) else chosen))
        for layer in tower.encoder.layers[:reached]:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(adapter_of(name) in modalities)

    def freeze_all_but_projector(self) -> None:
        """Train only the projector, as in LLaVA's first stage."""
        self.requires_grad_(False)
        self.model.multi_modal_projector.requires_grad_(True)

    def to_llava(self, modality: str) -> LlavaForConditionalGeneration:
        """
        Export one branch as a plain `transformers.LlavaForConditionalGeneration`, see [`BranchedVLM.to_base`].

        Raises:
            ValueError: unknown modality.
        """
        return self.to_base(modality)

    def plain_config(self) -> LlavaConfig:
        config = LlavaConfig(**plain_values(self.config))
        config._attn_implementation = self.config._attn_implementation
        return config


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from reporting missing weights; the caller checks them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _gmail_vision_config(name: str | os.PathLike, revision: str | None, **hub: Any) -> GmailVisionConfig:
    config = tower_config(name, revision, **hub)
    if isinstance(config, GmailConfig):
        config = config.vision_config
    if not isinstance(config, GmailVisionConfig):
        raise ValueError(
            f"'{name}' is a {config.model_type}, not a GmailCLIPModel. Train one from a CLIP, with "
            "`gmail-hf train`. For branches on the tower of another vision-language model, use `gmail_hf.from_vlm`."
        )
    return config


def _check_same_base(
    tower: GmailVisionModel, weights: dict[str, torch.Tensor], tower_name: str, weights_name: str
) -> None:
    """Refuse adapters of another CLIP of the same shape; rounding to another precision is accepted."""
    difference, norm = 0.0, 0.0
    for name, ours in tower.state_dict().items():
        if not is_adapter_weight(name):
            ours, theirs = ours.float().cpu(), weights[name].float().cpu()
            difference += (ours - theirs).square().sum().item()
            norm += ours.square().sum().item()
    if difference**0.5 > SIGNATURE_TOLERANCE * norm**0.5:
        raise ValueError(
            f"'{weights_name}' adapts another CLIP than the vision tower of '{tower_name}': the shape is the same, "
            "but the weights differ. Align generated images on LLaVA's own CLIP first."
        )
