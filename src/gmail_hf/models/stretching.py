"""Longer texts for a CLIP: the knowledge-preserved stretching of Long-CLIP (Zhang et al., ECCV 2024)."""

import torch
from torch import nn
from transformers import CLIPModel, MetaClip2Model

KEPT_POSITIONS = 20


@torch.no_grad()
def stretch_positions(model: CLIPModel | MetaClip2Model, length: int = 248, keep: int = KEPT_POSITIONS) -> None:
    """
    Give a CLIP a longer text context, in place, by Long-CLIP's knowledge-preserved stretching.

    The first `keep` position embeddings stay. The others are spread by the factor
    `(length - keep) / (old length - keep)`, 4 from 77 to 248: embeddings between them are interpolated linearly, and
    those after the last one are extrapolated from the last two. A text of at most `keep` tokens has the same embedding
    as before. Longer texts need fine-tuning, which Long-CLIP did on long captions.

    Args:
        model: a CLIP or MetaCLIP 2, also a [`GmailCLIPModel`], which then no longer names the base that it came from.
        length: the new number of positions.
        keep: the number of positions at the start that stay.

    Raises:
        TypeError: `model` is not a CLIP.
        ValueError: `length` is not longer than now; `keep` is negative or leaves fewer than two positions to stretch.

    The model's tokenizer needs the new length too: `tokenizer.model_max_length = 248`.
    """
    if not isinstance(model, (CLIPModel, MetaClip2Model)):
        raise TypeError(f"Expected a CLIPModel, MetaClip2Model or GmailCLIPModel, got {type(model).__name__}.")
    embeddings = model.text_model.embeddings
    old = embeddings.position_embedding.weight  # (positions, hidden)
    if length <= len(old):
        raise ValueError(f"The model has {len(old)} text positions already: `length` must be larger, got {length}.")
    if not 0 <= keep <= len(old) - 2:
        raise ValueError(f"`keep` must be in [0, {len(old) - 2}] for {len(old)} text positions, got {keep}.")
    steps = torch.arange(length - keep, device=old.device) * (len(old) - keep)
    # The last two positions also carry what comes after them, with a share above one.
    lower = (keep + steps // (length - keep)).clamp(max=len(old) - 2)
    share = (steps / (length - keep) + keep - lower).unsqueeze(1)
    values = old.to(share.dtype)
    stretched = values[lower] + share * (values[lower + 1] - values[lower])
    embedding = embeddings.position_embedding
    embedding.weight = nn.Parameter(torch.cat([old[:keep], stretched.to(old.dtype)]), requires_grad=old.requires_grad)
    embedding.num_embeddings = length
    embeddings.position_ids = torch.arange(length, device=old.device).unsqueeze(0)
    model.config.text_config.max_position_embeddings = length
    if hasattr(model.config, "base_model_name_or_path"):
        model.config.base_model_name_or_path = model.config.base_model_revision = None
