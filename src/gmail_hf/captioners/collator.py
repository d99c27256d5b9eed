"""Captions with cached image embeddings, batches of them, and generating captions from embeddings."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from ..training.embeddings import evaluating
from .bank import CaptionBank
from .modeling_captioner import IGNORED, MAX_NEW_TOKENS


def check_captions(pairs: Dataset, name: str = "caption") -> None:
    """
    Check all rows of the column `caption` before training.

    Args:
        pairs (`datasets.Dataset`): rows with the column `caption`.
        name (`str`): the column's name in error messages.

    Raises:
        ValueError: a row is not a text, for example None, blank or a list of captions.
    """
    captions = (caption for batch in pairs.select_columns(["caption"]).iter(1000) for caption in batch["caption"])
    for row, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(
                f"Column '{name}', row {row}: {caption!r} is not a caption. Each row needs one text. Repeat the image "
                "for each of its captions, and remove rows without a caption."
            )


def captioned_embeds(pairs: Dataset, embeds: Dataset) -> Dataset:
    """
    Join captions with the embeddings of an image column from [`cached_embeds`], without copying either.

    Args:
        pairs (`datasets.Dataset`): rows with the columns `caption` and `image_id`.
        embeds (`datasets.Dataset`): their `image_embeds`, row by row. Rows without an embedding, or with one that is
            not finite, are left out.

    Returns:
        `datasets.Dataset` with the columns `image_embeds` (float32 arrays of shape `(embed_dim,)`), `caption` and
        `image_id`.

    Raises:
        ValueError: no image could be read.
    """
    columns = (batch.column("image_embeds") for batch in embeds.with_format("arrow").iter(10_000))
    readable = np.flatnonzero(np.concatenate([[], *map(_readable, columns)]))
    if len(readable) == 0:
        raise ValueError("None of the images can be read.")
    rows = concatenate_datasets([pairs.select_columns(["caption", "image_id"]), embeds], axis=1)
    if len(readable) < len(rows):
        rows = rows.select(readable)
    return rows.with_format("numpy", columns=["image_embeds"], output_all_columns=True)


def _readable(column: pa.ChunkedArray) -> np.ndarray:
    """Whether the rows of a column of embeddings have one, `(rows,)` bool."""
    valid = np.array(column.is_valid())
    if valid.any():
        values = column.drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
        valid[valid] = np.isfinite(values.reshape(valid.sum(), -1)).all(axis=1)
    return valid


def with_caption_rows(rows: Dataset, bank: CaptionBank) -> Dataset:
    """
    Add the column `caption_rows`, the captions' row numbers in the bank, for training an IFCap.

    Raises:
        KeyError: a caption is not in the bank.
    """
    places = {caption: place for place, caption in enumerate(bank.captions)}
    return rows.add_column("caption_rows", [places[caption] for caption in rows["caption"]])


def group_references(captions: list[str], image_ids: list[Any]) -> tuple[list[int], list[list[str]]]:
    """
    Group captions by image.

    Args:
        captions, image_ids: one of each per row.

    Returns:
        `(rows, references)`: for each image its first row, and all of its captions.
    """
    rows: dict[Any, int] = {}
    references: dict[Any, list[str]] = {}
    for row, (caption, image_id) in enumerate(zip(captions, image_ids, strict=True)):
        rows.setdefault(image_id, row)
        references.setdefault(image_id, []).append(caption)
    return list(rows.values()), list(references.values())


class CaptionCollator:
    """
    Turn rows of [`captioned_embeds`] and [`with_caption_rows`] into the arguments of a captioner's `forward`.

    Args:
        tokenizer: the language model's tokenizer, which needs an end-of-text token.
        max_length (`int`): maximum number of tokens of a caption, including its end-of-text token; longer captions are
            truncated.

    Returns of a call:
        `input_ids`, `attention_mask` and `labels` `(batch, tokens)` int64: each caption and its end-of-text token,
        padded on the right; labels are -100 on padding. If the rows have them, also `image_embeds`
        `(batch, embed_dim)` float32 and `caption_rows` `(batch,)` int64.
    """

    def __init__(self, tokenizer: Any, max_length: int = MAX_NEW_TOKENS):
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        captions = self.tokenizer([row["caption"] for row in rows], add_special_tokens=False)["input_ids"]
        captions = [(ids + [self.tokenizer.eos_token_id])[: self.max_length] for ids in captions]
        shape = len(captions), max(map(len, captions))
        # The end-of-text token may also be the padding token, so labels are masked by position.
        input_ids = torch.full(shape, self.tokenizer.eos_token_id)  # (batch, tokens)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for row, ids in enumerate(captions):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        batch = {}
        if "image_embeds" in rows[0]:
            embeds = np.stack([row["image_embeds"] for row in rows]).astype(np.float32)
            batch["image_embeds"] = torch.from_numpy(embeds)
        if "caption_rows" in rows[0]:
            batch["caption_rows"] = torch.tensor([row["caption_rows"] for row in rows])
        return {
            **batch,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": input_ids.masked_fill(attention_mask == 0, IGNORED),
        }


def caption_embeds(
    model: Any, tokenizer: Any, embeds: np.ndarray, batch_size: int = 64, desc: str | None = None, **kwargs: Any
) -> list[str]:
    """
    Generate captions for image embeddings.

    Args:
        model ([`Captioner`]): the model, which is used in evaluation mode.
        tokenizer: the language model's tokenizer.
        embeds (`np.ndarray` of shape `(images, embed_dim)`): float32.
        batch_size (`int`): images per forward pass.
        desc (`str`, *optional*): title of the progress bar. By default there is no bar.
        kwargs: arguments of `generate`, such as `num_beams`.

    Returns:
        One caption per image, without special tokens and surrounding spaces.

    Raises:
        ValueError: an embedding is not finite, for example because its image is unreadable; the message has its row.
    """
    bad = [row for row, embed in enumerate(embeds) if not np.isfinite(embed).all()]
    if bad:
        raise ValueError(f"The embedding in row {bad[0]} is not finite. Leave out unreadable images.")
    captions: list[str] = []
    with evaluating(model):
        for start in tqdm(range(0, len(embeds), batch_size), desc=desc, disable=desc is None, unit="batch"):
            batch = torch.from_numpy(embeds[start : start + batch_size]).to(model.device)
            tokens = model.generate(image_embeds=batch, **kwargs)
            captions += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return captions
