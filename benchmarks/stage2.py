"""What stage 2 is worth: models trained on generated images, scored on real ones, several seeds.

    python benchmarks/stage2.py                              # all bridges on the shipped digits world, test split
    python benchmarks/stage2.py --bridges text --split validation --seeds 0     # choose settings here

Each row is a run of an example script, printed as it starts; all rows of a bridge take the same number of steps on the
same number of images with the same captions, and are scored on the same real images through the real branch:

    no fine-tuning            (a) the model as it was, where there is one
    generated taken for real  (b) f_r(generated), what people do today
    mean shift, CORAL         the same, moved onto f_r(real) by a map that needs no training; pooled embeddings only
    GMAIL                     (c) f_g(generated), for each way to align the gen branch
    real                      (d) f_r(real), the upper bound

Gap closed = (c - b) / (d - b), as in the paper's Table 9. A seed draws the scenes, the generator's noise, the adapters
and the batches. Finished runs in --work_dir are not run again. It writes NAME.json and NAME.md.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from _report import aggregate, environment, provenance

ROOT = Path(__file__).parents[1]
EXAMPLES, CONFIGS = ROOT / "examples", ROOT / "examples" / "configs"
# Ways to align the gen branch; the first is the paper's.
VARIANTS = {
    "GMAIL (Eq. 1)": [],
    "GMAIL + 5 (1 - cos)": ["--consistency_weight", "5"],
    "GMAIL + token alignment": ["--token_weight", "1"],
}
BEFORE, GENERATED, REAL = "no fine-tuning", "generated taken for real", "real (upper bound)"
TRAINING_FREE = {"mean shift": "mean_shift", "CORAL": "coral"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="stage2", help="of the two files written")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/stage2"), help="of the runs themselves")
    parser.add_argument("--bridges", nargs="+", choices=list(BRIDGES), default=list(BRIDGES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="scored on these real images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_pairs", type=int, default=2000, help="training pairs")
    parser.add_argument("--num_test", type=int, default=1000, help="real images that are scored")
    return parser.parse_args(argv)


class Runs:
    """The runs of one seed: its data, and commands whose results are kept."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.args, self.seed = args, seed
        self.folder = args.work_dir / f"{args.split}-{args.num_pairs}-{args.num_test}" / f"seed{seed}"
        self.pairs = self.folder / "pairs"
        if not self.pairs.exists():
            from datasets import DatasetDict

            from gmail_hf.loading import load_pairs

            sizes = {"train": args.num_pairs, args.split: args.num_test}
            splits = {split: load_pairs("digits", split, max_samples=size, seed=seed) for split, size in sizes.items()}
            DatasetDict(splits).save_to_disk(self.folder / "pairs.part")
            (self.folder / "pairs.part").rename(self.pairs)

    def run(
        self, name: str, script: str, *options: str, training_free: str | None = None, pairs: Path | None = None
    ) -> tuple[Path, dict]:
        """Run an example, or find that it was run; its output folder and its scores."""
        output = self.folder / name
        scores = output / "eval_results.json"
        if not scores.exists():
            command = [sys.executable]
            if training_free:
                command += [str(Path(__file__).with_name("_training_free.py")), training_free, str(self.pairs)]
            command += [
                str(EXAMPLES / script),
                "--dataset_name",
                str(pairs or self.pairs),
                "--eval_split",
                self.args.split,
            ]
            command += ["--output_dir", str(output), "--seed", str(self.seed), "--save_strategy", "no", *options]
            command += ["--eval_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
            print(f"\n[seed {self.seed}] {name}\n  {' '.join(command)}", flush=True)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return output, json.loads(scores.read_text())

    def llava(self) -> str:
        """The folder of a plain LLaVA whose projector learned from captions of the real training images."""
        folder = self.folder / "llava-base"
        if not folder.exists():
            from datasets import load_from_disk
            from transformers import AutoProcessor

            from gmail_hf import GmailLlavaForConditionalGeneration
            from gmail_hf.digits.questions import QUESTIONS

            captions = self.folder / "captions"
            load_from_disk(self.pairs).remove_columns(["digits", "colors"]).save_to_disk(captions)
            options = [
                "--config",
                str(CONFIGS / "llava_digits.yaml"),
                "--modality",
                "real",
                "--question",
                QUESTIONS["caption"],
            ]
            options += ["--gmail_name_or_path", self.aligned(self.args.variants[0]), "--image_column", "real_image"]
            output = self.run("llava-captions", "train_llava.py", *options, pairs=captions)[0]
            model = GmailLlavaForConditionalGeneration.from_pretrained(output).to_llava("real")
            model.save_pretrained(folder.with_suffix(".part"))
            AutoProcessor.from_pretrained(output).save_pretrained(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
        return str(folder)

    def aligned(self, variant: str) -> str:
        """The folder of a model after stage 1."""
        config = str(CONFIGS / "digits.yaml")
        return str(self.run(f"stage1-{slug(variant)}", "train_gmail.py", "--config", config, *VARIANTS[variant])[0])


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def text_rows(runs: Runs) -> list[dict]:
    """CLIP's text side: retrieval, and zero-shot classification of the digits."""

    def row(name: str, *options: str, variant: str = runs.args.variants[0], training_free: str | None = None) -> dict:
        options = (
            "--config",
            str(CONFIGS / "digits_text.yaml"),
            "--model_name_or_path",
            runs.aligned(variant),
            *options,
        )
        output, scores = runs.run(f"text-{slug(name)}", "train_gmail.py", *options, training_free=training_free)
        return {"row": name, **retrieval(scores, "eval"), "zero_shot_digit": zero_shot_digits(runs, str(output))}

    first = runs.aligned(runs.args.variants[0])
    taken_for_real = ("--generated_modality", "real")
    rows = [row(GENERATED, *taken_for_real)]
    before = json.loads((runs.folder / f"text-{slug(GENERATED)}" / "before_results.json").read_text())
    rows.insert(0, {"row": BEFORE, **retrieval(before, "before"), "zero_shot_digit": zero_shot_digits(runs, first)})
    rows += [row(name, *taken_for_real, training_free=function) for name, function in TRAINING_FREE.items()]
    rows += [row(variant, variant=variant) for variant in runs.args.variants]
    return [*rows, row(REAL, "--gen_text_weight", "0", "--real_text_weight", "1")]


def retrieval(scores: dict, prefix: str) -> dict:
    names = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return {name: scores[f"{prefix}_{name}"] for name in names}


def zero_shot_digits(runs: Runs, folder: str) -> float:
    """Accuracy of left and right digit, each class an ensemble of all captions that name it in that place."""
    import numpy as np
    import torch
    from datasets import load_from_disk
    from transformers import CLIPProcessor

    from gmail_hf import GmailCLIPModel, embed_images
    from gmail_hf.digits.scenes import COLOR_NAMES, DIGIT_NAMES, caption_of
    from gmail_hf.evaluation import class_embeddings, zero_shot_accuracy

    model, processor = GmailCLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    scenes = load_from_disk(runs.pairs)[runs.args.split]
    images = embed_images(model, processor, scenes["real_image"], "real")
    colors = [(left, right) for left in COLOR_NAMES for right in COLOR_NAMES if left != right]
    accuracies = []
    for side in range(2):
        prompts = [
            caption_of([digit, other][:: 1 - 2 * side], list(pair))
            for digit in range(len(DIGIT_NAMES))
            for other in range(len(DIGIT_NAMES))
            for pair in colors
        ]
        with torch.no_grad():
            inputs = processor(text=prompts, padding=True, return_tensors="pt")
            embeds = model.embed_text(inputs["input_ids"], inputs["attention_mask"]).numpy()
        classes = class_embeddings(embeds.reshape(len(DIGIT_NAMES), -1, embeds.shape[1]))
        labels = np.array(scenes["digits"])[:, side]
        accuracies.append(zero_shot_accuracy(images, classes, labels)["top1"])
    return sum(accuracies) / 2


def clipcap_rows(runs: Runs) -> list[dict]:
    """ClipCap: captions of real images."""

    def row(name: str, *options: str, variant: str = runs.args.variants[0], training_free: str | None = None) -> dict:
        options = ("--config", str(CONFIGS / "clipcap_digits.yaml"), *options)
        options = (*options, "--model_name_or_path", runs.aligned(variant))
        scores = runs.run(f"clipcap-{slug(name)}", "train_clipcap.py", *options, training_free=training_free)[1]
        metrics = ("exact_match", "BLEU@4", "METEOR", "CIDEr", "ROUGE-L")
        return {"row": name, **{metric: scores.get(f"eval_{metric}") for metric in metrics}}

    rows = [row(GENERATED, "--modality", "real")]
    rows += [row(name, "--modality", "real", training_free=function) for name, function in TRAINING_FREE.items()]
    rows += [row(variant, variant=variant) for variant in runs.args.variants]
    return [*rows, row(REAL, "--modality", "real", "--image_column", "real_image")]


def answers(scores: dict) -> dict:
    """Exact answers to the questions of gmail_hf.digits.questions: digits, colors, the whole caption."""
    sides = ("left", "right")
    exact = {kind: sum(scores[f"eval_{side}_{kind}_exact_match"] for side in sides) / 2 for kind in ("digit", "color")}
    return {**exact, "caption": scores["eval_caption_exact_match"], "all": scores["eval_exact_match"]}


def llama_rows(runs: Runs) -> list[dict]:
    """Llama 3's bridge: a fresh projector between the tower and a frozen language model that has seen no image."""

    def row(name: str, *options: str, variant: str = runs.args.variants[0]) -> dict:
        options = (
            "--config",
            str(CONFIGS / "llava_digits.yaml"),
            "--gmail_name_or_path",
            runs.aligned(variant),
            *options,
        )
        return {"row": name, **answers(runs.run(f"llama-{slug(name)}", "train_llava.py", *options)[1])}

    rows = [row(GENERATED, "--modality", "real"), *(row(variant, variant=variant) for variant in runs.args.variants)]
    return [*rows, row(REAL, "--modality", "real", "--image_column", "real_image")]


def llava_rows(runs: Runs) -> list[dict]:
    """LLaVA: one whose projector was trained on captions of real images learns to answer, projector and LoRA."""
    base = runs.llava()

    def row(name: str, *options: str, variant: str = runs.args.variants[0]) -> dict:
        options = ("--config", str(CONFIGS / "llava_digits.yaml"), "--train", "projector+lora", *options)
        options = (*options, "--gmail_name_or_path", runs.aligned(variant), "--llava_name_or_path", base)
        return {"row": name, **answers(runs.run(f"llava-{slug(name)}", "train_llava.py", *options)[1])}

    rows = [row(BEFORE, "--modality", "real", "--learning_rate", "0", "--max_steps", "1")]
    rows += [row(GENERATED, "--modality", "real"), *(row(variant, variant=variant) for variant in runs.args.variants)]
    return [*rows, row(REAL, "--modality", "real", "--image_column", "real_image")]


# Of each bridge: its rows, and the scores that gap closed is told for.
BRIDGES = {
    "text": (text_rows, ("image_to_text_R@1", "text_to_image_R@1", "zero_shot_digit")),
    "clipcap": (clipcap_rows, ("exact_match", "CIDEr")),
    "llama": (llama_rows, ("caption", "all")),
    "llava": (llava_rows, ("caption", "all")),
}


def with_gaps(rows: list[dict], headline: tuple[str, ...]) -> list[dict]:
    """Add `NAME_gap_closed` beside each headline score; None where there is no gap, or no score."""
    from gmail_hf.evaluation import gap_closed

    by_name = {row["row"]: row for row in rows}
    for row in rows:
        for score in headline:
            values = [row[score], by_name[GENERATED][score], by_name[REAL][score]]
            gap = math.nan if None in values else gap_closed(*values).value
            row[f"{score}_gap_closed"] = None if math.isnan(gap) else gap
    return rows


def to_markdown(mean: list[dict], spread: list[dict], headline: tuple[str, ...]) -> str:
    """A table with gap closed after each headline score; `row` comes first."""
    scores = [key for key in mean[0] if key != "row" and not key.endswith("_gap_closed")]
    columns = []
    for score in scores:
        columns += [score, f"{score}_gap_closed"] if score in headline else [score]
    titles = ["gap closed" if key.endswith("_gap_closed") else key.replace("_", " ") for key in columns]
    lines = ["| trained on | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(columns)]
    for row, deviation in zip(mean, spread, strict=True):
        cells = ["–" if row[key] is None else f"{row[key]:.3f} ± {deviation[key]:.3f}" for key in columns]
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start = time.perf_counter()
    runs = [Runs(args, seed) for seed in args.seeds]
    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", "work_dir", "name")}
    result = {"environment": environment(), "settings": settings, "bridges": {}}
    sections = []
    for bridge in args.bridges:
        rows_of, headline = BRIDGES[bridge]
        tables = {one.seed: with_gaps(rows_of(one), headline) for one in runs}
        mean, spread = aggregate(list(tables.values()))
        result["bridges"][bridge] = {"mean": mean, "standard_deviation": spread, "seeds": tables}
        sections += [f"## {rows_of.__doc__.rstrip('.')}", "", to_markdown(mean, spread, headline), ""]
        print("\n".join(sections[-4:]), flush=True)
    result["seconds"] = round(time.perf_counter() - start)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    seeds = ", ".join(map(str, args.seeds))
    heading = [
        "# Stage 2: trained on generated images, scored on real ones",
        "",
        f"Mean ± standard deviation over the seeds {seeds}; {args.num_pairs} training pairs, {args.num_test} real "
        f"{args.split} images. Gap closed = (row − generated taken for real) / (real − generated taken for real), "
        "seed by seed.",
        "",
    ]
    (args.output_dir / f"{args.name}.md").write_text("\n".join([*heading, *sections, *provenance(result), ""]))
    return result


if __name__ == "__main__":
    main()
