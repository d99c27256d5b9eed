"""ClipCap (Mokady et al., 2021) on a model with branches: captions from one image embedding."""

from .configuration_clipcap import ClipCapConfig
from .modeling_captioner import Captioner


class ClipCapForConditionalGeneration(Captioner):
    """
    A [`Captioner`] whose prefix depends only on the image embedding.

    Create one with [`~Captioner.from_vision_text_pretrained`], and load a trained one with `from_pretrained`.
    """

    config: ClipCapConfig
    base_model_prefix = "clipcap"
