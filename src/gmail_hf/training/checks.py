"""Checks of a data set of pairs before training starts."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset

from .arguments import GmailTrainingArguments
from .columns import is_missing
from .data import PAIR_COLUMNS, SIDES, BadImageError, caption_ids, column_names, decode_image, undecoded
from .losses import GmailLossConfig


def needed_columns(losses: GmailLossConfig) -> tuple[str, ...]:
    """The columns that the losses need, for [`check_pairs`]; captions and ids tell which pairs are not negatives."""
    images = {"real_image": losses.needs_real, "generated_image": losses.needs_generated}
    return (*(column for column, needed in images.items() if needed), "caption", "image_id")


def check_for_training(dataset: Any, name: str, model: Any, args: GmailTrainingArguments) -> None:
    """
    Check a data set that is passed to [`GmailTrainer`].

    Args:
        dataset: the pairs.
        name: its name in error messages; any other than `"train_dataset"` is for evaluation.
        model ([`GmailCLIPModel`]): the model, with all parameters frozen that will not train.
        args ([`GmailTrainingArguments`]): the settings.

    Raises:
        TypeError: `dataset` is not a data set of the datasets library.
        ValueError: see [`check_pairs`]; an evaluation set is streamed to several processes; batches have one pair, or
            `dataloader_drop_last` leaves none; there are embeddings for a branch that trains, or together with
            `token_weight`.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"{name} must be a data set of the datasets library, got {type(dataset).__name__}.")
    if isinstance(dataset, IterableDataset) and name != "train_dataset" and args.world_size > 1:
        # Shards of different lengths would make the processes wait for each other forever.
        raise ValueError(
            f"{name} is streamed, which is not supported with several processes: evaluate in one process."
        )
    whole = (args.train_batch_size if name == "train_dataset" else args.eval_batch_size) * args.world_size
    if args.dataloader_drop_last and isinstance(dataset, Dataset) and 0 < len(dataset) < whole:
        raise ValueError(
            f"{name} has {len(dataset)} pairs, fewer than one batch of {whole} in all processes, which "
            "`dataloader_drop_last` leaves out. Use smaller batches, or set `dataloader_drop_last=False`."
        )
    batch = args.train_batch_size * (args.world_size if args.gather_negatives else 1)
    if isinstance(dataset, Dataset):
        batch = min(batch, len(dataset))
    if batch == 1 and name == "train_dataset" and not args.learns_from_one_pair:
        raise ValueError(
            "A batch of one pair has no negatives, so the loss would always be 0. Use two or more pairs and a "
            "`per_device_train_batch_size` of 2 or more; gradient accumulation adds no negatives."
        )
    options = {"embed_dim": model.embed_dim, "with_negatives": args.needs_negatives}
    check_pairs(dataset, name, args.on_bad_image, needed_columns(args), **options)
    for side in SIDES:
        if f"{side}_embeds" not in column_names(dataset):
            continue
        remedy = f"Provide '{side}_image' instead, and remove the column with `dataset.remove_columns`."
        if model.trains(args.branches[side]):
            raise ValueError(
                f"{name} has '{side}_embeds', but the `{args.branches[side]}` branch trains, which changes its "
                f"embeddings at every step. {remedy}"
            )
        if args.token_weight > 0:
            raise ValueError(f"{name} has '{side}_embeds', but `token_weight` compares patch tokens. {remedy}")


def check_pairs(
    dataset: Dataset | IterableDataset,
    name: str = "train_dataset",
    on_bad_image: str = "skip",
    needed: Sequence[str] = PAIR_COLUMNS,
    sample: int = 8,
    embed_dim: int | None = None,
    with_negatives: bool = True,
) -> None:
    """
    Check the columns and types of a data set of pairs, and read a sample of the pairs.

    Args:
        dataset: the pairs.
        name: its name in error messages.
        on_bad_image: see [`GmailCollator`].
        needed: the columns that must exist, see [`needed_columns`]. `real_embeds` can replace `real_image`, and
            `generated_embeds` can replace `generated_image`.
        sample: how many pairs to read.
        embed_dim (`int`, *optional*): the required length of embeddings.
        with_negatives (`bool`): refuse pairs that all share a caption or an id, for losses that need negatives.

    Raises:
        ValueError: the data set is empty; a column is missing, has the wrong type or holds the same value in all rows;
            embeddings have the wrong length; a caption or id is missing; none of the sampled pairs can be read (with
            `on_bad_image="error"`, one of them cannot be read). In a streamed data set only the sample is checked.
    """
    rows = list(_sample_rows(undecoded(dataset), sample))
    if not rows:
        raise ValueError(f"{name} is empty.")
    columns = column_names(dataset)
    replaced = {f"{side}_image": f"{side}_embeds" for side in SIDES if f"{side}_embeds" in columns}
    missing = [column for column in needed if column not in columns and column not in replaced]
    if missing:
        raise ValueError(
            f"{name} lacks the column(s) {missing}; it has {columns}. The losses need {list(needed)}. Rename columns "
            "with `dataset.rename_column(old, new)`, or with the --*_column flags of `gmail-hf train`."
        )
    images = [f"{side}_image" for side in SIDES if f"{side}_image" in needed and f"{side}_image" not in replaced]
    for column in images:
        feature = (dataset.features or {}).get(column)
        if feature is not None and not isinstance(feature, Image):
            raise ValueError(
                f"Column '{column}' of {name} is {feature}, not an image. Cast it with "
                f"`dataset.cast_column('{column}', datasets.Image())`."
            )
    failures = []
    for row in rows:
        if not isinstance(row["caption"], str):
            raise ValueError(f"Column 'caption' of {name} holds {type(row['caption']).__name__}, not text.")
        if is_missing(row["image_id"]):
            raise ValueError(f"Column 'image_id' of {name} has empty cells. Each real image needs an id.")
        try:
            for column in images:
                decode_image(row[column])
            for column in replaced.values():
                _check_embedding(row[column], column, name, embed_dim)
        except BadImageError as error:
            failures.append(f"the pair with image_id {row['image_id']}: {error}")
    if len(failures) == len(rows) or (failures and on_bad_image == "error"):
        raise ValueError(
            f"{len(failures)} of {len(rows)} sampled pairs of {name} cannot be read. The first is {failures[0]}."
        )
    if isinstance(dataset, Dataset):  # the first rows of a stream say little about the others
        _check_ids(dataset, rows, name, with_negatives)
        for column in replaced.values():
            _check_lengths(dataset, column, name)


def _check_embedding(value: Any, column: str, name: str, dim: int | None) -> None:
    if value is None:
        raise BadImageError(f"no embedding in '{column}'")
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.shape != (dim or array.size,):
        raise ValueError(
            f"Column '{column}' of {name} holds {array.dtype} of shape {array.shape}. Each row needs one embedding, a "
            f"list of {dim or array.size} floats."
        )
    if not np.isfinite(array).all():
        raise BadImageError(f"the embedding in '{column}' is not finite")


def _check_lengths(dataset: Dataset, column: str, name: str) -> None:
    lengths = set()
    for values in dataset.select_columns([column]).with_format("arrow").iter(batch_size=100_000):
        lengths.update(pc.unique(pc.list_value_length(values[column])).to_pylist())
    if len(lengths - {None}) > 1:
        raise ValueError(
            f"Column '{column}' of {name} holds embeddings of different lengths: {sorted(lengths - {None})}."
        )


def _check_ids(dataset: Dataset, rows: list[dict], name: str, with_negatives: bool) -> None:
    """Refuse pairs without a caption or an id, and, if a loss needs negatives, pairs that all share one."""
    for column in ("caption", "image_id"):
        start = 0
        for values in dataset.select_columns([column]).with_format("arrow").iter(batch_size=100_000):
            absent = [is_missing(value) or str(value).isspace() for value in values[column].to_pylist()]
            if any(absent):
                kept = f"{column} == {column} and str({column} or '').strip()"  # NaN equals nothing
                raise ValueError(
                    f"Row {start + absent.index(True)} of {name} has no '{column}'. Remove such rows with "
                    f"`dataset.filter(lambda {column}: {kept}, input_columns='{column}')`."
                )
            start += len(values)
        same = caption_ids if column == "caption" else list  # captions that differ only in case and spaces are equal
        if not with_negatives or len(rows) == 1 or len(set(same([row[column] for row in rows]))) > 1:
            continue
        if len(set(same(dataset[column][:]))) == 1:
            raise ValueError(
                f"All rows of {name} have {column}={rows[0][column]!r}. Pairs with the same {column} are never "
                "negatives, so the loss would be constant."
            )


def pairs_digest(pairs: Dataset | IterableDataset | None) -> str | None:
    """A digest of the number of pairs and of the captions and ids of up to 64 of them; None for streamed pairs."""
    if not isinstance(pairs, Dataset):
        return None
    rows = _sample_rows(pairs.select_columns(["caption", "image_id"]).with_format(None), 64)
    sample = [(row["caption"], str(row["image_id"])) for row in rows]
    return hashlib.blake2b(str([len(pairs), sample]).encode(), digest_size=16).hexdigest()


def _sample_rows(dataset: Dataset | IterableDataset, sample: int) -> Iterable[dict]:
    if isinstance(dataset, IterableDataset):
        return dataset.take(sample)
    if len(dataset) == 0:
        return []
    indices = np.unique(np.linspace(0, len(dataset) - 1, sample).astype(int))
    return dataset.select(indices)
