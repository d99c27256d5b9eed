"""Read checkpoints of other code bases, and load their tensors into a model of transformers."""

import argparse
import os
import pickle
import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..branches.peft_folders import some

Weights = dict[str, torch.Tensor]


def read_tensors(checkpoint: str | os.PathLike) -> Weights:
    """
    Read the state dict in a file of `torch.save`. Code in the pickle is not run.

    Args:
        checkpoint: the file. Its content is the state dict, or has it as the entry `state_dict` or `model`.

    Raises:
        ValueError: the file holds objects other than tensors and settings, or no state dict.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # settings of a training
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{checkpoint}' is damaged or holds Python objects, which are not read because they can run code. Save "
            f"only its tensors to a new file. {error}"
        ) from error
    if isinstance(content, dict):
        content = next((content[key] for key in ("state_dict", "model") if key in content), content)
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if tensors:
            return tensors
    raise ValueError(
        f"'{checkpoint}' holds no state dict: expected tensors by name, possibly in `state_dict` or `model`."
    )


def require(weights: Weights, names: Sequence[str], checkpoint: str | os.PathLike) -> None:
    """
    Check that a state dict has the weights from which a model's sizes are taken.

    Raises:
        ValueError: some are missing.
    """
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"'{checkpoint}' lacks {some(missing)}: is it a checkpoint of this kind of model?")


def count_layers(weights: Weights, prefix: str) -> int:
    """The number of layers whose weights are named `{prefix}{index}.…`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def grid_size(positions: torch.Tensor, name: str) -> int:
    """
    Patches per edge of the square images for position embeddings `(1 + patches, hidden)`.

    Raises:
        ValueError: the patches do not form a square.
    """
    side = round((len(positions) - 1) ** 0.5)
    if side**2 + 1 != len(positions):
        raise ValueError(f"'{name}' has {len(positions)} positions; expected a class token and a square of patches.")
    return side


def fill(
    model: PreTrainedModel,
    weights: Weights,
    renames: Sequence[tuple[str, str]],
    checkpoint: str | os.PathLike,
) -> None:
    """
    Load renamed weights into a model, in float32.

    Args:
        model: the model, all of whose weights are loaded.
        weights: the state dict, all of whose weights are used.
        renames: patterns and replacements, applied in order, that turn a name in `model` into the one in `weights`.
            The query, key and value weights of a layer come from one stacked tensor.
        checkpoint: the checkpoint's name in error messages.

    Raises:
        ValueError: weights are missing or unknown, or are not finite floating-point numbers of the expected shape.
    """
    sources = {}
    for name in model.state_dict():
        source = name
        for pattern, replacement in renames:
            source = re.sub(pattern, replacement, source)
        sources[name] = source
    missing, unknown = set(sources.values()) - weights.keys(), weights.keys() - set(sources.values())
    if missing or unknown:
        raise ValueError(
            f"'{checkpoint}' is not a checkpoint of this kind of model. Missing weights: {some(missing)}. Unknown "
            f"weights: {some(unknown)}."
        )
    for name, parameter in model.state_dict().items():
        tensor = weights[sources[name]]
        if part := re.search(r"\.([qkv])_proj\.", name):
            tensor = tensor.chunk(3)["qkv".index(part[1])]
        if tensor.shape != parameter.shape or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"'{sources[name]}' in '{checkpoint}' is a {tensor.dtype} tensor of shape {tuple(tensor.shape)}; "
                f"expected finite floating-point numbers of shape {tuple(parameter.shape)}."
            )
        parameter.copy_(tensor)
