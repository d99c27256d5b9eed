"""The image encoder of a model with branches, for a model that reads its embeddings."""

import os
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..branches.configuration import AdapterFields
from .attached import ATTACHED
from .clip import GmailVisionModelWithProjection
from .configuration_clip import GmailConfig, GmailVisionConfig


def image_encoder_config(
    pretrained_model_name_or_path: str | os.PathLike, revision: str | None = None
) -> PreTrainedConfig:
    """
    The configuration of the image encoder in a checkpoint.

    Raises:
        ValueError: the checkpoint has no branches, or it has those of a vision-language model.
    """
    kind = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, revision=revision)[0].get("model_type", "")
    if kind.startswith(ATTACHED):
        raise ValueError(
            f"'{pretrained_model_name_or_path}' has the branches of a vision-language model, which writes captions "
            "itself: load them with `gmail_hf.from_vlm`."
        )
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, revision=revision)
    if not isinstance(config, AdapterFields):
        raise ValueError(
            f"'{pretrained_model_name_or_path}' is of type '{config.model_type}', which has no branches. Add them "
            "with `gmail_hf.from_base`, train them, and save the model."
        )
    return config.vision_config if isinstance(config, GmailConfig) else config


def new_image_encoder(config: AdapterFields) -> PreTrainedModel:
    """
    An image encoder with random weights.

    Args:
        config: the result of [`image_encoder_config`].

    Returns:
        [`GmailVisionModelWithProjection`], or a [`GmailModel`] without its text encoder. Both have `pooled`,
        `embed_dim` and `tower`.
    """
    if isinstance(config, GmailVisionConfig):
        return GmailVisionModelWithProjection._from_config(config)
    return AutoModel.from_config(config).remove_text_encoder()


def load_image_encoder(
    pretrained_model_name_or_path: str | os.PathLike, config: AdapterFields, **kwargs: Any
) -> PreTrainedModel:
    """
    The image encoder in a checkpoint, as in [`new_image_encoder`].

    Args:
        pretrained_model_name_or_path: a Hub id or folder of a model with branches, complete or only adapters.
        config: the result of [`image_encoder_config`].
        kwargs: `revision`, `dtype` and other arguments of `from_pretrained`.

    Raises:
        ValueError, OSError: as in [`GmailCheckpoints.from_pretrained`].
    """
    if isinstance(config, GmailVisionConfig):
        return GmailVisionModelWithProjection.from_pretrained(pretrained_model_name_or_path, **kwargs)
    return AutoModel.from_pretrained(pretrained_model_name_or_path, **kwargs).remove_text_encoder()
