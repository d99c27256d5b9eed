"""Distances between the distributions of generated and real embeddings of each caption."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .distributed import gather


def energy_distance_loss(
    gen_embeds: torch.Tensor,
    real_embeds: torch.Tensor,
    caption_ids: torch.Tensor | None = None,
    real_caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Energy distance between generated and real embeddings of each caption (Szekely & Rizzo, 2013). Not in the paper.

        L = sum_c n_c / n  (2 mean ||g - r|| - mean ||g - g'|| - mean ||r - r'||)

    The means are over the images of caption c. The last two are over pairs of different images, and 0 if there is only
    one image. n_c is the number of generated images of caption c. With two or more images of each modality, the term
    of a caption is an unbiased estimate for all its images, and can fall below 0 by chance. The term of
    [`sliced_wasserstein_loss`] is biased: it favours embeddings with too little spread if a batch has few images per
    caption.

    The loss compares distributions and needs no partners within a caption. If a caption has one image of each
    modality, its term is twice the pair's distance. Captions without images of one modality are left out.

    Args:
        gen_embeds (`torch.FloatTensor` of shape `(generated, dim)`): L2-normalised.
        real_embeds (`torch.FloatTensor` of shape `(real, dim)`): L2-normalised.
        caption_ids, real_caption_ids: as in [`sliced_wasserstein_loss`].

    Returns:
        `torch.FloatTensor` of shape `()`.
    """
    caption_ids, real_caption_ids = _ids_of_both(gen_embeds, real_embeds, caption_ids, real_caption_ids)
    same = caption_ids[:, None] == real_caption_ids  # (generated, real)
    between = _mean_where(torch.cdist(gen_embeds, real_embeds), same)
    within_gen, within_real = (
        _mean_where(torch.cdist(embeds, embeds), (ids[:, None] == ids).fill_diagonal_(False))
        for embeds, ids in ((gen_embeds, caption_ids), (real_embeds, real_caption_ids))
    )
    within_real = _mean_where(within_real.expand_as(same), same)
    terms = (2 * between - within_gen - within_real) * same.any(dim=1)  # (generated,)
    return terms.sum() / same.any(dim=1).sum().clamp(min=1)


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of each row of `(rows, columns)` over its masked columns, 0 if there are none."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _ids_of_both(
    gen_embeds: torch.Tensor,
    real_embeds: torch.Tensor,
    caption_ids: torch.Tensor | None,
    real_caption_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if caption_ids is None:
        return gen_embeds.new_zeros(len(gen_embeds)), real_embeds.new_zeros(len(real_embeds))
    return caption_ids, caption_ids if real_caption_ids is None else real_caption_ids


def sliced_wasserstein_loss(
    gen_embeds: torch.Tensor,
    real_embeds: torch.Tensor,
    directions: torch.Tensor,
    caption_ids: torch.Tensor | None = None,
    real_caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Squared sliced Wasserstein distance between generated and real embeddings of each caption (Rabin et al., 2012;
    Bonneel et al., 2015). Not in the paper.

        L = sum_c n_c / n  mean_k  int_0^1 (F_ck^-1(t) - G_ck^-1(t))^2 dt

    F_ck^-1 and G_ck^-1 are the quantile functions of the generated and the real embeddings of caption c, projected on
    direction k; n_c is the number of its generated images. With equal numbers of generated and real images, the
    integral is the mean squared difference of the sorted projections. With n and m images, the quantile functions have
    steps of width 1/n and 1/m, and the integral is computed exactly over the union of both sets of steps.

    The loss compares distributions and needs no partners within a caption. If a caption has one image of each
    modality, its term is the pair's squared distance in the span of the directions, `||g - r||^2 / dim` on average.
    Captions without images of one modality are left out.

    Args:
        gen_embeds (`torch.FloatTensor` of shape `(generated, dim)`): L2-normalised.
        real_embeds (`torch.FloatTensor` of shape `(real, dim)`): L2-normalised.
        directions (`torch.FloatTensor` of shape `(dim, projections)`): unit columns, see [`random_directions`].
        caption_ids (`torch.LongTensor` of shape `(generated,)`, *optional*): equal numbers mean the same caption. By
            default all images have the same caption.
        real_caption_ids (`torch.LongTensor` of shape `(real,)`, *optional*): the same for the real images; defaults to
            `caption_ids`.

    Returns:
        `torch.FloatTensor` of shape `()`, at least 0.
    """
    caption_ids, real_caption_ids = _ids_of_both(gen_embeds, real_embeds, caption_ids, real_caption_ids)
    generated = _sorted_within(gen_embeds @ directions, caption_ids)
    real = _sorted_within(real_embeds @ directions, real_caption_ids)
    caption_ids, real_caption_ids = caption_ids.sort().values, real_caption_ids.sort().values
    if torch.equal(caption_ids, real_caption_ids):
        return (generated - real).square().mean()
    steps = _quantile_steps(caption_ids.cpu().numpy(), real_caption_ids.cpu().numpy())
    gen_rows, real_rows, widths = (torch.from_numpy(part).to(generated.device) for part in steps)
    squares = (generated[gen_rows] - real[real_rows]).square().mean(dim=1)
    return (widths.to(squares.dtype) * squares).sum()


def token_sliced_wasserstein_loss(
    gen_tokens: torch.Tensor,
    real_tokens: torch.Tensor,
    directions: torch.Tensor,
    caption_ids: torch.Tensor | None = None,
    gather_tokens: bool = True,
) -> torch.Tensor:
    """
    [`sliced_wasserstein_loss`] between the patch tokens of the generated and real images of each caption. Not in the
    paper.

    Each channel is first divided by its standard deviation over the real tokens. Positions are ignored, because images
    that share a caption do not share a layout. [`token_alignment_loss`] compares the tokens of all captions together.

    Args:
        gen_tokens, real_tokens (`torch.FloatTensor` of shape `(pairs, tokens, hidden)`): as in
            [`token_alignment_loss`].
        directions (`torch.FloatTensor` of shape `(hidden, projections)`): unit columns, see [`random_directions`].
        caption_ids (`torch.LongTensor` of shape `(pairs,)`, *optional*): as in [`sliced_wasserstein_loss`].
        gather_tokens (`bool`): in distributed training, compare the tokens of all processes. Each process then sends
            `tokens * projections` numbers per image.

    Returns:
        `torch.FloatTensor` of shape `()`, at least 0.
    """
    across = gather if gather_tokens else lambda rows: rows
    scale = _standard_deviation(real_tokens.detach().flatten(0, 1), across).clamp_min(1e-3)
    directions = directions / scale[:, None]
    # Gather tokens as rows, because a process without pairs does not know the number of tokens per image.
    generated, real = (across(tokens.flatten(0, 1) @ directions) for tokens in (gen_tokens, real_tokens))
    if caption_ids is not None:
        caption_ids = across(caption_ids.repeat_interleave(gen_tokens.shape[1]))
    return sliced_wasserstein_loss(generated, real, torch.eye(directions.shape[1]).to(generated), caption_ids)


def _standard_deviation(rows: torch.Tensor, across: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The standard deviation of each column of `(rows, columns)`, over the rows that `across` gathers."""
    count = across(rows.new_tensor([len(rows)])).sum()
    mean = across(rows.sum(dim=0, keepdim=True)).sum(dim=0) / count
    return (across((rows - mean).square().sum(dim=0, keepdim=True)).sum(dim=0) / count).sqrt()


def random_directions(dim: int, count: int, seed: int) -> torch.Tensor:
    """`count` uniform directions on the unit sphere, `(dim, count)` float32 on the CPU, equal on every machine."""
    directions = torch.randn(dim, count, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(directions, dim=0)


def _sorted_within(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sort each column of `(rows, columns)` by id, then by value."""
    order = values.argsort(dim=0)
    order = order.gather(0, ids[order].argsort(dim=0, stable=True))
    return values.gather(0, order)


def _quantile_steps(gen_ids: np.ndarray, real_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The union of the steps of both quantile functions, for each id that occurs in both sorted arrays.

    Returns:
        For each step, the row of the generated value, the row of the real value, and the width. The widths of all ids
        sum to 1.
    """
    gen_rows, real_rows, widths = [], [], []
    for found in np.intersect1d(gen_ids, real_ids):
        (gen_start, gen_end), (real_start, real_end) = (
            (np.searchsorted(ids, found), np.searchsorted(ids, found, side="right")) for ids in (gen_ids, real_ids)
        )
        n, m = gen_end - gen_start, real_end - real_start
        ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m)
        gen_rows.append(gen_start + (ends - 1) // m)
        real_rows.append(real_start + (ends - 1) // n)
        widths.append(np.diff(ends, prepend=0) / m)  # n times their share of the caption
    if not widths:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    shares = np.concatenate(widths)
    return np.concatenate(gen_rows), np.concatenate(real_rows), shares / shares.sum()
