"""
Measure the gap between generated and real images before training, to decide whether to align.

Diagnose the bundled digits, or your own pairs in any layout that gmail-hf train reads:

    gmail-hf diagnose --label_column digits
    gmail-hf diagnose --model openai/clip-vit-base-patch32 --dataset pairs.csv --label_column class

The output folder gets diagnosis.json and report.html with distances between the images, the effect of mean shift and
CORAL without training, a recommendation and the command to run. With --label_column, they include what training on
generated images costs on real ones. For a trained --model, the table has a column for its gen branch; use a --split
that training did not see.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_file
from .cli import run
from .common import MeasuringArguments, check_output_outside, hold_output_dir, logger
from .options import option, parse


@dataclass
class DiagnosisArguments(MeasuringArguments):
    _argument_group_name = "diagnosis"

    label_column: str | None = option("Column with classes, to measure the cost of the gap.")
    output_dir: str = option("Folder for diagnosis.json and report.html.", "diagnosis")
    max_samples: int = option("Number of pairs to embed, drawn at random.", 2000)
    seed: int = option("Seed of the drawn pairs, the halves and the folds.", 0)


def main(argv: Sequence[str]) -> dict:
    """Diagnose the pairs, write the JSON and the report, and return the content of the JSON."""
    (args,) = parse(argv, "diagnose", __doc__, (DiagnosisArguments,))
    check_output_outside(args.output_dir, args.dataset)
    hold_output_dir(args)

    from ..evaluation import diagnose, diagnosis_html, environment
    from ..metrics import to_markdown
    from ..metrics._checks import optional_import
    from ..training.checks import check_pairs

    optional_import("sklearn")
    pairs = args.load_pairs()
    check_pairs(pairs, f"Split '{args.split}' of '{args.dataset}'", with_negatives=False)
    model, processor = args.load_model(args.model, args.model_revision)
    settings = {name: getattr(args, name) for name in ("label_column", "max_samples", "seed")}
    labels = "caption" if args.label_column == args.caption_column else args.label_column  # it was renamed
    found = diagnose(model, processor, pairs, batch_size=args.batch_size, **settings | {"label_column": labels})
    recipe = found.pop("recipe")
    result = {
        "model": args.model,
        "dataset": args.dataset,
        "split": args.split,
        **found,
        "command": recipe and [*_train_command(args, model, found["rows"]), *recipe],
        "settings": {**settings, "embeddings": args.model},
        "environment": environment(),
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "diagnosis.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / "report.html", diagnosis_html(result, pairs))
    print("\n".join([to_markdown(result["rows"]), *result["advice"]]))
    if result["command"]:
        print(f"\n    {shlex.join(result['command'])}")
    logger.info(f"The report with pictures is {folder / 'report.html'}.")
    return result


def _train_command(args: DiagnosisArguments, model: Any, rows: list[dict]) -> list[str]:
    """Return the command that trains the model's base on these pairs, without the recipe."""
    from ..evaluation.diagnosis import AFTER
    from .bundled import DIGITS, model_path

    base = model.config.base_model_name_or_path
    words = ["gmail-hf", "train", "--model", DIGITS if base == model_path(DIGITS) else base or args.model]
    sources = ["dataset", "dataset_config", "dataset_revision"]
    if base in (None, args.model):  # otherwise it is the revision of a trained model
        sources.append("model_revision")
    if AFTER not in {row["row"] for row in rows}:  # trained models are diagnosed on a split held out from training
        sources.append("split")
    for name in sources:
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) not in (None, "train") else []
    for name in ("real_image", "generated_image", "caption", "image_id"):
        column = getattr(args, f"{name}_column")
        words += [f"--{name}_column", column] if column != name else []
    return [*words, "--output_dir", "gmail-model"]


if __name__ == "__main__":
    run("diagnose")
