"""Configuration of IFCap on a model with branches."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ..models.vision import VisionFields
from .bank import MAX_PROMPT_LENGTH
from .configuration_captioner import CaptionerConfig


@strict
class IFCapConfig(CaptionerConfig):
    """
    Configuration of an [`IFCapForConditionalGeneration`]. The defaults are IFCap's for COCO.

    Args:
        num_retrieved (`int`, defaults to 5): number of nearest captions in the bank that an image's prefix attends to.
        num_entity_captions (`int`, defaults to 9): number of nearest captions whose entities are counted; 7 for
            Flickr30k.
        entity_threshold (`int`, defaults to 5): the prompt lists entities that occur in more of those captions than
            this; 3 for Flickr30k.
        noise_variance (`float`, defaults to 0.04): variance of the noise added to each entry of a caption's unit
            embedding when it replaces an image in training.
        vision_config, text_config, prefix_length, mapping_clip_length, mapping_num_layers, mapping_num_heads: see
            [`CaptionerConfig`], also for errors. `mapping_type` is `"fusion"`. `vision_config` must be that of a model
            with a text encoder, which embeds the captions to retrieve.
    """

    model_type = "gmail_ifcap"
    prompt_length = MAX_PROMPT_LENGTH

    mapping_type: Literal["fusion"] = "fusion"
    num_retrieved: int = 5
    num_entity_captions: int = 9
    entity_threshold: int = 5
    noise_variance: float = 0.04

    def validate_retrieval(self) -> None:
        if isinstance(self.vision_config, VisionFields):
            raise ValueError(
                f"IFCap retrieves captions by their embeddings, but a model of type '{self.vision_config.model_type}' "
                "has no text encoder. Use ClipCap, which trains on images alone, or IFCap with a CLIP or SigLIP."
            )
        self.at_least("num_retrieved", 1)
        self.at_least("num_entity_captions", 1)
        self.at_least("entity_threshold", 0)
        if not 0 <= self.noise_variance < float("inf"):
            raise ValueError(f"`noise_variance` must be finite and at least 0, got {self.noise_variance}.")
