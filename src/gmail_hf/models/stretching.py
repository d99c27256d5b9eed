"""Longer texts for a CLIP, by the knowledge-preserved stretching of Long-CLIP (Zhang et al., ECCV 2024)."""

import torch
from torch import nn
from transformers import CLIPModel, MetaClip2Model

KEPT_POSITIONS = 20


@torch.no_grad()
def stretch_positions(model: CLIPModel | MetaClip2Model, length: int = 248, keep: int = KEPT_POSITIONS) -> None:
    """
    Give a CLIP a longer text context, in place, by Long-CLIP's knowledge-preserved stretching.

    The first `keep` position embeddings do not change. The others are spread by the factor
    `(length - keep) / (old length - keep)`, 4 from 77 to 248. Embeddings between them are interpolated linearly, and
    those after the last one are extrapolated from the last two. The embedding of a text of at most `keep` tokens does
    not change. For longer texts, fine-tune the model on long captions, as Long-CLIP did, and set the tokenizer's
    length: `tokenizer.model_max_length = 248`.

    Args:
        model: a CLIP or MetaCLIP 2. The configuration of a [`GmailCLIPModel`] will no longer name its base.
        length: the new number of positions.
        keep: the number of positions at the start that do not change.

    Raises:
        TypeError: `model` is not a CLIP.
        ValueError: `length` is not larger than the current length; `keep` is negative or leaves fewer than two
            positions to stretch.
    """
    if not isinstance(model, (CLIPModel, MetaClip2Model)):
        raise TypeError(f"Expected a CLIPModel, MetaClip2Model or GmailCLIPModel, got {type(model).__name__}.")
    embeddings = model.text_model.embeddings
    old = embeddings.position_embedding.weight  # (positions, hidden)
    if length <= len(old):
        raise ValueError(f"The model already has {len(old)} text positions: `length` must be larger, got {length}.")
    if not 0 <= keep <= len(old) - 2:
        raise ValueError(f"`keep` must be in [0, {len(old) - 2}] for {len(old)} text positions, got {keep}.")
    steps = torch.arange(length - keep, device=old.device) * (len(old) - keep)
    # Positions after the last one are extrapolated from the last two, with a share above one.
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
