"""
Embed a folder of images or a column of a data set with one branch, and write the embeddings to one file.

    gmail-hf embed --model gmail-digits --images photos --output_file photos.parquet
    gmail-hf embed --model org/gmail-coco --dataset org/coco-sd2 --split train --column generated_image \\
        --modality gen --output_file generated.safetensors

A .parquet file has the columns file_name (relative to --images) or row (of the data set, from 0), and embedding, an
L2-normalised list of float32. A .safetensors file has the tensor embedding (images, dimension), and the names as JSON
in the metadata file_name or the rows in the tensor row. With --modality auto, for images of unknown origin, there are
two more columns: generated_probability, and modality, the branch of the image (.parquet only: gen if the probability
is at least --threshold). It needs a detector in the model, see gmail-hf train --fit_detector.

--model is a trained model, complete or only its adapters, or a base. Both branches of a base are equal to it.

To continue an interrupted run, run the same command again. With a different model, input or --modality, it starts from
the beginning. A finished file is not overwritten.
"""

import glob
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import replacing, try_lock
from .cli import run
from .common import DTYPES, REVISION, load_two_branches, logger
from .options import REQUIRED, option, parse

FORMATS = (".parquet", ".safetensors")
ROW_GROUP = 8192  # rows
HEADER_LIMIT = 90_000_000  # bytes of names; safetensors reads headers up to 100 MB
METADATA = "gmail_hf"


@dataclass
class EmbeddingArguments:
    _argument_group_name = "embedding"

    model: str = option("Hub id or folder of a model with branches or a base, or digits, the bundled CLIP.", REQUIRED)
    output_file: str = option("File to write, .parquet or .safetensors.", REQUIRED)
    model_revision: str | None = option(REVISION)
    images: str | None = option("Folder of images, including its subfolders.")
    dataset: str | None = option(
        "Data set instead of --images: a Hub id, a folder saved by datasets, parquet files, or digits."
    )
    dataset_config: str | None = option("Configuration of a data set on the Hub.")
    dataset_revision: str | None = option("Revision of --dataset on the Hub.")
    split: str = option("Split of --dataset.", "train")
    column: str | None = option("Column of --dataset with the images. Defaults to its only image column.")
    modality: str = option("Branch for the images: real, gen, or auto with a detector.", "real")
    threshold: float | None = option("With --modality auto: probability from which on an image is generated; 0.5.")
    batch_size: int = option("Images per forward pass.", 64)
    on_bad_image: str = option("Skip an unreadable image with a warning, or stop.", "skip", choices=("skip", "error"))
    dtype: str = option("Data type of the weights.", "float32", choices=DTYPES)
    device: str | None = option("Device. Defaults to the GPU if there is one.")

    def __post_init__(self) -> None:
        if (self.images is None) == (self.dataset is None):
            raise ValueError("Pass either --images or --dataset.")
        if Path(self.output_file).suffix not in FORMATS:
            raise ValueError(f"--output_file must end in .parquet or .safetensors, got '{self.output_file}'.")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {self.batch_size}.")
        if self.threshold is not None and self.modality != "auto":
            raise ValueError("--threshold needs --modality auto.")
        if self.threshold is None:
            self.threshold = 0.5


def main(argv: Sequence[str]) -> Path:
    """Embed the remaining images, write the file and return its path."""
    (args,) = parse(argv, "embed", __doc__, (EmbeddingArguments,))

    import torch

    from ..branches.configuration import AUTO
    from ..models.auto_modality import check_auto
    from ..training.embeddings import cache_key

    names, images = _folder(Path(args.images)) if args.images else _column(args)
    output = Path(args.output_file)
    if output.suffix == ".safetensors" and names and len(json.dumps(names)) > HEADER_LIMIT:
        raise ValueError(
            "There are too many file names for the header of a safetensors file: use a .parquet file as --output_file."
        )
    model, processor = load_two_branches(args.model, args.model_revision, dtype=getattr(torch, args.dtype))
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    if args.modality == AUTO:
        check_auto(model, args.threshold)
    elif args.modality not in model.config.modalities:
        raise ValueError(f"'{args.model}' has no branch '{args.modality}'; it has {model.config.modalities}.")
    column = images.column_names[0]
    source = {"images": str(Path(args.images).resolve())} if args.images else {"dataset": args.dataset}
    settings = {
        "model": args.model,
        "modality": args.modality,
        **({"threshold": args.threshold} if args.modality == AUTO else {}),
        **source,
        **({} if args.images else {"split": args.split, "column": column}),
        "dtype": args.dtype,
        "key": cache_key(images, column, model, processor, args.modality),  # hash of weights, processor and images
    }
    if output.exists():
        _check_finished(output, settings)
        return output

    output.parent.mkdir(parents=True, exist_ok=True)
    threshold = f"-{args.threshold}" if args.modality == AUTO else ""
    partial = output.with_name(f".{output.name}.{settings['key']}-{args.on_bad_image}{threshold}.partial")
    lock = try_lock(f"{partial}.lock")
    if lock is None:
        raise ValueError(f"Another process is writing '{output}': wait until it has finished.")
    try:
        _embed(args, model, processor, images, names, partial)
        kept = _write(output, partial, model, names, settings, args)
        for path in output.parent.glob(f".{glob.escape(output.name)}.*.partial*"):  # also those of other settings
            path.unlink()
    finally:
        lock.release()
    logger.info(f"{kept} embeddings are in {output}; {len(images) - kept} images could not be read.")
    return output


def _folder(folder: Path) -> tuple[list[str], Any]:
    """Return the file names relative to a folder, and a data set of these images."""
    from datasets import Dataset, Features, Image

    from ..training.decoding import IMAGE_SUFFIXES

    if not folder.is_dir():
        raise FileNotFoundError(f"Folder '{folder}' does not exist.")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise ValueError(f"'{folder}' has no images.")
    cells = [{"bytes": None, "path": str((folder / name).resolve())} for name in names]
    return names, Dataset.from_dict({"image": cells}, features=Features({"image": Image(decode=False)}))


def _column(args: EmbeddingArguments) -> tuple[None, Any]:
    from datasets import Image

    from ..training.data import undecoded
    from .bundled import load_pairs

    dataset = load_pairs(args.dataset, args.split, args.dataset_config, args.dataset_revision, columns={})
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    column = args.column or (images[0] if len(images) == 1 else None)
    if column not in images:
        raise ValueError(
            f"Pass the column of '{args.dataset}' with the images as --column; its image columns are {images}."
        )
    return None, undecoded(dataset.select_columns([column]))


def _embed(args: EmbeddingArguments, model: Any, processor: Any, images: Any, names: Any, partial: Path) -> None:
    """
    Append the float32 embeddings of the remaining images to `partial`, row by row, with NaN for unreadable ones, and
    the probability of `auto` in a last column.
    """
    import numpy as np
    from tqdm.auto import tqdm

    from ..training.embeddings import embed_auto, embed_images

    auto = args.modality == "auto"
    dim = model.embed_dim + auto
    with open(partial, "ab") as file:
        # Keep only complete batches, so that the next batches equal those of an uninterrupted run.
        done = file.tell() // (4 * dim * args.batch_size) * args.batch_size
        file.truncate(4 * dim * done)
        if done:
            logger.info(f"Continuing after {done} of {len(images)} images.")
        with tqdm(total=len(images), initial=done, desc=f"Embedding by {args.modality}", unit="image") as bar:
            for start, decoded in _decoded(images, done, args.batch_size):
                embeds = np.full((len(decoded), dim), np.nan, np.float32)
                good = [row for row, image in enumerate(decoded) if not isinstance(image, ValueError)]
                for row in sorted(set(range(len(decoded))) - set(good)):
                    name = names[start + row] if names else f"row {start + row}"
                    if args.on_bad_image == "error":
                        raise ValueError(f"{name}: {decoded[row]}")
                    logger.warning(f"{name} is skipped: {decoded[row]}.")
                if good:
                    batch = [decoded[row] for row in good]
                    if auto:
                        embeds[good] = np.column_stack(embed_auto(model, processor, batch, args.threshold))
                    else:
                        embeds[good] = embed_images(model, processor, batch, args.modality, args.batch_size)
                    if not np.isfinite(embeds[good]).all():
                        raise ValueError(f"The model's embeddings are not finite in {args.dtype}.")
                file.write(embeds.tobytes())
                file.flush()
                bar.update(len(decoded))


def _decoded(images: Any, start: int, size: int) -> Iterator[tuple[int, list[Any]]]:
    """Iterate over batches from row `start`, with each image decoded or its error. Decodes one batch ahead."""
    from ..training.data import BadImageError, decode_image

    def decode(cell: Any) -> Any:
        try:
            return decode_image(cell)
        except BadImageError as error:
            return error

    column = images.column_names[0]
    with ThreadPoolExecutor() as pool:
        batch = None
        for first in range(start, len(images), size):
            ahead = first, pool.map(decode, images[first : first + size][column])
            if batch:
                yield batch[0], list(batch[1])
            batch = ahead
        if batch:
            yield batch[0], list(batch[1])


def _write(
    output: Path,
    partial: Path,
    model: Any,
    names: list[str] | None,
    settings: dict[str, Any],
    args: EmbeddingArguments,
) -> int:
    """Write the file atomically without the rows of unreadable images, and return its number of rows."""
    import numpy as np

    auto, dim = args.modality == "auto", model.embed_dim
    rows = np.memmap(partial, np.float32, "r").reshape(-1, dim + auto)
    embeds = rows[:, :dim]
    kept = np.flatnonzero(~np.isnan(embeds[:, 0]))
    if not len(kept):
        raise ValueError(f"None of the {len(embeds)} images can be read.")
    labels = [names[row] for row in kept] if names else kept
    detected = {"generated_probability": rows[kept, dim]} if auto else {}
    with replacing(output) as temporary:
        if output.suffix == ".parquet":
            if auto:
                branches = np.array(["real", model.detector.modality])
                detected["modality"] = branches[(detected["generated_probability"] >= args.threshold).astype(int)]
            _write_parquet(temporary, labels, embeds, kept, detected, settings)
        else:
            from safetensors.numpy import save_file

            metadata = {METADATA: json.dumps(settings)} | ({"file_name": json.dumps(labels)} if names else {})
            tensors = {"embedding": embeds[kept], **({} if names else {"row": kept}), **detected}
            save_file(tensors, temporary, metadata)
    return len(kept)


def _write_parquet(
    path: Path, labels: Sequence[Any], embeds: Any, kept: Any, detected: dict[str, Any], settings: dict[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    named = isinstance(labels, list)
    label = pa.field("file_name", pa.string()) if named else pa.field("row", pa.int64())
    others = [pa.field(name, pa.string() if name == "modality" else pa.float32()) for name in detected]
    fields = [label, pa.field("embedding", pa.list_(pa.float32())), *others]
    schema = pa.schema(fields, {METADATA: json.dumps(settings)})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(kept), ROW_GROUP):
            rows = slice(start, start + ROW_GROUP)
            values = embeds[kept[rows]]
            offsets = pa.array(range(0, values.size + 1, embeds.shape[1]), pa.int32())
            column = pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))
            columns = [pa.array(labels[rows], label.type), column]
            columns += [pa.array(detected[field.name][rows], field.type) for field in others]
            writer.write_table(pa.table(columns, schema=schema))


def _check_finished(output: Path, settings: dict[str, str]) -> None:
    """
    Raises:
        FileExistsError: the file was written with other settings. The message lists the differences.
    """
    import pyarrow.parquet as pq
    from safetensors import safe_open

    if output.suffix == ".parquet":
        metadata = {key.decode(): value for key, value in (pq.read_schema(output).metadata or {}).items()}
    else:
        with safe_open(output, "np") as file:
            metadata = file.metadata() or {}
    there = json.loads(metadata.get(METADATA, "{}"))
    changed = [f"{key}: {there.get(key)} -> {value}" for key, value in settings.items() if there.get(key) != value]
    if changed:
        raise FileExistsError(
            f"'{output}' was written with other settings (there -> here: {'; '.join(changed)}). Choose another "
            "--output_file, or delete it."
        )
    logger.info(f"{output} is finished.")


if __name__ == "__main__":
    run("embed")
