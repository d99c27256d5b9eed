"""
Render the cards in this folder:

    python model_cards/render.py

Cards of recipes that have not been run come from examples/configs. Cards of the bundled checkpoints are copied from
the package, with the scores in this folder added. The card of gmail-digits is rendered from files of a training and an
evaluation in this folder. To repeat these runs and copy their files:

    gmail-hf train
    gmail-hf evaluate --model gmail-digits --benchmarks digits --output_dir gmail-digits-scores
    python model_cards/render.py gmail-digits gmail-digits gmail-digits-scores
    gmail-hf evaluate --model src/gmail_hf/digits/clip --benchmarks digits \\
        --output_dir digits-clip-scores
    python model_cards/render.py digits-clip digits-clip-scores
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from gmail_hf import GmailConfig, GmailTrainingArguments
from gmail_hf.digits import clip_path, generator_path, llama_path
from gmail_hf.generation.arguments import DEFAULT_GENERATOR
from gmail_hf.publishing import add_results, model_card
from gmail_hf.publishing.model_cards import render_card
from gmail_hf.publishing.provenance import PACKAGE, PROVENANCE, source

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples" / "configs"
PAPER_BATCH = 256  # section 4.1
PLANNED = ("gmail-coco", "gmail-cc3m", "gmail-cc12m")
SHIPPED = {"digits-clip": clip_path, "digits-generator": generator_path, "digits-llama": llama_path}
EVIDENCE = ("config.json", "training_args.json", PROVENANCE, "trainer_state.json", "all_results.json", "digits.json")


def render(output_dir: Path = HERE) -> None:
    for name in PLANNED:
        planned_card(CONFIGS / f"{name.removeprefix('gmail-')}.yaml").save(output_dir / name / "README.md")
    for name, path in SHIPPED.items():
        (output_dir / name).mkdir(exist_ok=True)
        shutil.copyfile(Path(path(), "README.md"), output_dir / name / "README.md")
    model_card(HERE / "gmail-digits", "org/gmail-digits").save(output_dir / "gmail-digits" / "README.md")
    for name in (*SHIPPED, "gmail-digits"):
        if (HERE / name / "digits.json").exists():
            add_results(output_dir / name, HERE / name)


def planned_card(config_file: str | os.PathLike) -> ModelCard:
    """
    Return the card of a configuration of `gmail-hf train` that has not been run: method and recipe, without scores.

    Args:
        config_file: the YAML file. The comment at its top describes the run.
    """
    text = Path(config_file).read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    names = GmailTrainingArguments.__dataclass_fields__
    training = {name: _number(value) for name, value in values.items() if name in names}
    # bf16 is set afterwards, because the arguments check whether this machine supports it.
    args = GmailTrainingArguments(**{**training, "bf16": False}).to_sanitized_dict() | {"bf16": values["bf16"]}
    args["processes"] = PAPER_BATCH // args["per_device_train_batch_size"]
    config = GmailConfig(lora_rank=values["lora_rank"]).to_dict() | {"lora_targets": "every linear layer"}
    generator = source(DEFAULT_GENERATOR, licensed=False)
    organisation = values["dataset"].split("/")[0]
    return render_card(
        f"{organisation}/{values['output_dir']}",
        config,
        args,
        source(values["model"], licensed=False),
        {"train_dataset": {**source(values["dataset"], licensed=False), "generators": [generator]}},
        plan={
            "config": Path(config_file).name,
            "comment": " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#")),
            "output_dir": values["output_dir"],
        },
    )


def _number(value: Any) -> Any:
    """Convert numbers such as 1e-4, which YAML 1.1 reads as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def take_over(name: str, *folders: str) -> None:
    """Copy the files with a card's numbers, without paths of this machine."""
    (HERE / name).mkdir(exist_ok=True)
    for file in EVIDENCE:
        for path in (Path(folder, file) for folder in folders):
            if path.exists():
                text = path.read_text(encoding="utf-8").replace(f"{PACKAGE.parent}/", "")
                (HERE / name / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_over(*sys.argv[1:])
    render()
