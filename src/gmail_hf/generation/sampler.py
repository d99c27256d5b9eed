"""Generates the images of one shard. They only depend on its rows and the settings."""

import hashlib
import inspect
import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import torch
from datasets import Features, Image, Value
from PIL import Image as PILImage
from transformers import ProcessorMixin
from transformers.utils import logging

from ..publishing.provenance import public_name
from .captions import Captions

ENCODER_THREADS = 4
SAVE_OPTIONS = {"png": {}, "jpeg": {"quality": 95, "subsampling": 0}}
VERDICTS = ("nsfw_content_detected", "nsfw_detected")  # of safety checkers; the latter in DeepFloyd IF

logger = logging.get_logger(__name__)


def row_seed(seed: int, caption_id: str, index: int) -> int:
    """Derive a 63-bit seed from the run's seed, a caption's id and the number of its image."""
    digest = hashlib.blake2b(f"{seed}/{caption_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shard_features(with_real: bool) -> Features:
    """
    Return the columns of a shard: those of a pair, see [`data.PAIR_COLUMNS`], and the origin of each generated image.

    `index` numbers the images of a caption. `batch_size` is the size of the row's batch. `truncated` is whether the
    pipeline's tokenizer cut the caption. `nsfw` is the result of the safety checker, or None without one.
    """
    features = {"real_image": Image()} if with_real else {}
    text, number = Value("string"), Value("int32")
    features |= {"generated_image": Image(), "caption": text, "image_id": text, "caption_id": text, "index": number}
    features |= {"seed": Value("int64"), "generator": text, "generator_revision": text, "scheduler": text}
    features |= {"num_inference_steps": number, "guidance_scale": Value("float32"), "negative_prompt": text}
    features |= {"height": number, "width": number, "dtype": text, "batch_size": number}
    features |= {"truncated": Value("bool"), "nsfw": Value("bool"), "gmail_hf_version": text}
    return Features(features)


def generate_shard(
    pipeline: Any,
    captions: Captions,
    rows: range,
    settings: dict[str, Any],
    call: dict[str, Any],
    on_batch: Callable[[int], None] = lambda images: None,
) -> pa.Table:
    """
    Generate the images of one shard.

    Each image has its own random generator, seeded by [`row_seed`], and batches only depend on `rows`. The result
    therefore does not depend on the process or on earlier shards. If a batch does not fit into memory, the rest of the
    shard is generated in batches of half the size, as recorded in the column `batch_size`.

    Args:
        pipeline: a text-to-image pipeline of diffusers.
        captions ([`Captions`]): all captions.
        rows (`range`): rows of the shard. Row r is image `r % images_per_caption` of caption
            `r // images_per_caption`.
        settings (`dict`): as in the manifest, see [`Job`].
        call (`dict`): keyword arguments of the pipeline's call.
        on_batch (`Callable`): called after each batch with its number of images.

    Returns:
        `pyarrow.Table` with the columns of [`shard_features`].

    Raises:
        torch.OutOfMemoryError: a single image does not fit into memory.
    """
    per_caption = settings["images_per_caption"]
    features = shard_features(captions.images is not None)
    columns: dict[str, list] = {name: [] for name in features}
    usable, truncated = _usable(pipeline, captions, rows, per_caption)
    constants = {name: settings[name] for name in set(columns) & set(settings) - {"seed", "batch_size"}}
    constants["generator"] = public_name(settings["generator"])  # shards are pushed
    batch_size, start = settings["batch_size"], 0
    with ThreadPoolExecutor(ENCODER_THREADS) as encoders:
        while start < len(usable):
            batch = usable[start : start + batch_size]
            seeds = [
                row_seed(settings["seed"], captions.caption_ids[r // per_caption], r % per_caption) for r in batch
            ]
            try:
                output = pipeline(
                    [captions.captions[row // per_caption] for row in batch],
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                    **_repeated(call, len(batch)),
                )
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                output = None  # retry after this block, which still holds memory of the failed call
            if output is None:
                batch_size = len(batch) // 2
                torch.cuda.empty_cache()
                logger.warning(
                    f"Out of memory: the rest of this shard is generated in batches of {batch_size} instead of "
                    f"{settings['batch_size']}. This changes images by rounding errors."
                )
                continue
            verdicts = next(filter(None, (getattr(output, name, None) for name in VERDICTS)), [None] * len(batch))
            for row, seed, image, nsfw in zip(batch, seeds, output.images, verdicts, strict=True):
                if nsfw and settings["safety_policy"] == "drop":
                    continue
                index, image_index = divmod(row, per_caption)
                if captions.images is not None:
                    columns["real_image"].append(captions.real_image(index))
                columns["generated_image"].append(encoders.submit(_encode, image, settings["image_format"]))
                columns["caption"].append(captions.captions[index])
                columns["image_id"].append(captions.image_ids[index])
                columns["caption_id"].append(captions.caption_ids[index])
                columns["index"].append(image_index)
                columns["seed"].append(seed)
                columns["height"].append(image.height)
                columns["width"].append(image.width)
                columns["batch_size"].append(len(batch))
                columns["truncated"].append(index in truncated)
                columns["nsfw"].append(None if nsfw is None else bool(nsfw))
            on_batch(len(batch))
            start += len(batch)
        columns["generated_image"] = [
            {"bytes": future.result(), "path": None} for future in columns["generated_image"]
        ]
    for name, value in constants.items():
        columns[name] = [value] * len(columns["seed"])
    return pa.Table.from_pydict(columns, schema=features.arrow_schema)


def _repeated(call: dict[str, Any], count: int) -> dict[str, Any]:
    """Repeat the negative prompt for each prompt, as pipelines expect."""
    return {name: [value] * count if name == "negative_prompt" else value for name, value in call.items()}


def _usable(pipeline: Any, captions: Captions, rows: range, per_caption: int) -> tuple[list[int], set[int]]:
    """Return the rows whose captions can be tokenized, and the indices of captions that all tokenizers truncate."""
    own = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    own = [part.tokenizer if isinstance(part, ProcessorMixin) else part for part in own]  # as in FLUX.2
    longest = inspect.signature(pipeline).parameters.get("max_sequence_length")  # SD3 cuts T5's 512 tokens to 256
    longest = getattr(longest, "default", None) or math.inf
    limits = [(tokenizer, min(tokenizer.model_max_length, longest)) for tokenizer in own if tokenizer is not None]
    bad, truncated = set(), set()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # silence transformers' warning about long captions, which are counted here
    try:
        for index in dict.fromkeys(row // per_caption for row in rows):
            try:
                cut = [len(tokenizer(captions.captions[index]).input_ids) > limit for tokenizer, limit in limits]
            except Exception as error:  # no tokenizer error may end a run of days
                bad.add(index)
                reason = error
            else:
                if cut and all(cut):
                    truncated.add(index)
    finally:
        logging.set_verbosity(level)
    if bad:
        names = [captions.caption_ids[index] for index in sorted(bad)]
        logger.warning(f"{len(bad)} captions are left out, because the tokenizer failed: {names[:5]} ({reason}).")
    if truncated:
        longest = max(limit for _, limit in limits)
        names = [captions.caption_ids[index] for index in sorted(truncated)]
        logger.warning(f"{len(truncated)} captions are longer than {longest} tokens and are truncated: {names[:5]}.")
    return [row for row in rows if row // per_caption not in bad], truncated


def _encode(image: PILImage.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, image_format, **SAVE_OPTIONS[image_format])
    return buffer.getvalue()
