"""ClipCap (Mokady et al., 2021) on a two-branch CLIP: captions from one image embedding."""

from .configuration_clipcap import ClipCapConfig
from .modeling_captioner import Captioner


class ClipCapForConditionalGeneration(Captioner):
    """
    A [`Captioner`] whose prefix depends on the image embedding alone.

    Make one with [`~Captioner.from_vision_text_pretrained`]; load a trained one with `from_pretrained`.
    """

    config: ClipCapConfig
    base_model_prefix = "clipcap"
