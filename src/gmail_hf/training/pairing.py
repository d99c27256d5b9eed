"""Partners for generated images if many real images share a caption, and batches with several pairs per caption."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState

from .columns import rows_by_caption


def optimal_pairing(
    gen_embeds: np.ndarray, real_embeds: np.ndarray, captions: Sequence[Any], max_group: int = 1024, seed: int = 0
) -> np.ndarray:
    """
    Re-pair generated and real images within each caption by the assignment with the largest total cosine similarity.

    If captions are class names, a random partner shares little more than the class with its generated image, and
    Eq. 1 then separates the modalities. The assignment of Kuhn (1955) in the space of the frozen real branch avoids
    that. Not in the paper.

    Args:
        gen_embeds (`np.ndarray` of shape `(pairs, dim)`): generated images through the `real` branch, L2-normalised.
        real_embeds (same shape): real images through the `real` branch, L2-normalised.
        captions (of length `pairs`): texts, or ids from [`caption_ids`]. Pairs with equal captions form a group.
        max_group (`int`): larger groups are split at random, because the cost of an assignment is cubic in its size.
        seed (`int`): seed of the random split.

    Returns:
        `np.ndarray` of shape `(pairs,)`, int64: a permutation, the row of the real partner of each generated image.

    Raises:
        ImportError: scipy is missing.
        ValueError: the lengths differ, or an embedding is not finite.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('pairing="optimal" needs scipy: pip install "gmail-hf[evaluation]".') from error
    if not len(gen_embeds) == len(real_embeds) == len(captions):
        raise ValueError(
            f"Expected equal numbers, got {len(gen_embeds)} generated and {len(real_embeds)} real embeddings for "
            f"{len(captions)} captions."
        )
    for name, embeds in (("gen_embeds", gen_embeds), ("real_embeds", real_embeds)):
        bad = np.flatnonzero(~np.isfinite(embeds).all(axis=1))
        if len(bad):
            raise ValueError(f"`{name}` row {bad[0]} is not finite.")
    rng = np.random.default_rng(seed)
    partners = np.arange(len(captions))
    for group in rows_by_caption(captions).values():
        parts = np.array_split(rng.permutation(group), -(-len(group) // max_group)) if len(group) > 1 else []
        for rows in parts:
            generated, real = linear_sum_assignment(gen_embeds[rows] @ real_embeds[rows].T, maximize=True)
            partners[rows[generated]] = rows[real]
    return partners


def random_pairing(captions: Sequence[Any], seed: int, epoch: int) -> np.ndarray:
    """The row of the real partner of each generated image, `(pairs,)` int64: a random permutation in each caption."""
    rng = np.random.default_rng([seed, epoch])
    partners = np.arange(len(captions))
    for group in rows_by_caption(captions).values():
        partners[group] = rng.permutation(group)
    return partners


class CaptionSampler(Sampler[int]):
    """
    Sample all rows in random order, with the rows of a caption in blocks.

    Args:
        captions: the caption of each row. Rows with equal captions form blocks.
        images_per_caption (`int`): rows per block. The remaining rows of a caption form a smaller block.
        seed (`int`): seed of the order, combined with the epoch. All processes need the same seed.
    """

    def __init__(self, captions: Sequence[Any], images_per_caption: int, seed: int = 0):
        self.groups = list(rows_by_caption(captions).values())
        self.size, self.images_per_caption, self.seed, self.epoch = len(captions), images_per_caption, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        blocks = []
        for group in self.groups:
            group = rng.permutation(group)
            blocks += np.split(group, range(self.images_per_caption, len(group), self.images_per_caption))
        for block in rng.permutation(len(blocks)):
            yield from blocks[block].tolist()


class EpochCallback(TrainerCallback):
    """
    Call `set_epoch` of the data set and the sampler. The data loaders of accelerate do not do so for the data set in
    distributed runs, nor for either of them in the first epoch of some resumed runs.
    """

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        batches = train_dataloader
        while getattr(batches, "batch_sampler", None) is not None:
            batches = batches.batch_sampler
        for part in (train_dataloader.dataset, getattr(batches, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch))
