"""The detector of generated images, for `modality="auto"`, and its file."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import replacing
from .peft_folders import SIGNATURE, base_signature, check_base, parse_untrusted_json, read_signature, some

DETECTOR_FILE = "detector.safetensors"
SETTINGS = "gmail_detector"  # the key of modality and scores in the file's metadata


@dataclass(frozen=True)
class Detector:
    """
    A calibrated logistic regression on the L2-normalised embedding of an image by the `real` branch.

    Args:
        weight (`torch.FloatTensor` of shape `(dim,)`), bias (`torch.FloatTensor` of shape `()`): the logit of
            "generated" is `embed @ weight + bias`.
        modality (`str`): the branch that generated images go through.
        scores (`dict[str, float]`): measured on pairs that neither the regression nor its calibration saw, see
            [`fit_detector`].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    modality: str = "gen"
    scores: dict[str, float] = field(default_factory=dict)

    def __call__(self, embeds: torch.Tensor) -> torch.Tensor:
        """
        The probability that images are generated.

        Args:
            embeds (`torch.Tensor` of shape `(images, dim)`): by the `real` branch, of any length.

        Returns:
            `torch.FloatTensor` of shape `(images,)`.
        """
        unit = nn.functional.normalize(embeds.float(), dim=-1)
        # Not a matrix product, which autocast would compute in half precision.
        return torch.sigmoid((unit * self.weight.to(unit.device)).sum(dim=-1) + self.bias.to(unit.device))


def check_frozen_real(config: Any) -> None:
    """
    Raises:
        ValueError: the `real` branch has an adapter, so that its embeddings change with training.
    """
    if "real" in config.trainable_modalities:
        raise ValueError(
            "A detector reads the frozen `real` branch, but this model trains that one: `trainable_modalities` is "
            f"{config.trainable_modalities}."
        )


def write_detector(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the model's detector into a folder; without one, remove what an earlier model left there."""
    path, detector = Path(folder, DETECTOR_FILE), model.detector
    if detector is None:
        path.unlink(missing_ok=True)
        return
    settings = {"modality": detector.modality, "scores": detector.scores}
    metadata = {"format": "pt", SIGNATURE: json.dumps(base_signature(model)), SETTINGS: json.dumps(settings)}
    with replacing(path) as partial:
        save_file({"weight": detector.weight, "bias": detector.bias}, partial, metadata)


def read_detector(model: nn.Module, file: str) -> Detector:
    """
    Read a detector and check that it fits this model.

    Raises:
        OSError: the file is damaged.
        ValueError: it was fitted on another base; it has other tensors or shapes, integers or values that are not
            finite; its branch is none of this model's generated ones; the model trains its `real` branch.
    """
    check_frozen_real(model.config)
    expected = {"weight": [model.embed_dim], "bias": []}
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_slice(name) for name in tensors.keys()}
            shapes = {name: values.get_shape() for name, values in found.items()}
            types = {name: values.get_dtype() for name, values in found.items()}
            if shapes != expected or set(types.values()) != {"F32"}:
                raise ValueError(
                    f"{file} holds {some(f'{name} {types[name]} {shapes[name]}' for name in shapes)}; a detector of "
                    f"this model has float32 tensors of the shapes {expected}."
                )
            weight, bias = tensors.get_tensor("weight"), tensors.get_tensor("bias")
    except SafetensorError as error:
        raise OSError(f"{file} is damaged ({error}); download or save it again.") from error
    if not (weight.isfinite().all() and bias.isfinite()):
        raise ValueError(f"{file} holds values that are not finite.")
    signature = read_signature(file)
    if not isinstance(signature, dict):
        raise ValueError(f"{file} has no signature of its base.")
    check_base(model, file, model.config.base_model_name_or_path, signature)
    settings = detector_settings(file)
    branches = [name for name in model.config.modalities if name != "real"]
    if settings["modality"] not in branches:
        raise ValueError(f"{file} sends images to the branch {settings['modality']!r}; this model has {branches}.")
    return Detector(weight, bias, **settings)


def detector_settings(file: str | os.PathLike) -> dict[str, Any]:
    """
    `modality` and `scores` of a detector's file.

    Raises:
        ValueError: they are missing or of another form.
    """
    with safe_open(file, framework="pt") as tensors:
        text = (tensors.metadata() or {}).get(SETTINGS, "null")
    settings = parse_untrusted_json(text, f"The settings in {file}")
    if (
        not isinstance(settings, dict)
        or settings.keys() != {"modality", "scores"}
        or not isinstance(settings["modality"], str)
        or not isinstance(settings["scores"], dict)
        or not all(type(value) in (int, float) and math.isfinite(value) for value in settings["scores"].values())
    ):
        raise ValueError(f"The settings in {file} are not a branch and scores: fit the detector again.")
    return settings
