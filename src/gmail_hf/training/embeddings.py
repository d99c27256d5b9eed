"""Image embeddings of whole data sets, and the cache of those that a frozen branch gives."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers.utils import logging

from .data import BadImageError, decode_image, image_processor_of, undecoded
from .images import PixelValues

# Rows of one file of the cache: the unit that an interrupted run computes again.
CACHE_SHARD_ROWS = 8192

logger = logging.get_logger(__name__)


@torch.no_grad()
def embed_images(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    modality: str = "real",
    batch_size: int = 64,
    desc: str | None = None,
) -> np.ndarray:
    """
    L2-normalised embeddings of images through one branch.

    Args:
        model ([`GmailCLIPModel`]): the model; it is used in evaluation mode.
        processor: a `CLIPProcessor` or an image processor.
        images: a sized iterable of images, such as a column of a data set; see [`decode_image`].
        modality (`str`): the branch.
        batch_size (`int`): images a forward pass.
        desc (`str`, *optional*): title of the progress bar; without one there is no bar.

    Returns:
        `np.ndarray` of shape `(images, projection_dim)`, float32.

    Raises:
        ValueError: an image cannot be read; the message tells its index. Unknown modality.
    """
    embeds: list[np.ndarray] = []
    values, done = PixelValues(image_processor_of(processor)), 0
    total = len(images) if hasattr(images, "__len__") else None
    with tqdm(total=total, desc=desc, disable=desc is None, unit="image") as bar, _evaluating(model):
        for batch in batches(images, batch_size):
            decoded = []
            for image in batch:
                try:
                    decoded.append(decode_image(image))
                except BadImageError as error:
                    raise ValueError(f"Image {done + len(decoded)}: {error}.") from error
            embeds.append(_embed(model, values, decoded, modality))
            done += len(batch)
            bar.update(len(batch))
    return np.concatenate(embeds) if embeds else np.zeros((0, model.config.projection_dim), np.float32)


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _embed(model: Any, values: PixelValues, images: list[PILImage.Image], modality: str) -> np.ndarray:
    return model.embed_images(values(images).to(model.device), modality).float().cpu().numpy()


class _evaluating:
    """Evaluation mode for a block."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *error: Any) -> None:
        self.model.train(self.was_training)


def cached_embeds(
    dataset: Dataset,
    column: str,
    model: Any,
    processor: Any,
    modality: str = "real",
    batch_size: int = 64,
    on_bad_image: str = "skip",
    barrier: Callable[[], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Dataset:
    """
    The embeddings of an image column by a frozen branch, computed once and kept on disk as Arrow files.

    The files lie in the cache folder of `datasets` under a key of the branch's weights, the image processor and the
    data, so that a change of any of them makes new files. They are memory-mapped, written shard by shard (an
    interrupted run goes on with the next shard), and shared by the processes of a distributed run, each of which
    computes its part.

    Args:
        dataset (`datasets.Dataset`): rows with an image column.
        column (`str`): that column.
        model ([`GmailCLIPModel`]), processor, modality: as in [`embed_images`].
        batch_size (`int`): images a forward pass.
        on_bad_image (`str`): `"skip"` stores None for an unreadable image, with a warning; `"error"` raises.
        barrier, rank, world_size: how the processes of a distributed run meet.

    Returns:
        `datasets.Dataset` with the column `image_embeds`: float32 lists of `projection_dim`, L2-normalised, or None.
    """
    dataset = undecoded(dataset.select_columns([column]))
    key = cache_key(dataset, column, model, processor, modality)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "gmail_hf", key)
    folder.mkdir(parents=True, exist_ok=True)
    values = PixelValues(image_processor_of(processor))
    dim = model.config.projection_dim
    features = datasets.Features({"image_embeds": datasets.List(datasets.Value("float32"), length=dim)})

    def embed_batch(batch: dict[str, list], indices: list[int], first_row: int) -> dict[str, list]:
        images, rows = [], []
        for row, cell in enumerate(batch[column]):
            try:
                images.append(decode_image(cell))
                rows.append(row)
            except BadImageError as error:
                where = f"Column '{column}', row {first_row + indices[row]}"
                if on_bad_image == "error":
                    raise ValueError(f"{where}: {error}.") from error
                logger.warning(f"{where}: {error}; the pair will be skipped.")
        embeds: list = [None] * len(batch[column])
        if images:
            for row, embed in zip(rows, _embed(model, values, images, modality), strict=True):
                embeds[row] = embed
        return {"image_embeds": embeds}

    def load_or_compute(shard: int) -> Dataset:
        rows = range(shard * CACHE_SHARD_ROWS, min((shard + 1) * CACHE_SHARD_ROWS, len(dataset)))
        name = f"{shard:05d}"
        return dataset.select(rows).map(
            embed_batch,
            with_indices=True,
            fn_kwargs={"first_row": rows.start},
            batched=True,
            batch_size=batch_size,
            remove_columns=[column],
            features=features,
            cache_file_name=str(folder / f"{name}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=f"{key}-{name}",
            desc=f"Embedding {column} by {modality} ({shard + 1}/{shards})",
        )

    shards = -(-len(dataset) // CACHE_SHARD_ROWS)
    with torch.no_grad(), _evaluating(model):
        for shard in range(rank, shards, world_size):
            load_or_compute(shard)
        if barrier is not None:
            barrier()
        # Where the processes share no folder, this computes what the others did not leave here.
        return datasets.concatenate_datasets([load_or_compute(shard) for shard in range(shards)])


def embeds_array(embeds: Dataset) -> np.ndarray:
    """The column `image_embeds` of [`cached_embeds`] as float32 `(rows, dim)`; NaN where there is none."""
    column = embeds.with_format("arrow")[:]["image_embeds"].combine_chunks()
    readable = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.drop_null().flatten().to_numpy().reshape(readable.sum(), -1)
    array = np.full((len(embeds), values.shape[1]), np.nan, np.float32)
    array[readable] = values
    return array


class EmbeddedPairs(torch.utils.data.Dataset):
    """
    Pairs whose images are replaced by their embeddings (None where an image could not be read), without copying a row
    of either.

    Args:
        pairs (`datasets.Dataset`): see [`check_pairs`].
        real, generated (`datasets.Dataset`, *optional*): embeddings of the pairs' real and generated images, row by
            row, in a column `image_embeds`, as from [`cached_embeds`].
        partners (`np.ndarray` of shape `(pairs,)`, *optional*): the row whose real image each generated image gets.
    """

    def __init__(
        self,
        pairs: Dataset,
        real: Dataset | None = None,
        generated: Dataset | None = None,
        partners: np.ndarray | None = None,
    ):
        embeds = {"real": real, "generated": generated}
        images = [f"{side}_image" for side, given in embeds.items() if given is None]
        kept = ["caption", *(column for column in images if column in pairs.column_names)]
        self.pairs = undecoded(pairs.select_columns(kept))
        self.image_ids = pairs.select_columns(["image_id"])
        self.embeds = {side: given for side, given in embeds.items() if given is not None}
        self.partners = np.arange(len(pairs)) if partners is None else partners

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        partners = self.partners[indices].tolist()
        columns = {"image_id": self.image_ids[partners]["image_id"]}
        for side, embeds in self.embeds.items():
            columns[f"{side}_embeds"] = embeds[partners if side == "real" else indices]["image_embeds"]
        return [
            {**row, **dict(zip(columns, values, strict=True))}
            for row, values in zip(self.pairs.__getitems__(indices), zip(*columns.values(), strict=True), strict=True)
        ]


def cache_key(dataset: Dataset, column: str, model: Any, processor: Any, modality: str = "real") -> str:
    """A hash of all that decides the cached embeddings: the branch's weights and their use, image processor, data."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("vision_model.", "visual_projection.")) and _serves(name, modality):
            digest.update(name.encode() + str(tensor.dtype).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    vision_config = model.config.vision_config
    shape = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size")  # what the weights do not tell
    if modality in vision_config.trainable_modalities:
        shape += ("lora_alpha",)
    digest.update(str([getattr(vision_config, name) for name in shape]).encode())
    settings = json.loads(image_processor_of(processor).to_json_string())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(f"{column} {len(dataset)} {dataset._fingerprint}".encode())
    # Images kept as paths can change without the data set's fingerprint noticing.
    for path in _paths(dataset, column):
        stat = os.stat(path) if os.path.exists(path) else None
        digest.update(f"{path} {(stat.st_mtime_ns, stat.st_size) if stat else None}".encode())
    return digest.hexdigest()


def _serves(weight: str, modality: str) -> bool:
    """Whether a branch uses a weight: the shared ones and its own, not those of other branches."""
    parts = weight.split(".")
    for container in ("adapters", "branches"):
        if container in parts:
            return parts[parts.index(container) + 1] == modality
    return True


def _paths(dataset: Dataset, column: str) -> Iterator[str]:
    """Paths of the images that the data set refers to without holding their bytes."""
    for chunk in dataset.data.column(column).chunks:
        for path, held in zip(chunk.field("path"), chunk.field("bytes").is_valid(), strict=True):
            if not held.as_py() and path.is_valid:
                yield path.as_py()
