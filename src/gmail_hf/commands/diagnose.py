"""
Should I align at all? Measure the gap between generated and real images before any training.

The bundled digits, and pairs of your own in any layout that gmail-hf train reads:

    gmail-hf diagnose --label_column digits
    gmail-hf diagnose --model openai/clip-vit-base-patch32 --dataset pairs.csv --label_column class

The output folder gets diagnosis.json and report.html: how far apart the images are, what mean shift and CORAL give
without training, with --label_column what training on generated images costs on real ones, a recommendation and the
command to run. With a trained model as --model, its gen branch is a column of the same table; use a --split that
training did not see.
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

    model: str | None = option("A base or a model with branches, by Hub id or folder; or digits.")
    model_revision: str | None = option(REVISION)
    dataset: str = option(PAIRS, "digits")
    dataset_config: str | None = option("Configuration of a data set on the Hub.")
    dataset_revision: str | None = option("Revision of --dataset on the Hub.")
    split: str = option("Split of --dataset.", "train")
    real_image_column: str = option("Column with the real images.", "real_image")
    generated_image_column: str = option("Column with the generated images.", "generated_image")
    caption_column: str = option("Column with the captions.", "caption")
    image_id_column: str = option("Column with the ids of the real images.", "image_id")
    label_column: str | None = option("Column with classes, to measure what the gap costs.")
    output_dir: str = option("Folder for diagnosis.json and report.html.", "diagnosis")
    max_samples: int = option("Pairs to embed, drawn at random.", 2000)
    batch_size: int = option("Images per forward pass.", 64)
    device: str | None = option("Device, by default the GPU if there is one.")
    seed: int = option("Seed of the choice of pairs, of the halves and of folds.", 0)

    def __post_init__(self) -> None:
        if self.model is None:
            if self.dataset != "digits":
                raise ValueError(f"Name the base to diagnose '{self.dataset}' with: --model.")
            self.model = "digits"


def main(argv: Sequence[str]) -> dict:
    """Measure, write the JSON and the report, and return the content of the JSON."""
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
    logger.info(f"Open {folder / 'report.html'} for the pictures.")
    return result


def _train_command(args: DiagnosisArguments, model: Any, rows: list[dict]) -> list[str]:
    """The training of these pairs from the base of the model, without its recipe."""
    from ..evaluation.diagnosis import AFTER
    from .bundled import DIGITS, model_path

    base = model.config.base_model_name_or_path
    words = ["gmail-hf", "train", "--model", DIGITS if base == model_path(DIGITS) else base or args.model]
    sources = ["dataset", "dataset_config", "dataset_revision"]
    if AFTER not in {row["row"] for row in rows}:  # a trained model is diagnosed on a split to test on
        sources.append("split")
    for name in sources:
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) not in (None, "train") else []
    for name in ("real_image", "generated_image", "caption", "image_id"):
        column = getattr(args, f"{name}_column")
        words += [f"--{name}_column", column] if column != name else []
    return [*words, "--output_dir", "gmail-model"]


if __name__ == "__main__":
    run("diagnose")
