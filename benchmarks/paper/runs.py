"""Runs of the training commands for one seed. Each command is printed, run once and reused."""

import json
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import call
from sft import fine_tune

from gmail_hf.commands.cli import run as run_command

# Ways to align the gen branch, as options of `gmail-hf train`; the first is the paper's.
VARIANTS = {
    "GMAIL (Eq. 1)": [],
    "GMAIL + 5 (1 - cos)": ["--consistency_weight", "5"],
    "GMAIL, recipe robust": ["--recipe", "robust"],
    "GMAIL + token alignment": ["--token_weight", "1"],
    "GMAIL + token sliced Wasserstein": ["--token_weight", "10", "--token_loss", "sliced_wasserstein"],
    "rank 2": ["--lora_rank", "2", "--lora_alpha", "4"],
    "rank 6": ["--lora_rank", "6", "--lora_alpha", "12"],
    "rank 128 (full)": ["--lora_rank", "128", "--lora_alpha", "256"],
    "both branches trained": ["--train_real"],
    "one branch for both": ["--train_real", "--generated_modality", "real"],
}
PAPER = "GMAIL (Eq. 1)"
# With these steps, all tables take an hour; the recipes have 250 and 500 steps.
FEWER_STEPS = {"stage 1": ("--max_steps", "200"), "questions": ("--max_steps", "250")}
TRAINING_FREE = ("mean_shift", "coral")
UNSEEN = 1000  # added to the seed of the training pairs, for pairs that stage 1 never saw
NEAR = {"guidance_scale": 2.0, "num_inference_steps": 20}  # the generator's best sampling, see its card

# Loading a model in transformers and drawing with matplotlib are not thread-safe (tensors that other threads create
# meanwhile are on the meta device), so both need this lock. Request pairs and runs before acquiring it.
ALONE = threading.Lock()

# Further bases, trained by benchmarks/digits/train_bases.py with these settings and shared by all seeds.
BASES = {
    "siglip": {},
    "synclr": {"num_steps": 3000},  # digits take about as long as for the bundled CLIP
    "longclip": {"num_steps": 400, "batch_size": 128, "learning_rate": 5e-4},
    "vlm": {},  # by train_vlm.py
}
# Its language model reads the last layer of the tower.
VLM_STAGE_1 = ("--token_layer", "-1", "--max_steps", "80", "--per_device_train_batch_size", "64")
_BASE_LOCKS = {kind: threading.Lock() for kind in BASES}


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def generate(
    folder: Path, split: str, num_pairs: int, scored: int | Path, seed: int, sampling: dict[str, float]
) -> None:
    """Save generated digits pairs for training and of another split, which may be copied from another folder."""
    from datasets import DatasetDict, load_from_disk

    from gmail_hf.digits import generate_pairs, load_digits

    def made(split: str, size: int):
        return generate_pairs(load_digits(split, size, seed=seed), seed=seed, **sampling)

    rest = made(split, scored) if isinstance(scored, int) else load_from_disk(scored)[split]
    DatasetDict({"train": made("train", num_pairs), split: rest}).save_to_disk(folder)


def move(pairs: Path, model: str, name: str, folder: Path) -> None:
    """Save pairs with `generated_embeds`, f_r(generated) moved by a training-free map fitted on the train split."""
    from datasets import List, Value, load_from_disk
    from transformers import CLIPProcessor

    from gmail_hf import GmailCLIPModel, embed_images, metrics

    splits = load_from_disk(pairs)
    gmail, processor = GmailCLIPModel.from_pretrained(model), CLIPProcessor.from_pretrained(model)

    def embed(split: str, side: str):
        return embed_images(gmail, processor, splits[split][f"{side}_image"], "real")

    onto_real = getattr(metrics, name)(embed("train", "generated"), embed("train", "real"))
    for split, rows in splits.items():
        moved = list(onto_real(embed(split, "generated")).astype("float32"))
        splits[split] = rows.add_column("generated_embeds", moved, feature=List(Value("float32")))
    splits.save_to_disk(folder)


def train_base(kind: str, folder: Path) -> None:
    """Train a base with its recipe in benchmarks/digits."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
    import train_bases
    import train_vlm

    if kind == "vlm":
        train_vlm.make(train_vlm.VlmArguments(str(folder), **BASES[kind]))
    else:
        train_bases.train(train_bases.BaseArguments(str(folder), kind, **BASES[kind]))


def with_long_captions(pairs: Path, seed: int, folder: Path) -> None:
    """Save pairs whose captions also describe positions and background, with images of the short captions."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
    from datasets import load_from_disk
    from train_bases import long_captions

    from gmail_hf.digits.scenes import split_scenes

    splits = load_from_disk(pairs)
    for split, rows in splits.items():
        blocks = split_scenes(split, len(rows), seed)
        captions = [caption for scenes in blocks for caption in long_captions(scenes)]
        splits[split] = rows.remove_columns("caption").add_column("caption", captions)
    splits.save_to_disk(folder)


@dataclass
class Runs:
    """
    The data and the runs of one seed on the digits world.

    Args:
        folder: the folder for data and runs.
        seed: the seed of the scenes, the generator's noise, the adapters and the batches.
        split: the split of the scored real images.
        num_pairs, num_test: the numbers of training pairs and of scored real images.
        slots: limits the number of concurrent runs.
    """

    folder: Path
    seed: int
    split: str
    num_pairs: int
    num_test: int
    slots: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1))
    locks: dict[str, threading.Lock] = field(default_factory=dict)
    made: set[str] = field(default_factory=set, init=False)  # names of runs; the others were found
    found: set[str] = field(default_factory=set, init=False)

    def _lock(self, name: str) -> threading.Lock:
        """A lock per run, so that tables that need the same run share one command."""
        return self.locks.setdefault(name, threading.Lock())

    def pairs(self, name: str = "pairs") -> Path:
        """
        Pairs on disk: `pairs`; `unseen`, the same number of other scenes and images, for stage 2 only; `near`,
        generated with the best settings of the generator; `mixed`, with a column of alternating generated and real
        images; `long`, with long captions; `mean_shift` and `coral`, with a column
        `generated_embeds`, f_r(generated) moved onto f_r(real) by the map of this name in gmail_hf.metrics.
        """
        folder = self.folder / name
        with self._lock(name):
            if not folder.exists():
                partial = folder.with_suffix(".part")
                if name == "mixed":
                    self._mixed().save_to_disk(partial)
                elif name == "long":
                    arguments = (self.pairs(), self.seed, partial)
                    self._call(name, f"long captions {self.pairs()}", with_long_captions, *arguments)
                elif name in TRAINING_FREE:
                    arguments = (self.pairs(), self.aligned(), name, partial)
                    self._call(name, f"move {' '.join(map(str, arguments))}", move, *arguments)
                else:
                    self._generate(name, partial)
                partial.rename(folder)
        return folder

    def _generate(self, name: str, folder: Path) -> None:
        # Only real images of the scored split are used, so one generator is enough for it.
        scored = self.num_test if name == "pairs" else self.pairs()
        seed = self.seed + UNSEEN if name == "unseen" else self.seed
        arguments = (folder, self.split, self.num_pairs, scored, seed, NEAR if name == "near" else {})
        self._call(name, f"generate {' '.join(map(str, arguments))}", generate, *arguments)

    def _mixed(self):
        from datasets import Image, load_from_disk

        pairs = load_from_disk(self.pairs())
        for split, rows in pairs.items():
            raw = rows.cast_column("real_image", Image(decode=False)).cast_column(
                "generated_image", Image(decode=False)
            )
            images = [row[("generated_image", "real_image")[i % 2]] for i, row in enumerate(raw)]
            pairs[split] = rows.add_column("mixed_image", images, feature=Image())
        return pairs

    def run(self, name: str, command: str, *options: str, pairs: Path | None = None) -> tuple[Path, dict]:
        """Run `gmail-hf COMMAND` unless it was run before, and return its output folder and its scores."""
        words = ["--dataset", str(pairs or self.pairs()), "--eval_split", self.split]
        words += ["--output_dir", str(self.folder / name), "--seed", str(self.seed), *options]
        words += ["--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
        return self._once(name, f"gmail-hf {command} {shlex.join(words)}", run_command, command, words)

    def _once(self, name: str, printed: str, function: Callable, *arguments: Any) -> tuple[Path, dict]:
        """Call a function that writes scores into the folder `name`, unless they exist; return folder and scores."""
        output = self.folder / name
        with self._lock(name):
            if not (output / "eval_results.json").exists():
                shutil.rmtree(output, ignore_errors=True)  # commands refuse the folder of an interrupted run
                self._call(name, printed, function, *arguments)
                self.made.add(name)
            elif name not in self.made:
                self.found.add(name)
        return output, json.loads((output / "eval_results.json").read_text())

    def _call(self, name: str, printed: str, function: Callable, *arguments: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.slots:
            print(f"[seed {self.seed}] {name}: {printed}", flush=True)
            call(self.folder / f"{name}.log", function, *arguments)

    def base(self, kind: str) -> str:
        """The folder of a base in `BASES`."""
        folder = self.folder.parent / "bases" / kind
        with _BASE_LOCKS[kind]:
            if not (folder / "model.safetensors").exists():
                self._call(f"base-{kind}", f"train_bases.py --kind {kind}", train_base, kind, folder)
        return str(folder)

    def aligned(self, variant: str = PAPER, pairs: str = "pairs", *options: str, base: str = "") -> str:
        """The folder of a model after stage 1, of the bundled CLIP or another base."""
        name = f"stage1-{slug(variant)}" + ("" if pairs == "pairs" else f"-{pairs}") + "".join(map(slug, options))
        if base:
            name, options = f"{name}-{base}", (*options, "--model", self.base(base))
        config = ("--config", "digits", *FEWER_STEPS["stage 1"])
        output, _ = self.run(name, "train", *config, *VARIANTS[variant], *options, pairs=self.pairs(pairs))
        return str(output)

    def text(self, name: str, *options: str, model: str | None = None, pairs: str = "pairs"):
        """A text encoder after stage 2: `(folder, scores)`."""
        options = ("--config", "digits_text", *options, "--model", model or self.aligned())
        return self.run(f"text-{slug(name)}", "train", *options, pairs=self.pairs(pairs))

    def clipcap(self, name: str, *options: str, model: str | None = None, pairs: str = "pairs", kind: str = "clipcap"):
        """A captioner after stage 2: `(folder, scores)`; METEOR is left to the recipes."""
        options = ("--config", f"{kind}_digits", "--caption_metrics", "BLEU@4", "CIDEr", "ROUGE-L", *options)
        options = (*options, "--model", model or self.aligned())
        return self.run(f"{kind}-{slug(name)}", "caption", *options, pairs=self.pairs(pairs))

    def ifcap(self, name: str, *options: str, model: str | None = None):
        """As `clipcap`, an IFCap."""
        return self.clipcap(name, *options, model=model, kind="ifcap")

    def llama(self, name: str, *options: str, model: str | None = None, pairs: Path | None = None):
        """A projector to the frozen language model after stage 2: `(folder, scores)`."""
        options = ("--config", "llava_digits", *FEWER_STEPS["questions"], *options)
        options = (*options, "--model", model or self.aligned(), "--max_eval_samples", "400")
        return self.run(f"llama-{slug(name)}", "vlm", *options, pairs=pairs)

    def llava(self, name: str, *options: str, model: str | None = None):
        """A LLaVA, projector and LoRA, after stage 2: `(folder, scores)`."""
        options = ("--train", "projector+lora", "--llava", self._llava_base(), *FEWER_STEPS["questions"], *options)
        options = ("--config", "llava_digits", *options, "--model", model or self.aligned())
        return self.run(f"llava-{slug(name)}", "vlm", *options, "--max_eval_samples", "400")

    def vlm(self, name: str, *options: str | int, variant: str = PAPER):
        """
        A small Idefics 3 after stage 2 by TRL: `(folder, scores)`; `options` are the last arguments of
        [`sft.fine_tune`], from the branch of the training images on.
        """
        name, branches = f"vlm-{slug(name)}", self.aligned(variant, "pairs", *VLM_STAGE_1, base="vlm")
        models = (self.folder / name, self.base("vlm"), branches)
        arguments = (*models, self.pairs(), self.split, self.seed, *options)
        return self._once(name, f"sft.fine_tune {' '.join(map(str, arguments))}", fine_tune, *arguments)

    def _llava_base(self) -> str:
        """The folder of a plain LLaVA whose projector learned from captions of the real training images."""
        folder = self.folder / "llava-base"
        with self._lock("llava-base"):
            if not folder.exists():
                from datasets import load_from_disk
                from transformers import AutoProcessor

                from gmail_hf import GmailLlavaForConditionalGeneration
                from gmail_hf.digits.questions import QUESTIONS

                captions = self.folder / "captions"
                if not captions.exists():
                    load_from_disk(self.pairs()).remove_columns(["digits", "colors"]).save_to_disk(captions)
                options = ("--modality", "real", "--image_column", "real_image", "--question", QUESTIONS["caption"])
                output, _ = self.llama("captions", *options, pairs=captions)
                partial = folder.with_suffix(".part")
                with ALONE:
                    model = GmailLlavaForConditionalGeneration.from_pretrained(output)
                    model.to_llava("real").save_pretrained(partial)
                    AutoProcessor.from_pretrained(output).save_pretrained(partial)
                partial.rename(folder)
        return str(folder)
