"""
Render the cards of this folder anew:

    python model_cards/render.py

Cards of what nobody has run come from examples/configs. Those of what ships with gmail-hf are copies of its own, with
the scores that are here. gmail-digits comes from the files that a training and an evaluation left here; to run them
again, and take their files over:

    accelerate launch examples/train_gmail.py
    python examples/evaluate_gmail.py --model gmail-digits --benchmarks digits --output_dir gmail-digits-scores
    python model_cards/render.py gmail-digits gmail-digits gmail-digits-scores
    python examples/evaluate_gmail.py --model src/gmail_hf/digits/clip --benchmarks digits \\
        --output_dir digits-clip-scores
    python model_cards/render.py digits-clip digits-clip-scores
"""

import shutil
import sys
from pathlib import Path

from gmail_hf.cards import add_results, model_card, planned_card
from gmail_hf.cards.provenance import PACKAGE, PROVENANCE
from gmail_hf.digits import clip_path, generator_path, llama_path

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples" / "configs"
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


def take_over(name: str, *folders: str) -> None:
    """Copy the files that a card's numbers come from, without paths of this machine."""
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
