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
from .common import PAIRS, REVISION, load_two_branches, logger
from .options import option, parse


@dataclass
class DiagnosisArguments:
    _argument_group_name = "diagnosis"

    model: str | None = option("Hub id or folder of a base or of a model with branches, or digits.")
    model_revision: str | None = option(REVISION)
    dataset: str = option(PAIRS, "digits")
    dataset_config: str | None = option("Configuration of a data set on the Hub.")
    dataset_revision: str | None = option("Revision of --dataset on the Hub.")
    split: str = option("Split of --dataset.", "train")
    real_image_column: str = option("Column with the real images.", "real_image")
    generated_image_column: str = option("Column with the generated images.", "generated_image")
    caption_column: str = option("Column with the captions.", "caption")
    image_id_column: str = option("Column with the ids of the real images.", "image_id")
    label_column: str | None = option("Column with classes, to measure the cost of the gap.")
    output_dir: str = option("Folder for diagnosis.json and report.html.", "diagnosis")
    max_samples: int = option("Number of pairs to embed, drawn at random.", 2000)
    batch_size: int = option("Images per forward pass.", 64)
    device: str | None = option("Device. Defaults to the GPU if there is one.")
    seed: int = option("Seed of the drawn pairs, the halves and the folds.", 0)

    def __post_init__(self) -> None:
        if self.model is None:
            if self.dataset != "digits":
                raise ValueError(f"Pass the base for diagnosing '{self.dataset}' with --model.")
            self.model = "digits"


def main(argv: Sequence[str]) -> dict:
    """Diagnose the pairs, write the JSON and the report, and return the content of the JSON."""
    (args,) = parse(argv, "diagnose", __doc__, (DiagnosisArguments,))

    import torch

    from ..evaluation import diagnose, diagnosis_html, environment
    from ..metrics import to_markdown
    from ..training.checks import check_pairs
    from ..training.data import PAIR_COLUMNS
    from .bundled import load_pairs

    columns = {name: getattr(args, f"{name}_column") for name in PAIR_COLUMNS}
    pairs = load_pairs(args.dataset, args.split, args.dataset_config, args.dataset_revision, columns)
    check_pairs(pairs, f"Split '{args.split}' of '{args.dataset}'", with_negatives=False)
    model, processor = load_two_branches(args.model, args.model_revision, dtype=torch.float32)
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    settings = {name: getattr(args, name) for name in ("label_column", "max_samples", "seed")}
    found = diagnose(model, processor, pairs, batch_size=args.batch_size, **settings)
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
