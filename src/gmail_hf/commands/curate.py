"""
Select generated images before training on them: which are broken, copied or wrongly captioned, and which are best.

The bundled digits, a folder of images with captions, and pairs of your own in any layout that gmail-hf train reads:

    gmail-hf curate
    gmail-hf curate --model openai/clip-vit-large-patch14 --score_model openai/clip-vit-base-patch32 \\
        --dataset pairs.csv --output_dir curated
    gmail-hf train --model openai/clip-vit-large-patch14 --dataset pairs.csv --curated curated/mask.parquet

The output folder gets mask.parquet, with a line for each row of the data set: kept or not, why not, CLIPScore and what
it copies; curation.json; and report.html, with pictures of what is left out. Nothing is deleted. An image is left out
if it cannot be read, if all its pixels are alike, if it is a copy of a real image, if its caption does not fit, or if
it is a near-duplicate of a better one; with --best_k also if it is not among the best of its caption.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_file
from .cli import run
from .common import PAIRS, REVISION, load_two_branches, logger
from .options import option, parse

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 24  # pictures for each reason


@dataclass
class CurationArguments:
    _argument_group_name = "curation"

    model: str | None = option("The base that will be trained, by Hub id or folder; or digits. It finds copies.")
    model_revision: str | None = option(REVISION)
    score_model: str | None = option(
        "A CLIP for CLIPScore, by Hub id or folder; better another one than --model, which is the default."
    )
    dataset: str = option(PAIRS, "digits")
    dataset_config: str | None = option("Configuration of a data set on the Hub.")
    dataset_revision: str | None = option("Revision of --dataset on the Hub.")
    split: str = option("Split of --dataset.", "train")
    max_samples: int | None = option("Curate this many rows, the first ones.")
    real_image_column: str = option("Column with the real images, if there is one.", "real_image")
    generated_image_column: str = option("Column with the generated images.", "generated_image")
    caption_column: str = option("Column with the captions.", "caption")
    image_id_column: str = option("Column with the ids of the real images.", "image_id")
    real_dataset: str | None = option(
        "Real images to find copies of, such as the generator's training data; by default those of the pairs."
    )
    output_dir: str = option("Folder for mask.parquet, curation.json and report.html.", "curated")
    duplicate_threshold: float = option("Cosine from which on an image is a copy of another one.", 0.98)
    min_clip_score: float | None = option(
        "Lowest CLIPScore to keep. By default the score that 95 percent of the images stay below with the caption of "
        "another image."
    )
    best_k: int | None = option("Keep this many images of each caption, those with the highest CLIPScore.")
    batch_size: int = option("Images per forward pass.", 64)
    device: str | None = option("Device, by default the GPU if there is one.")
    seed: int = option("Seed of the other captions that the default of --min_clip_score draws.", 0)

    def __post_init__(self) -> None:
        if self.model is None:
            if self.dataset != "digits":
                raise ValueError(f"Name the base to compare the images of '{self.dataset}' with: --model.")
            self.model = "digits"


def main(argv: Sequence[str]) -> dict:
    """Measure, write the mask, the JSON and the report, and return the content of the JSON."""
    (args,) = parse(argv, "curate", __doc__, (CurationArguments,))

    import torch

    from ..evaluation import environment
    from ..generation.curation import curate
    from ..generation.masks import write_mask
    from ..training.checks import check_pairs

    dataset = _generated_images(args)
    needed = ("generated_image", "caption", "image_id")
    check_pairs(dataset, f"Split '{args.split}' of '{args.dataset}'", needed=needed, with_negatives=False)
    real_images = _real_images(args.real_dataset) if args.real_dataset else None
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_two_branches(args.model, args.model_revision, dtype=torch.float32)
    model.to(device).eval()
    scorer = {}
    if args.score_model is not None:
        score_model, score_processor = load_two_branches(args.score_model, dtype=torch.float32)
        if not hasattr(score_model, "get_text_features"):
            raise ValueError(f"'{args.score_model}' has no text encoder, which CLIPScore needs.")
        scorer = {"score_model": score_model.to(device).eval(), "score_processor": score_processor}
    settings = {name: getattr(args, name) for name in ("duplicate_threshold", "min_clip_score", "best_k", "seed")}
    found, mask = curate(model, processor, dataset, real_images, batch_size=args.batch_size, **scorer, **settings)
    source = {name: getattr(args, name) for name in ("dataset", "split", "model", "score_model", "real_dataset")}
    result = {
        **source,
        "score_model": args.score_model or (args.model if found["clip_score"] else None),
        **found,
        "settings": settings,
        "environment": environment(),
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_mask(mask, folder / "mask.parquet", source | settings)
    write_file(folder / "curation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / "report.html", _page(result, mask.to_pylist(), dataset, real_images))
    print("\n".join(_summary(result)))
    logger.info(f"Look at {folder / 'report.html'}, then train with --curated {folder / 'mask.parquet'}.")
    return result


def _generated_images(args: CurationArguments) -> "Dataset":
    """The rows to curate; the images of a data set with one image column are the generated ones."""
    from .bundled import load_pairs

    columns = {
        name: getattr(args, f"{name}_column") for name in ("real_image", "generated_image", "caption", "image_id")
    }
    dataset = load_pairs(
        args.dataset, args.split, args.dataset_config, args.dataset_revision, columns, args.max_samples
    )
    if "generated_image" not in dataset.column_names and "real_image" in dataset.column_names:
        logger.warning(f"'{args.dataset}' has one column of images: they are taken for generated ones.")
        dataset = dataset.rename_column("real_image", "generated_image")
    return dataset


def _real_images(name: str) -> "Dataset":
    """The column `real_image` of any data set."""
    from ..training.columns import find_column
    from ..training.sources import load_rows

    rows = load_rows(name, any_split=True)
    column = find_column(rows, "real_image")
    if column is None:
        raise ValueError(f"'{name}' has no column 'real_image' or 'image'; it has {rows.column_names}.")
    return rows.select_columns([column]).rename_columns({column: "real_image"})


def _summary(result: dict) -> list[str]:
    from ..generation.choosing import IN_WORDS

    counts, scores = result["counts"], result["clip_score"]
    lines = [f"{counts['kept']} of {counts['generated images']} generated images are kept."]
    lines += [f"{number:>8}  {IN_WORDS[reason]}" for reason, number in result["dropped"].items() if number]
    if scores is None:
        lines.append("There is no CLIPScore: --model has no text encoder, and --score_model is not given.")
    else:
        lines.append(f"CLIPScore by {result['score_model']}: {scores['mean']:.3f}")
        if scores["mean_of_kept"] is not None:
            lines[-1] += f", of kept images {scores['mean_of_kept']:.3f}"
        if scores["threshold"] is not None:
            lines[-1] += f"; images below {scores['threshold']:.3f} are left out"
        lines[-1] += "."
    if result["same_model"]:
        lines.append("The model that scores is the one to be trained: it does not see its own mistakes.")
    return lines


def _page(result: dict, rows: list[dict[str, Any]], dataset: "Dataset", real_images: "Dataset | None") -> str:
    """The report, with up to `SHOWN` images for each reason, and the kept ones with the lowest scores."""
    from ..evaluation.report import render, thumbnail
    from ..generation.choosing import IN_WORDS, REAL_COPY, UNREADABLE
    from ..training.data import undecoded

    generated = undecoded(dataset)
    real = generated if real_images is None else undecoded(real_images)

    def picture(row: dict[str, Any]) -> dict[str, Any] | None:
        return None if row["reason"] == UNREADABLE else thumbnail(generated[row["row"]]["generated_image"])

    def copied(row: dict[str, Any]) -> dict[str, Any] | None:
        if row["copy_of"] is None:
            return None
        of_real = row["reason"] == REAL_COPY
        return thumbnail(
            real[row["copy_of"]]["real_image"] if of_real else generated[row["copy_of"]]["generated_image"]
        )

    groups: dict[str, list[dict]] = {reason: [row for row in rows if row["reason"] == reason] for reason in IN_WORDS}
    for group in groups.values():  # doubtful decisions first
        group.sort(key=lambda row: -(row["clip_score"] or 0))
    kept = [row for row in rows if row["kept"] and row["clip_score"] is not None]
    return render(
        "curation.html.jinja",
        result=result,
        summary=_summary(result)[1 + sum(map(bool, result["dropped"].values())) :],
        words=IN_WORDS,
        groups={reason: group[:SHOWN] for reason, group in groups.items() if group},
        lowest=sorted(kept, key=lambda row: row["clip_score"])[:SHOWN],
        picture=picture,
        copied=copied,
    )


if __name__ == "__main__":
    run("curate")
