"""Vision-language models whose vision tower has branches: `forward` and `generate` take `modality`."""

import copy
import inspect
import os
from functools import wraps
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..branches.peft_folders import merged_state_dict
from ..branches.routing import OUTSIDE, change_class, current_route, routed, with_mixin
from ..branches.tower import Modality, keywords_of, reject_unknown
from .base import ModalityMixin

CACHES = {"cache", "past_key_values", "cache_position"}
VIDEOS = "pixel_values_videos"


class BranchedVLM(ModalityMixin):
    """
    Mixin for a model that contains a vision tower with branches, such as a vision-language model.

    `forward` and `generate` take `modality`, a branch or a list with one name per image, in the order of the images.
    An image that is cut into tiles or crops has one name. It defaults to `self.modality`. `forward` refuses unknown
    keywords, which transformers would ignore.
    """

    head_name = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = super().forward
        known = keywords_of(plain) | CACHES
        signature = inspect.signature(plain)

        @wraps(plain)
        def forward(self, *args: Any, modality: Modality | None = None, **kwargs: Any) -> Any:
            if current_route() is OUTSIDE:  # models may pass keywords to inner models, which ignore them
                reject_unknown(f"{type(self).__name__}.forward()", known, kwargs)
            inputs = signature.bind_partial(self, *args, **kwargs).arguments
            outputs = self._with_modality(plain, modality, inputs, self, *args, **kwargs)
            # Inner models of some architectures also take labels, and compute no loss.
            if inputs.get("labels") is not None and getattr(outputs, "loss", None) is not None:
                self._mend_loss(outputs, inputs)
            return outputs

        parameters = list(signature.parameters.values())
        last = len(parameters) - (parameters[-1].kind == inspect.Parameter.VAR_KEYWORD)
        added = inspect.Parameter("modality", inspect.Parameter.KEYWORD_ONLY, default=None)
        forward.__signature__ = signature.replace(parameters=[*parameters[:last], added, *parameters[last:]])
        cls.forward = forward

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, modality: Modality | None = None, **kwargs):
        """
        `generate` of transformers, with each image through the branch of its modality.

        Args:
            inputs, args, kwargs: the arguments of the base's `generate`.
            modality (`str` or a list with one name per image, *optional*): as in `forward`.

        Raises:
            ValueError: unknown modality, or the length of the list differs from the number of images.
        """
        known = kwargs if inputs is None else {"input_ids": inputs, **kwargs}
        return self._with_modality(super().generate, modality, known, inputs, *args, **kwargs)

    def _with_modality(self, function: Any, modality: Modality | None, inputs: dict[str, Any], *args: Any, **kwargs):
        """Call `function` under the route of `modality`, by default that of the enclosing forward pass."""
        if modality is None and current_route() is not OUTSIDE:
            return function(*args, **kwargs)
        modality = self.modality if modality is None else modality
        names = [modality] if isinstance(modality, str) else list(modality)
        self.tower.check_modalities(names)
        pixel_values, grid_thw = inputs.get("pixel_values"), inputs.get("image_grid_thw")
        if pixel_values is None and inputs.get(VIDEOS) is None:
            return routed(None, function, *args, **kwargs)
        if not isinstance(modality, str):
            if inputs.get(VIDEOS) is not None:
                raise ValueError("With videos, `modality` must be one name for all images and videos.")
            modality = names if grid_thw is not None else names_of_rows(names, inputs, self.config)
        images = pixel_values if pixel_values is not None else inputs[VIDEOS]
        patches = self.tower.patches_of(images, grid_thw, inputs.get("image_sizes"))
        rows = images if isinstance(modality, str) else images.new_empty(len(modality))
        return routed(self.tower.route(modality, rows, patches), function, *args, **kwargs)

    def _mend_loss(self, outputs: Any, inputs: dict[str, Any]) -> None:
        """Fix the loss of batches without labels or images."""
        if not (inputs["labels"][:, 1:] != -100).any():
            # No image of the batch could be read: the mean over no tokens is NaN, and would make all weights NaN.
            outputs.loss = outputs.logits.sum() * 0
        if self.training and inputs.get("pixel_values") is None and inputs.get("mm_encoder_outputs") is None:
            # Without images, tower and projector get no gradient: backward would fail if only they train, and DDP
            # would wait for their gradients.
            parts = ("multi_modal_projector", "connector", self.tower_name.rpartition(".")[-1])
            idle = [
                parameter
                for name, parameter in self.named_parameters()
                if parameter.requires_grad and any(part in name.split(".") for part in parts)
            ]
            outputs.loss = outputs.loss + 0 * sum(parameter.sum().to(outputs.loss) for parameter in idle)

    def save_pretrained(self, save_directory: str | os.PathLike, save_original_format: bool = False, **kwargs: Any):
        """
        `save_pretrained` of `PreTrainedModel`, with the names of this model's modules.

        Many vision-language models save with the names of transformers 4, from which `Trainer` cannot resume: it would
        keep the initial weights, with a warning.
        """
        return super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)

    def plain_config(self) -> PreTrainedConfig:
        """The configuration of the model without branches."""
        return copy.deepcopy(self.config)

    def to_base(self, modality: str) -> PreTrainedModel:
        """
        Export one branch as the plain model of transformers, with its adapter merged into the tower.

        All weights except the merged ones are shared with this model, not copied. Save the result before you continue
        training.

        Raises:
            ValueError: unknown modality.
        """
        self.tower.check_modalities([modality])
        base = next(
            kind for kind in type(self).__mro__ if not issubclass(kind, BranchedVLM) and hasattr(kind, "forward")
        )
        return assemble(base, self.plain_config(), merged_state_dict(self, [modality]), self).eval()


def take_modality(model: PreTrainedModel, tower_name: str) -> None:
    """Turn `model`, and each model inside it that contains the tower, into a [`BranchedVLM`]."""
    path = tower_name.split(".")
    for depth in range(len(path)):
        owner = model.get_submodule(".".join(path[:depth]))
        if isinstance(owner, PreTrainedModel) and not isinstance(owner, BranchedVLM):
            change_class(owner, with_mixin(BranchedVLM, type(owner)))
            owner.tower_name = ".".join(path[depth:])


def assemble(
    model_class: type[PreTrainedModel], config: Any, weights: dict[str, torch.Tensor], source: PreTrainedModel
) -> PreTrainedModel:
    """A model with these tensors, not copies, and with the generation settings and the mode of `source`."""
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    model.tie_weights()
    if getattr(source, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    model.to(source.device)  # moves the buffers
    return model.train(source.training)


def names_of_rows(names: list[str], inputs: dict[str, Any], config: Any) -> list[str]:
    """
    The branch of each row of the tower's input, from one name per image.

    Args:
        names: one per image, or already one per row.
        inputs: `pixel_values` and the model's other inputs: `input_ids`, and `image_sizes` for LLaVA-NeXT and
            LLaVA-OneVision.
        config: the model's configuration.

    Raises:
        ValueError: the number of names equals neither that of the images nor that of the rows.
    """
    counts = rows_per_image(inputs, config)
    if len(names) == sum(counts):
        return names
    if len(names) != len(counts):
        raise ValueError(f"`modality` lists {len(names)} branches for {len(counts)} images.")
    return [name for name, count in zip(names, counts, strict=True) for _ in range(count)]


def rows_per_image(inputs: dict[str, Any], config: Any) -> list[int]:
    """The number of tiles or crops of each image."""
    pixel_values, sizes = inputs["pixel_values"], inputs.get("image_sizes")
    if sizes is not None and hasattr(config, "image_grid_pinpoints"):  # LLaVA-NeXT, LLaVA-OneVision
        side, grid = config.vision_config.image_size, config.image_grid_pinpoints
        group = inputs.get("batch_num_images")
        alone = [True] * len(sizes) if group is None else [count == 1 for count in group for _ in range(count)]
        return [
            image_size_to_num_patches(size, grid, side) if one else 1 for size, one in zip(sizes, alone, strict=True)
        ]
    if pixel_values.dim() == 5:  # Idefics 3, SmolVLM: (texts, tiles, ...), padded with black tiles
        return [tiles for tiles in pixel_values.flatten(2).any(dim=-1).sum(dim=1).tolist() if tiles]
    if config.model_type == "internvl":  # one run of image tokens for all tiles of an image
        runs = image_token_runs(inputs.get("input_ids"), getattr(config, "image_token_id", None))
        tokens, rest = divmod(sum(runs), len(pixel_values))
        if runs and not rest and all(run % tokens == 0 for run in runs):
            return [run // tokens for run in runs]
    return [1] * len(pixel_values)


def image_token_runs(input_ids: torch.Tensor | None, image_token_id: int | None) -> list[int]:
    """Lengths of the runs of image tokens in each text of `input_ids` `(texts, tokens)`."""
    if input_ids is None or image_token_id is None:
        return []
    is_image = torch.nn.functional.pad((input_ids == image_token_id).int(), (1, 1))
    edges = is_image.diff(dim=1)
    starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
    return (ends - starts).tolist()
