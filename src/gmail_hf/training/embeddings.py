"""Image embeddings of data sets, and the cache for the embeddings of a frozen branch."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, is_progress_bar_enabled
from datasets.arrow_writer import ArrowWriter
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers.utils import logging

from ..branches.configuration import AUTO
from ..branches.tower import adapter_of
from ..files import try_lock, write_file
from ..models.base import text_options
from .columns import paths_of
from .data import BadImageError, bad_images, decode_image, image_processor_of, undecoded
from .images import PixelValues

# Rows per cache file. An interrupted run recomputes at most one file.
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
        model ([`GmailCLIPModel`]): the model, which is used in evaluation mode.
        processor: a `CLIPProcessor` or an image processor.
        images: an iterable of images, such as a column of a data set; see [`decode_image`].
        modality (`str`): the branch.
        batch_size (`int`): images per forward pass.
        desc (`str`, *optional*): title of the progress bar. By default there is no bar.

    Returns:
        `np.ndarray` of shape `(images, dim)`, float32.

    Raises:
        ValueError: an image cannot be read (the message has its index), or the modality is unknown.
    """
    embeds: list[np.ndarray] = []
    values, done = PixelValues(image_processor_of(processor)), 0
    total = len(images) if hasattr(images, "__len__") else None
    with tqdm(total=total, desc=desc, disable=desc is None, unit="image") as bar, evaluating(model):
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
    return np.concatenate(embeds) if embeds else np.zeros((0, model.embed_dim), np.float32)


@torch.no_grad()
def embed_texts(
    model: Any, tokenizer: Any, texts: list[str], batch_size: int = 64, desc: str | None = None
) -> np.ndarray:
    """
    L2-normalised embeddings of texts, each truncated to the model's context length.

    Args:
        model ([`GmailCLIPModel`], `CLIPModel` or another base): the model in evaluation mode.
        tokenizer: the model's tokenizer.
        texts: texts such as captions.
        batch_size (`int`): texts per forward pass.
        desc (`str`, *optional*): title of the progress bar. By default there is no bar.

    Returns:
        `np.ndarray` of shape `(texts, dim)`, float32.

    Raises:
        ValueError: an embedding is not finite; the message has its row.
    """
    embeds: list[np.ndarray] = []
    with tqdm(desc=desc, unit="text", disable=desc is None, total=len(texts)) as bar:
        for batch in batches(texts, batch_size):
            tokens = tokenizer(batch, **text_options(model), return_tensors="pt").to(model.device)
            names = [name for name in ("input_ids", "attention_mask") if name in tokens]
            features = model.get_text_features(**{name: tokens[name] for name in names}).pooler_output
            embeds.append(unit_rows(features, sum(map(len, embeds)), "The embedding of text"))
            bar.update(len(batch))
    return np.concatenate(embeds)


def unit_rows(features: torch.Tensor, first: int, what: str) -> np.ndarray:
    """
    L2-normalised embeddings, float32.

    Args:
        features (`torch.Tensor` of shape `(rows, dim)`).
        first (`int`): the number of the first row in error messages.
        what (`str`): the name of a row in error messages.

    Raises:
        ValueError: an embedding is not finite.
    """
    embeds = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(embeds).all(axis=1))
    if len(bad):
        raise ValueError(f"{what} {first + bad[0]} is not finite. Check it, or use --dtype float32.")
    return embeds


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Split items into lists of `size`; the last one may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _embed(model: Any, values: PixelValues, images: list[PILImage.Image], modality: str) -> np.ndarray:
    inputs = {name: tensor.to(model.device) for name, tensor in values.inputs(images).items()}
    return model.embed_images(inputs.pop("pixel_values"), modality, **inputs).float().cpu().numpy()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside a `with` block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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
    The embeddings of an image column through a frozen branch, computed once and cached on disk as Arrow files.

    The files are in the cache folder of `datasets`, under a key that depends on the branch's weights, the image
    processor and the data. They are memory-mapped and written in shards: an interrupted run continues with the next
    shard, and the processes of a distributed run share the shards.

    Args:
        dataset (`datasets.Dataset`): rows with an image column.
        column (`str`): the name of that column.
        model, processor, modality: as in [`embed_images`].
        batch_size (`int`): images per forward pass.
        on_bad_image (`str`): `"skip"` stores None for an unreadable image and logs a warning; `"error"` raises.
        barrier (*optional*): a function that waits for all processes of a distributed run.
        rank, world_size (`int`): the index of this process and the number of processes.

    Returns:
        `datasets.Dataset` with the column `image_embeds`: lists of `dim` float32 numbers, L2-normalised, or None.

    Images that could not be read are tried again in the next run.

    Raises:
        ValueError: an unreadable image with `on_bad_image="error"`, or an embedding that is not finite.
        OSError: the disk is full. The next run continues with the shards that were written.
    """
    dataset = undecoded(dataset.select_columns([column]))
    key = cache_key(dataset, column, model, processor, modality)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "gmail_hf", key)
    folder.mkdir(parents=True, exist_ok=True)
    values = PixelValues(image_processor_of(processor))
    dim = model.embed_dim
    features = datasets.Features({"image_embeds": datasets.List(datasets.Value("float32"), length=dim)})

    def skip(row: int, error: BadImageError) -> None:
        where = f"Column '{column}', row {row}"
        if on_bad_image == "error":
            raise ValueError(f"{where}: {error}.") from error
        bad_images.warning(f"{where}: {error}; it is skipped.")

    def embed_batch(images: list[PILImage.Image | BadImageError], first_row: int) -> list[np.ndarray | None]:
        embeds: list[np.ndarray | None] = [None] * len(images)
        rows = []
        for row, image in enumerate(images):
            if isinstance(image, BadImageError):
                skip(first_row + row, image)
            else:
                rows.append(row)
        decoded = [images[row] for row in rows]
        for row, embed in zip(rows, _embed(model, values, decoded, modality) if rows else [], strict=True):
            if not np.isfinite(embed).all():
                raise ValueError(
                    f"The embedding of column '{column}', row {first_row + row} is not finite. Check the weights, or "
                    "use --dtype float32."
                )
            embeds[row] = embed
        return embeds

    def still_unreadable(cached: Dataset, first_row: int) -> bool:
        """Whether the images without an embedding still cannot be read. A disk or a network may be back."""
        readable = cached.data.column("image_embeds").is_valid().to_numpy()
        missing = first_row + np.flatnonzero(~readable)
        for start, images in _decoded(dataset.select(missing), column, range(len(missing)), batch_size):
            for row, image in zip(missing[start:], images, strict=False):
                if not isinstance(image, BadImageError):
                    return False
                skip(row, image)
        return True

    def load_or_compute(shard: int, check: bool = True) -> Dataset:
        rows = range(shard * CACHE_SHARD_ROWS, min((shard + 1) * CACHE_SHARD_ROWS, len(dataset)))
        file = folder / f"{shard:05d}.arrow"
        lock = try_lock(folder / ".locks" / f"{file.stem}.lock", wait=True)
        try:
            cached = _load_arrow(file, len(rows))
            if cached is None or (check and not still_unreadable(cached, rows.start)):
                embeds: list[np.ndarray | None] = []
                title = f"Embedding {column} by {modality} ({shard + 1}/{shards})"
                with tqdm(total=len(rows), desc=title, unit="image", disable=not is_progress_bar_enabled()) as bar:
                    for start, images in _decoded(dataset, column, rows, batch_size):
                        embeds += embed_batch(images, start)
                        bar.update(len(images))
                _write_arrow(file, Dataset.from_dict({"image_embeds": embeds}, features))
                cached = _load_arrow(file, len(rows))
        finally:
            lock.release()
        missing = cached.data.column("image_embeds").null_count
        cached._fingerprint = f"{key}-{file.stem}-{missing}"
        return cached

    shards = -(-len(dataset) // CACHE_SHARD_ROWS)
    with torch.no_grad(), evaluating(model):
        for shard in range(rank, shards, world_size):
            load_or_compute(shard)
        if barrier is not None:
            barrier()
        # If the processes do not share a folder, this computes the missing shards.
        return datasets.concatenate_datasets([load_or_compute(shard, check=False) for shard in range(shards)])


def _decoded(
    dataset: Dataset, column: str, rows: range, size: int
) -> Iterator[tuple[int, list[PILImage.Image | BadImageError]]]:
    """
    The first row and the images of each batch, with the error in place of an unreadable image. Threads decode the next
    batch in the meantime.
    """

    def decode(cell: Any) -> PILImage.Image | BadImageError:
        try:
            return decode_image(cell)
        except BadImageError as error:
            return error

    with ThreadPoolExecutor() as pool:
        starts = range(rows.start, rows.stop, size)
        jobs = ((start, pool.map(decode, dataset[start : min(start + size, rows.stop)][column])) for start in starts)
        ahead = next(jobs, None)
        while ahead is not None:
            (start, images), ahead = ahead, next(jobs, None)
            yield start, list(images)


def _write_arrow(path: Path, dataset: Dataset) -> None:
    buffer = pa.BufferOutputStream()
    with ArrowWriter(stream=buffer, features=dataset.features) as writer:
        writer.write_table(dataset.data.table)
        writer.finalize()
    write_file(path, buffer.getvalue())


def _load_arrow(path: Path, num_rows: int) -> Dataset | None:
    """The rows of an Arrow file, memory-mapped; None if the file is missing or damaged."""
    if not path.exists():
        return None
    try:
        dataset = Dataset.from_file(str(path))
    except (OSError, pa.ArrowInvalid):
        dataset = None
    if dataset is None or len(dataset) != num_rows:
        logger.warning(f"'{path}' is damaged. Computing its embeddings again.")
        return None
    return dataset


def embeds_array(embeds: Dataset) -> np.ndarray:
    """The column `image_embeds` of [`cached_embeds`] as float32 `(rows, dim)`, with NaN in place of None."""
    column = embeds.with_format("arrow")[:]["image_embeds"].combine_chunks()
    readable = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.drop_null().flatten().to_numpy()
    dim = len(values) // readable.sum() if readable.any() else embeds.features["image_embeds"].length
    array = np.full((len(embeds), dim), np.nan, np.float32)
    array[readable] = values.reshape(-1, dim)
    return array


def cache_key(dataset: Dataset, column: str, model: Any, processor: Any, modality: str = "real") -> str:
    """
    A hash of all that determines the embeddings: the branch's weights and settings (with `"auto"` also the
    detector's), the processor, the data.
    """
    digest = hashlib.blake2b(digest_size=16)
    if modality == AUTO:
        modality = model.detector.modality
        digest.update(str([model.detector.weight.tolist(), model.detector.bias.item()]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(("text_", "logit_")) and adapter_of(name) in (None, modality):
            digest.update(name.encode() + str(tensor.dtype).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    vision_config = model.tower.config
    shape = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size")  # not visible in the weights
    if modality in vision_config.trainable_modalities:
        shape += ("lora_alpha",)
    digest.update(str([getattr(vision_config, name, None) for name in shape]).encode())
    settings = json.loads(image_processor_of(processor).to_json_string())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(f"{column} {len(dataset)} {dataset._fingerprint}".encode())
    # The data set's fingerprint does not depend on the content of the image files.
    for path in filter(None, paths_of(dataset, column)):
        file = path.rpartition("::")[2]  # the archive of zip://1.png::images.zip
        stat = os.stat(file) if os.path.exists(file) else None
        digest.update(f"{path} {(stat.st_mtime_ns, stat.st_size) if stat else None}".encode())
    return digest.hexdigest()
