"""Embeddings and patch tokens of towers for images of any size, which take patches in one sequence or padded."""

from typing import Any

import torch

from ..branches.tower import BranchedTower


def packed_features(
    tower: BranchedTower,
    pixel_values: torch.Tensor,
    image_grid_thw: torch.Tensor | None = None,
    image_position_ids: torch.Tensor | None = None,
    image_sizes: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """
    The base's output with the mean of each image's tokens as its `pooler_output` `(images, dim)`, and hidden states
    `(images, patches, hidden)`.

    Args:
        tower: the vision tower.
        pixel_values: the images of Pixtral, or patches padded to `(images, patches, values)`.
        image_grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*): the patches of Qwen-VL.
        image_position_ids (`torch.LongTensor` of shape `(images, patches, 2)`, *optional*): the positions of Gemma 4's
            patches, -1 for padding.
        image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*): see [`BranchedTower.patches_of`].
        kwargs: other arguments of the tower's `forward`.

    Raises:
        ValueError: hidden states are requested of images with different numbers of patches.
    """
    kept, merged = None, 1  # the places without padding, and the patches of a token
    if image_position_ids is not None:
        kept, merged = (image_position_ids >= 0).all(dim=-1), tower.config.pooling_kernel_size**2
        outputs, patches = tower(pixel_values, pixel_position_ids=image_position_ids, **kwargs), kept.sum(dim=-1)
        tokens = outputs.last_hidden_state
    elif image_grid_thw is not None:
        merged = tower.config.spatial_merge_size**2
        patches = tower.patches_of(pixel_values, image_grid_thw)
        places = torch.arange(pixel_values.shape[1], device=patches.device)
        outputs = tower(pixel_values[places < patches[:, None]], grid_thw=image_grid_thw, **kwargs)
        tokens = outputs.pooler_output
    else:
        patches = tower.patches_of(pixel_values, image_sizes=image_sizes)
        outputs = tower(pixel_values, image_sizes=image_sizes, **kwargs)
        tokens = outputs.last_hidden_state[0]
    tokens = tokens.split((patches // merged).tolist())
    outputs.pooler_output = torch.stack([image.mean(dim=0) for image in tokens])
    if getattr(outputs, "hidden_states", None) is not None:
        outputs.hidden_states = tuple(unpadded(states, patches, kept) for states in outputs.hidden_states)
    return outputs


def unpadded(states: torch.Tensor, patches: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """
    Hidden states `(images, tokens, hidden)` without padding.

    Args:
        states (`torch.Tensor` of shape `(images, padded tokens, hidden)`): or one sequence of all images, without
            padding, of shape `(tokens, hidden)` or `(1, tokens, hidden)`.
        patches (`torch.LongTensor` of shape `(images,)`): the number of patches of each image.
        kept (`torch.BoolTensor` of shape `(images, padded tokens)`, *optional*): the places without padding.

    Raises:
        ValueError: the images have different numbers of patches.
    """
    sizes = sorted(set(patches.tolist()))
    if len(sizes) > 1:
        raise ValueError(
            f"`token_weight` needs the same number of patches in each image, got {sizes}: resize the images."
        )
    # Gemma 4's last hidden state has its merged tokens, without padding.
    states = states.flatten(0, -2) if kept is None or states.dim() == 2 else states[kept]
    return states.unflatten(0, (len(patches), -1))
