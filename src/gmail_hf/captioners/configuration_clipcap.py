"""Configuration of ClipCap on a model with branches."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_captioner import CaptionerConfig


@strict
class ClipCapConfig(CaptionerConfig):
    """
    Configuration of a [`ClipCapForConditionalGeneration`]. The defaults are those of ClipCap's paper.

    Args:
        mapping_type (`str`, defaults to `"mlp"`): the mapping network, `"mlp"` or `"transformer"`.
        vision_config, text_config, prefix_length, mapping_clip_length, mapping_num_layers, mapping_num_heads: see
            [`CaptionerConfig`], also for errors.
    """

    model_type = "gmail_clipcap"

    mapping_type: Literal["mlp", "transformer"] = "mlp"
