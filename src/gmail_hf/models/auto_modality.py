"""`modality="auto"`: images of unknown origin, each through the branch that a detector chooses."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..branches.configuration import AUTO
from ..branches.detector import Detector


@dataclass
class DetectedModality(ModelOutput):
    """
    What a detector says about images.

    Args:
        generated_probability (`torch.FloatTensor` of shape `(images,)`): that an image is generated.
        modality (`list[str]`): the branch of each image, for any method that takes `modality`.
    """

    generated_probability: torch.FloatTensor | None = None
    modality: list[str] | None = None


@dataclass
class AutoModalityOutput(BaseModelOutputWithPooling):
    """
    Image features under `modality="auto"`: the base's output, and the fields of [`DetectedModality`].

    Args:
        generated_probability (`torch.FloatTensor` of shape `(images,)`): that an image is generated.
        modality (`list[str]`): the branch that each image went through.
    """

    generated_probability: torch.FloatTensor | None = None
    modality: list[str] | None = None


class AutoModality:
    """Mixin of a [`GmailModel`] that finds the modality of images by itself, once it has a detector."""

    detector: Detector | None = None

    @torch.no_grad()
    def detect_modality(
        self, pixel_values: torch.Tensor, threshold: float = 0.5, **images: torch.Tensor
    ) -> DetectedModality:
        """
        Decide which images are generated, by one pass through `real`.

        The detector knows the generator and the photographs that it was fitted on. It is no forensic detector: images
        of another generator, or edited or compressed ones, may get a wrong branch with a high probability.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): normalised images.
            threshold (`float`): from which probability on an image is taken for generated. Probabilities are
                calibrated for equally many real and generated images; where a share `s` is generated, `1 - s` makes
                the fewest mistakes.
            images: what the base takes with the pixels, one row per image.

        Raises:
            ValueError: no detector was fitted; training mode; a threshold out of range.
        """
        check_auto(self, threshold)
        features = self.get_image_features(pixel_values, modality="real", **images).pooler_output
        return self._decide(features, threshold)

    def _decide(self, real_features: torch.Tensor, threshold: float) -> DetectedModality:
        probability = self.detector(real_features)
        names = [self.detector.modality if value >= threshold else "real" for value in probability.tolist()]
        return DetectedModality(probability, names)

    def auto_features(
        self, pixel_values: torch.Tensor, *args: Any, threshold: float = 0.5, **kwargs: Any
    ) -> AutoModalityOutput:
        """`get_image_features` under `modality="auto"`: only images taken for generated pass a second time."""
        check_auto(self, threshold)
        outputs = self.get_image_features(pixel_values, *args, modality="real", **kwargs)
        detected = self._decide(outputs.pooler_output, threshold)
        rows = [row for row, name in enumerate(detected.modality) if name != "real"]
        merged = dict(outputs)
        if rows:
            index = torch.tensor(rows, device=pixel_values.device)

            def chosen(value: Any) -> Any:  # of images; settings stay
                return value[index] if torch.is_tensor(value) and value.shape[:1] == pixel_values.shape[:1] else value

            again = self.get_image_features(
                chosen(pixel_values),
                *map(chosen, args),
                modality=self.detector.modality,
                **{name: chosen(value) for name, value in kwargs.items()},
            )
            merged = {name: _replace_rows(values, index, again[name]) for name, values in merged.items()}
        return AutoModalityOutput(**merged, **detected)


def is_auto(modality: Any) -> bool:
    return isinstance(modality, str) and modality == AUTO


def check_auto(model: AutoModality, threshold: float) -> None:
    """
    Raises:
        ValueError: `modality="auto"` cannot work on this model now, or the threshold is out of range.
    """
    if model.detector is None:
        raise ValueError(
            f'`modality="{AUTO}"` needs a detector, and none was fitted: call `gmail_hf.fit_detector(model, '
            "processor, pairs)`, or train with `gmail-hf train --fit_detector`."
        )
    if model.training:
        raise ValueError(f'`modality="{AUTO}"` is for inference: call `model.eval()`, or name the modalities.')
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` is a probability in [0, 1], got {threshold}.")


def _replace_rows(values: Any, index: torch.Tensor, rows: Any) -> Any:
    """`values` `(images, ...)` with `rows` at `index`, also in tuples of layers."""
    if isinstance(values, tuple):
        return tuple(_replace_rows(layer, index, chosen) for layer, chosen in zip(values, rows, strict=True))
    return values.index_copy(0, index.to(values.device), rows)
