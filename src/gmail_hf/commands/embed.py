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

Embeddings are cached in the cache folder of datasets, like those of a training, and stay there: to continue an
interrupted run, run the same command again. A finished file is not overwritten.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import replacing, try_lock
from .cli import run
from .common import DTYPES, REVISION, check_output_not_read, device_of, load_two_branches, logger
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
    dataset: str | None = option("Data set instead of --images, in any layout that gmail-hf train reads, or digits.")
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
    """Embed the images, write the file and return its path."""
    (args,) = parse(argv, "embed", __doc__, (EmbeddingArguments,))
    if args.output_file.endswith(".parquet"):
        check_output_not_read(str(Path(args.output_file).parent), args.dataset)

    import numpy as np
    import torch

    from ..branches.configuration import AUTO
    from ..models.auto_modality import check_auto
    from ..training.embeddings import cache_key

    device = device_of(args.device)
    names, images = _folder(Path(args.images)) if args.images else _column(args)
    output = Path(args.output_file)
    if output.suffix == ".safetensors" and names and len(json.dumps(names)) > HEADER_LIMIT:
        raise ValueError(
            "There are too many file names for the header of a safetensors file: use a .parquet file as --output_file."
        )
    model, processor = load_two_branches(args.model, args.model_revision, dtype=getattr(torch, args.dtype))
    model.to(device).eval()
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

    embeds, detected = _embed(args, model, processor, images)
    readable = np.concatenate([_readable(part) for part in _parts(embeds)])
    kept, unreadable = np.flatnonzero(readable), int((~readable).sum())
    if not len(kept):
        raise ValueError(
            f"{unreadable} of {len(images)} images cannot be read. The first is {(names or ['row 0'])[0]}."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    labels = {"file_name": [names[row] for row in kept]} if names else {"row": kept}
    detected = {name: values[kept] for name, values in detected.items()}
    with _alone(output):
        if output.exists():  # written by another run in the meantime
            _check_finished(output, settings)
            return output
        with replacing(output) as partial:
            write = _write_parquet if output.suffix == ".parquet" else _write_safetensors
            write(partial, embeds.select(kept), labels, detected, settings)
    logger.info(f"{len(kept)} embeddings are in {output}; {unreadable} images could not be read.")
    return output


def _folder(folder: Path) -> tuple[list[str], Any]:
    """Return the file names relative to a folder, and a data set of these images."""
    from datasets import Dataset, Features, Image

    from ..training.decoding import IMAGE_SUFFIXES

    if folder.is_file():
        raise ValueError(f"--images takes a folder of images, but '{folder}' is a file.")
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


def _embed(args: EmbeddingArguments, model: Any, processor: Any, images: Any) -> tuple[Any, dict[str, Any]]:
    """Return a data set with the column `image_embeds`, None for unreadable images, and the columns of `auto`."""
    import numpy as np
    import torch
    from datasets import concatenate_datasets

    from ..training.embeddings import cached_embeds, embeds_array

    def embed(rows: Any, modality: str) -> Any:
        column = rows.column_names[0]
        return cached_embeds(rows, column, model, processor, modality, args.batch_size, args.on_bad_image)

    if args.modality != "auto":
        return embed(images, args.modality), {}
    embeds, branch = embed(images, "real"), model.detector.modality
    arrays = (torch.from_numpy(embeds_array(part)) for part in _parts(embeds))
    probability = np.concatenate([model.detector(array).numpy() for array in arrays])
    generated, rows = np.flatnonzero(probability >= args.threshold), np.arange(len(images))
    if len(generated):
        rows[generated] = len(images) + np.arange(len(generated))
        embeds = concatenate_datasets([embeds, embed(images.select(generated), branch)]).select(rows)
    branches = np.where(probability >= args.threshold, branch, "real")
    return embeds, {"generated_probability": probability, "modality": branches}


def _parts(rows: Any) -> Iterator[Any]:
    """Split a data set into parts of up to `ROW_GROUP` rows."""
    return (rows.select(range(i, min(i + ROW_GROUP, len(rows)))) for i in range(0, len(rows), ROW_GROUP))


def _readable(rows: Any) -> Any:
    """Return `(rows,)` bool: whether the image of a row could be read."""
    return rows.with_format("arrow")[:]["image_embeds"].is_valid().to_numpy()


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Wait until no other process writes the file."""
    path = output.with_name(f".{output.name}.lock")
    lock = try_lock(path, wait=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _write_parquet(
    path: Path, embeds: Any, labels: dict[str, Any], detected: dict[str, Any], settings: dict[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pa.table({**labels, **detected})
    fields = [columns.schema.field(0), pa.field("embedding", pa.list_(pa.float32())), *list(columns.schema)[1:]]
    with pq.ParquetWriter(path, pa.schema(fields, {METADATA: json.dumps(settings)})) as writer:
        for number, part in enumerate(_parts(embeds)):
            column = part.with_format("arrow")[:]["image_embeds"].cast(pa.list_(pa.float32()))
            table = columns.slice(number * ROW_GROUP, ROW_GROUP).add_column(1, fields[1], column)
            writer.write_table(table.cast(writer.schema))


def _write_safetensors(
    path: Path, embeds: Any, labels: dict[str, Any], detected: dict[str, Any], settings: dict[str, Any]
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from ..training.embeddings import embeds_array

    names = {name: json.dumps(values) for name, values in labels.items() if name == "file_name"}
    tensors = {
        name: values for name, values in {**labels, **detected}.items() if name not in ("file_name", "modality")
    }
    array = np.empty((len(embeds), embeds.features["image_embeds"].length), np.float32)
    for number, part in enumerate(_parts(embeds)):  # the whole column at once would need its memory three times
        array[number * ROW_GROUP :][: len(part)] = embeds_array(part)
    save_file({"embedding": array, **tensors}, path, {METADATA: json.dumps(settings), **names})


def _check_finished(output: Path, settings: dict[str, str]) -> None:
    """
    Raises:
        FileExistsError: the file has other content, or was written with other settings, which the message lists.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors import SafetensorError, safe_open

    try:
        if output.suffix == ".parquet":
            metadata = {key.decode(): value for key, value in (pq.read_schema(output).metadata or {}).items()}
        else:
            with safe_open(output, "np") as file:
                metadata = file.metadata() or {}
    except (OSError, pa.ArrowInvalid, SafetensorError) as error:
        raise FileExistsError(
            f"'{output}' exists and cannot be read ({error}). Choose another --output_file, or delete it."
        ) from error
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
