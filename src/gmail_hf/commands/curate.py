"""
Select generated images for training: leave out broken, copied and wrongly captioned images, and keep the best ones.

Curate the bundled digits, or your own pairs or images with captions in any layout that gmail-hf train reads:

    gmail-hf curate
    gmail-hf curate --model openai/clip-vit-large-patch14 --score_model openai/clip-vit-base-patch32 \\
        --dataset pairs.csv --output_dir curated
    gmail-hf train --model openai/clip-vit-large-patch14 --dataset pairs.csv --curated curated/mask.parquet

An image is left out if it cannot be read, if all its pixels are alike, if it is a copy of a real image, if its
caption does not fit, or if it is a near-duplicate of a better image. With --best_k, only the best images of each
caption are kept. Nothing is deleted.

The output folder gets mask.parquet, with a row for each row of the data set: whether it is kept, the reason if not,
the row that it copies and its CLIPScore. It also gets curation.json, and report.html with pictures of the images that
are left out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_file
from .cli import run
from .common import MeasuringArguments, check_output_outside, hold_output_dir, logger
from .options import option, parse

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 24  # pictures per reason


@dataclass
class CurationArguments(MeasuringArguments):
    _argument_group_name = "curation"

    score_model: str | None = option(
        "Hub id or folder of a CLIP for CLIPScore. It should differ from --model, which is the default."
    )
    max_samples: int | None = option("Curate only the first rows, up to this number.")
    real_dataset: str | None = option(
        "Real images to find copies of, such as the generator's training data. Defaults to those of the pairs."
    )
    output_dir: str = option("Folder for mask.parquet, curation.json and report.html.", "curated")
    duplicate_threshold: float = option("Images with at least this cosine are copies.", 0.98)
    min_clip_score: float | None = option(
        "Leave out images with a lower CLIPScore. Defaults to the score below which 95 percent of the images are with "
        "the caption of another image."
    )
    best_k: int | None = option("Number of images to keep for each caption, those with the highest CLIPScore.")
    seed: int = option("Seed of the captions of other images, for the default of --min_clip_score.", 0)


def main(argv: Sequence[str]) -> dict:
    """Curate the images, write the mask, the JSON and the report, and return the content of the JSON."""
    (args,) = parse(argv, "curate", __doc__, (CurationArguments,))
    check_output_outside(args.output_dir, args.dataset, args.real_dataset)
    hold_output_dir(args)

    from ..evaluation import environment
    from ..generation.curation import curate
    from ..generation.masks import write_mask
    from ..training.checks import check_pairs

    dataset = _generated_images(args)
    needed = ("generated_image", "caption", "image_id")
    check_pairs(dataset, f"Split '{args.split}' of '{args.dataset}'", needed=needed, with_negatives=False)
    real_images = _real_images(args.real_dataset) if args.real_dataset else None
    model, processor = args.load_model(args.model, args.model_revision)
    scorer = {}
    if args.score_model is not None:
        score_model, score_processor = args.load_model(args.score_model)
        if not hasattr(score_model, "get_text_features"):
            raise ValueError(
                f"'{args.score_model}' has no text encoder, which CLIPScore needs: pass a CLIP or a SigLIP as "
                "--score_model."
            )
        scorer = {"score_model": score_model, "score_processor": score_processor}
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
    """Load the rows to curate. If the data set has only one column of images, they are the generated ones."""
    dataset = args.load_pairs(args.max_samples)
    if "generated_image" not in dataset.column_names and "real_image" in dataset.column_names:
        logger.warning(f"'{args.dataset}' has only one column of images: using them as generated images.")
        dataset = dataset.rename_column("real_image", "generated_image")
    return dataset


def _real_images(name: str) -> "Dataset":
    """Load the image column of any data set as `real_image`."""
    from ..training.columns import find_column
    from ..training.sources import load_rows

    rows = load_rows(name, any_split=True)
    column = find_column(rows, "real_image")
    if column is None:
        raise ValueError(
            f"--real_dataset '{name}' needs a column 'real_image' or 'image'; it has {rows.column_names}."
        )
    return rows.select_columns([column]).rename_columns({column: "real_image"})


def _summary(result: dict) -> list[str]:
    from ..generation.choosing import IN_WORDS

    counts, scores = result["counts"], result["clip_score"]
    lines = [f"{counts['kept']} of {counts['generated images']} generated images are kept."]
    lines += [f"{number:>8}  {IN_WORDS[reason]}" for reason, number in result["dropped"].items() if number]
    if scores is None:
        lines.append("There is no CLIPScore, because --model has no text encoder. Pass a CLIP as --score_model.")
    else:
        lines.append(f"CLIPScore by {result['score_model']}: {scores['mean']:.3f}")
        if scores["mean_of_kept"] is not None:
            lines[-1] += f", {scores['mean_of_kept']:.3f} for kept images"
        if scores["threshold"] is not None:
            lines[-1] += f"; images below {scores['threshold']:.3f} are left out"
        lines[-1] += "."
    if result["same_model"]:
        lines.append(
            "CLIPScore comes from the model to be trained, which does not see its own mistakes: pass another CLIP as "
            "--score_model."
        )
    return lines


def _page(result: dict, rows: list[dict[str, Any]], dataset: "Dataset", real_images: "Dataset | None") -> str:
    """Write the report: up to `SHOWN` images for each reason, and the kept images with the lowest scores."""
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
