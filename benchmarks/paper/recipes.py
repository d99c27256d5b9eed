"""One recipe per table or figure of the paper: its rows on the digits world, and the numbers of the paper."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runs import ALONE, PAPER, Runs

BEFORE, GENERATED, REAL = "no fine-tuning", "generated taken for real", "real (upper bound)"
TRAINING_FREE = {"mean shift": "mean_shift", "CORAL": "coral"}
CONSISTENT, TOKENS = "GMAIL + 5 (1 - cos)", "GMAIL + token alignment"
TAKEN_FOR_REAL = ("--modality", "real")
ON_REAL = ("--modality", "real", "--image_column", "real_image")
CAPTION_SCORES = ("exact_match", "BLEU@4", "METEOR", "CIDEr", "ROUGE-L")


@dataclass(frozen=True)
class Table:
    """
    A recipe.

    Args:
        numbers: of the paper's tables.
        title: what is measured here.
        rows: from the runs of one seed to dicts of scores, `row` first.
        headline: the scores for which the gap closed is reported.
        paper: the numbers of the paper, a Markdown table; empty if they cannot be compared.
        note: lines on the differences from the paper.
    """

    numbers: tuple[int, ...]
    title: str
    rows: Callable[[Runs], list[dict]]
    headline: tuple[str, ...] = ()
    paper: str = ""
    note: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        numbers = ", ".join(map(str, self.numbers))
        return f"Table{'s' * (len(self.numbers) > 1)} {numbers}: {self.title}"


def captioned(name: str, run: tuple[Path, dict]) -> dict:
    folder, scores = run
    return {"row": name, **{score: scores.get(f"eval_{score}") for score in CAPTION_SCORES}, "METEOR": meteor(folder)}


def meteor(folder: Path) -> float | None:
    """METEOR of a run's captions. Its process takes ten seconds to start, so one process serves all runs."""
    from gmail_hf.metrics.caption_scores import caption_metrics

    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    captions, references = [row["caption"] for row in rows], [row["references"] for row in rows]
    with ALONE:
        return caption_metrics(captions, references, ["METEOR"])["METEOR"]


def captioning(runs: Runs) -> list[dict]:
    rows = [captioned(GENERATED, runs.clipcap(GENERATED, *TAKEN_FOR_REAL))]
    for name, function in TRAINING_FREE.items():
        rows.append(captioned(name, runs.clipcap(name, *TAKEN_FOR_REAL, pairs=function)))
    for name in (PAPER, CONSISTENT):
        rows.append(captioned(name, runs.clipcap(name, model=runs.aligned(name))))
    return [*rows, captioned(REAL, runs.clipcap(REAL, *ON_REAL))]


def retrieved(name: str, scores: dict, prefix: str = "eval") -> dict:
    keys = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return {"row": name, **{key: scores[f"{prefix}_{key}"] for key in keys}}


def text_runs(runs: Runs) -> dict[str, tuple[Path, dict]]:
    """CLIP's text side, by row."""
    taken_for_real = ("--generated_modality", "real")
    found = {GENERATED: runs.text(GENERATED, *taken_for_real)}
    for name, function in TRAINING_FREE.items():
        found[name] = runs.text(name, *taken_for_real, pairs=function)
    for name in (PAPER, CONSISTENT):
        found[name] = runs.text(name, model=runs.aligned(name))
    found[REAL] = runs.text(REAL, "--gen_text_weight", "0", "--real_text_weight", "1")
    return found


def retrieval(runs: Runs) -> list[dict]:
    found = text_runs(runs)
    before = json.loads((found[GENERATED][0] / "before_results.json").read_text())
    return [retrieved(BEFORE, before, "before"), *(retrieved(name, run[1]) for name, run in found.items())]


def retrieval_by_scale(runs: Runs) -> list[dict]:
    """The same with fewer pairs, in both stages."""
    found = text_runs(runs)
    rows = [retrieved(name, found[name][1]) for name in (GENERATED, REAL)]
    for count in sizes(runs):
        few = ("--max_train_samples", str(count))
        model = runs.aligned(PAPER, "pairs", *few)
        rows.insert(-1, retrieved(f"GMAIL, {count} pairs", runs.text(f"gmail {count}", *few, model=model)[1]))
    return [*rows[:-1], retrieved(f"GMAIL, {runs.num_pairs} pairs", found[PAPER][1]), rows[-1]]


def sizes(runs: Runs) -> tuple[int, ...]:
    return runs.num_pairs // 8, runs.num_pairs // 4, runs.num_pairs // 2


def zero_shot(runs: Runs) -> list[dict]:
    found = text_runs(runs)
    folders = {BEFORE: runs.aligned(), **{name: folder for name, (folder, _) in found.items()}}
    return [{"row": name, "digits": zero_shot_digits(runs, str(folder))} for name, folder in folders.items()]


def zero_shot_digits(runs: Runs, folder: str) -> float:
    """Accuracy of left and right digit, each class an ensemble of all captions that name it in that place."""
    from gmail_hf.digits.benchmark import BENCHMARK
    from gmail_hf.evaluation import Settings, evaluate_zero_shot, load_model, open_source

    scenes = open_source(replace(BENCHMARK, split=runs.split), str(runs.pairs()))
    with ALONE:
        loaded = load_model(folder)
        return evaluate_zero_shot(loaded.model, loaded.processor, scenes, Settings()).scores["top1"]


def alignment_ablation(runs: Runs) -> list[dict]:
    both = runs.aligned("both branches trained")
    return [
        captioned(GENERATED, runs.clipcap(GENERATED, *TAKEN_FOR_REAL)),
        captioned("GMAIL, real branch frozen", runs.clipcap(PAPER, model=runs.aligned())),
        captioned("GMAIL, both branches trained", runs.clipcap("both branches", model=both)),
        captioned("real, both branches trained", runs.clipcap("both branches real", *ON_REAL, model=both)),
        captioned(REAL, runs.clipcap(REAL, *ON_REAL)),
    ]


def ablations(runs: Runs) -> list[dict]:
    rows = [captioned(GENERATED, runs.clipcap(GENERATED, *TAKEN_FOR_REAL))]
    one_branch = runs.aligned("one branch for both")
    rows.append(captioned("one branch, aligned", runs.clipcap("one branch", *TAKEN_FOR_REAL, model=one_branch)))
    mixed = ("--modality", "real", "--image_column", "mixed_image")
    rows.append(captioned("half generated, half real, mixed", runs.clipcap("mixed", *mixed, pairs="mixed")))
    for name in ("rank 2", "rank 6", "rank 128 (full)"):
        rows.append(captioned(f"GMAIL, {name}", runs.clipcap(name, model=runs.aligned(name))))
    rows.append(captioned("GMAIL, rank 4", runs.clipcap(PAPER, model=runs.aligned())))
    for count in sizes(runs):
        few = ("--max_train_samples", str(count))
        model = runs.aligned(PAPER, "pairs", *few)
        rows.append(captioned(f"GMAIL, {count} pairs", runs.clipcap(f"gmail {count}", *few, model=model)))
    near = runs.clipcap("near", *TAKEN_FOR_REAL, pairs="near")
    rows.append(captioned("a better generator, taken for real", near))
    model = runs.aligned(PAPER, "near")
    rows.append(captioned("a better generator, GMAIL", runs.clipcap("near gmail", model=model, pairs="near")))
    return [*rows, captioned(REAL, runs.clipcap(REAL, *ON_REAL))]


def answered(name: str, run: tuple[Path, dict]) -> dict:
    """Exact answers to the questions of gmail_hf.digits.questions."""
    scores = run[1]
    exact = {
        kind: sum(scores[f"eval_{side}_{kind}_exact_match"] for side in ("left", "right")) / 2
        for kind in ("digit", "color")
    }
    return {"row": name, **exact, "caption": scores["eval_caption_exact_match"], "all": scores["eval_exact_match"]}


def questions(train: Callable, runs: Runs) -> list[dict]:
    rows = [answered(GENERATED, train(GENERATED, *TAKEN_FOR_REAL))]
    rows += [answered(name, train(name, model=runs.aligned(name))) for name in (PAPER, TOKENS)]
    return [*rows, answered(REAL, train(REAL, *ON_REAL))]


def llama_questions(runs: Runs) -> list[dict]:
    return questions(runs.llama, runs)


def llava_questions(runs: Runs) -> list[dict]:
    untrained = runs.llava(BEFORE, *TAKEN_FOR_REAL, "--learning_rate", "0", "--max_steps", "1")
    return [answered(BEFORE, untrained), *questions(runs.llava, runs)]


def cost(runs: Runs) -> list[dict]:
    rows = []
    for name, (folder, _) in {
        "stage 1, GMAIL": (Path(runs.aligned()), {}),
        "stage 1, both branches trained": (Path(runs.aligned("both branches trained")), {}),
        "stage 2, ClipCap, GMAIL": runs.clipcap(PAPER, model=runs.aligned()),
        "stage 2, ClipCap, real": runs.clipcap(REAL, *ON_REAL),
    }.items():
        found = json.loads((folder / "train_results.json").read_text())
        row = {"row": name, "trained parameters": found["trained_parameters"], "seconds": found["train_runtime"]}
        row |= {"GFLOPs a step": found["flops_per_step"] / 1e9, "peak memory, GB": found["peak_memory_bytes"] / 1e9}
        rows.append(row)
    return rows


def alignment(runs: Runs) -> list[dict]:
    """Held-out pairs in the space of pooled embeddings, and the patch tokens that LLaVA reads."""
    from gmail_hf.metrics import paired_cosine, separability, token_similarity

    rows = []
    for name in ("without alignment", PAPER, CONSISTENT, TOKENS):
        modality = "real" if name == "without alignment" else "gen"
        model = runs.aligned(PAPER if modality == "real" else name)
        (real, real_tokens), (generated, tokens) = (
            embed(runs, model, "real", "real"),
            embed(runs, model, "generated", modality),
        )
        row = {"row": name, "paired cosine": paired_cosine(generated, real)}
        row["separability"] = separability(generated, real, seed=runs.seed)
        row["token similarity"] = token_similarity(tokens, real_tokens)
        row["token separability"] = separability(tokens.mean(axis=1), real_tokens.mean(axis=1), seed=runs.seed)
        rows.append(row)
    return rows


def embed(runs: Runs, folder: str, side: str, modality: str) -> tuple:
    """Embeddings `(n, dim)` and LLaVA's patch tokens `(n, tokens, hidden)` of the held-out images of one side."""
    import numpy as np
    import torch
    from datasets import load_from_disk
    from transformers import CLIPProcessor

    from gmail_hf import GmailCLIPModel

    images = load_from_disk(runs.pairs())[runs.split][f"{side}_image"][:]
    embeds, tokens = [], []
    with ALONE, torch.no_grad():
        model, processor = GmailCLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
        for start in range(0, len(images), 250):
            inputs = processor(images=images[start : start + 250], return_tensors="pt")
            outputs = model.get_image_features(**inputs, modality=modality, output_hidden_states=True)
            embeds.append(outputs.pooler_output.numpy())
            tokens.append(outputs.hidden_states[-2][:, 1:].numpy())
    return np.concatenate(embeds), np.concatenate(tokens)


def grid(runs: Runs, path: Path) -> Path:
    """Figure 2: real images, each with five generated from its caption."""
    from datasets import load_from_disk

    from gmail_hf.digits import generate_pairs
    from gmail_hf.metrics import plot_pairs

    scenes = load_from_disk(runs.pairs())[runs.split].select(range(6)).remove_columns("generated_image")
    with ALONE:
        columns = [generate_pairs(scenes, seed=seed)["generated_image"][:] for seed in range(5)]
        generated = list(zip(*columns, strict=True))
        plot_pairs(path, scenes["real_image"][:], generated, scenes["caption"][:], columns=2)
    return path


def embedding_plot(runs: Runs, path: Path) -> Path:
    """Figure 3: t-SNE of held-out embeddings before and after alignment."""
    from gmail_hf.metrics import plot_embeddings

    sides = (("real", "real"), ("generated", "real"), ("generated", "gen"))
    embeds = [embed(runs, runs.aligned(), *side)[0] for side in sides]
    with ALONE:
        plot_embeddings(path, *embeds, seed=runs.seed)
    return path


FIGURES = {2: grid, 3: embedding_plot}


def reported(columns: Sequence[str], *rows: Sequence[str | float]) -> str:
    """A Markdown table of figures of the paper."""
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---|" + "---:|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


CAPTIONS, RECALLS = ("B@4", "METEOR", "CIDEr", "SPICE"), ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10")
TABLES = (
    Table(
        (1,),
        "captioning (ClipCap)",
        captioning,
        ("exact_match", "CIDEr"),
        reported(
            CAPTIONS,
            ("ClipCap", 32.15, 27.10, 108.35, 20.12),
            ("ClipCap + GMAIL", 38.12, 31.67, 119.53, 23.75),
            ("LLaVA", 39.67, 32.38, 134.29, 24.17),
            ("LLaVA + GMAIL", 43.26, 34.89, 146.38, 27.23),
            ("Llama-3", 47.36, 35.21, 158.13, 28.35),
            ("Llama-3 + GMAIL", 50.21, 38.59, 168.53, 32.58),
        ),
        ("LLaVA and Llama-3 are under Tables 10 and 15; IFCap has no implementation here.", ""),
    ),
    Table(
        (2, 3, 5),
        "zero-shot retrieval (CLIP's text side)",
        retrieval,
        ("image_to_text_R@1", "text_to_image_R@1"),
        reported(
            RECALLS,
            ("COCO, CLIP", 51.8, 76.8, 84.3, 32.7, 57.7, 68.2),
            ("COCO, CLIP + GMAIL", 56.8, 80.1, 87.2, 37.5, 62.7, 73.2),
            ("Flickr30k, CLIP", 44.1, 68.2, 77.0, 24.7, 45.1, 54.6),
            ("Flickr30k, CLIP + GMAIL", 47.1, 71.2, 79.6, 30.2, 50.3, 60.5),
        ),
        ("One world stands for COCO, Flickr30k and the long captions of ShareGPT4V; Long-CLIP is not here.", ""),
    ),
    Table(
        (4,),
        "zero-shot classification",
        zero_shot,
        ("digits",),
        reported(
            ("DTD", "Cars", "SUN397", "Food101", "Aircraft", "Pets", "Caltech101", "ImageNet"),
            ("CLIP", 55.20, 77.53, 69.31, 93.08, 32.88, 93.33, 93.24, 75.54),
            ("CLIP + GMAIL", 65.26, 81.32, 75.53, 95.21, 37.85, 95.23, 95.57, 77.68),
        ),
    ),
    Table(
        (7,),
        "retrieval by the number of training pairs",
        retrieval_by_scale,
        ("image_to_text_R@1", "text_to_image_R@1"),
        reported(
            ("i2t R@1", "t2i R@1"),
            ("CLIP + GMAIL, COCO (560k pairs)", 47.1, 30.2),
            ("CC3M (3.3M)", 48.6, 32.6),
            ("CC12M (12M)", 50.9, 34.9),
        ),
        ("Flickr30k in the paper; the number of steps stays the same here.", ""),
    ),
    Table(
        (9,),
        "captioning, with and without alignment",
        alignment_ablation,
        ("exact_match", "CIDEr"),
        reported(
            ("B@4", "CIDEr", "SPICE"),
            ("synthetic, no alignment", 36.15, 115.35, 22.95),
            ("synthetic, dual projection + alignment", 38.12, 119.53, 23.75),
            ("real, no alignment", 38.24, 119.78, 23.86),
            ("real, dual projection + alignment", 38.37, 119.95, 23.98),
        ),
        ("Gap closed in the paper's numbers: 0.94 of B@4 and of CIDEr.", ""),
    ),
    Table(
        (6, 8, 11, 13, 16, 17),
        "captioning, ablations",
        ablations,
        ("exact_match", "CIDEr"),
        reported(
            ("B@4", "CIDEr", "SPICE"),
            ("same steps: no alignment", 35.76, 113.42, 22.63),
            ("same steps: GMAIL", 37.92, 117.6, 23.42),
            ("LoRA rank 2 / 4 / 6 / full fine-tuning", "", "117.62 / 119.53 / 119.12 / 118.95", ""),
            ("Task2Sim (mixing)", 36.65, 115.72, 23.02),
            ("FLUX images, no alignment", 37.20, 117.82, 23.40),
            ("FLUX images, GMAIL", 39.54, 122.36, 24.15),
        ),
        (
            "The paper's ablations of captions, in one table: branches, mixing, rank, number of pairs, generator. All "
            "rows take the same number of steps. Full fine-tuning is LoRA of the layers' full rank here; the better "
            "generator is ours at its best sampling settings; SigLIP has no two-branch model here.",
            "",
        ),
    ),
    Table(
        (10,),
        "questions about images, a projector to a frozen language model (Llama 3's bridge)",
        llama_questions,
        ("caption", "all"),
        reported(
            ("ScienceQA",), ("LLaVA", 85.2), ("LLaVA + GMAIL", 87.6), ("Llama-3", 88.5), ("Llama-3 + GMAIL", 91.2)
        ),
    ),
    Table(
        (15,),
        "questions about images, projector and LoRA of a LLaVA",
        llava_questions,
        ("caption", "all"),
        reported(("MMMU",), ("LLaVA", 44.7), ("LLaVA + GMAIL", 48.3)),
        ("The LLaVA had learned captions of the real training images before, as a published one has.", ""),
    ),
    Table(
        (12,),
        "cost of training",
        cost,
        paper=reported(
            ("hours", "steps", "GB"),
            ("GMAIL", 10, "60k", 28),
            ("generated + real, no alignment", 12, "70k", 26),
            ("real", 8, "50k", 24),
        ),
        note=("One thread of a CPU here; an A100-80GB for all of COCO in the paper.", ""),
    ),
    Table(
        (14,),
        "held-out pairs: pooled embeddings, and the patch tokens that LLaVA reads",
        alignment,
        paper=reported(("paired cosine",), ("without alignment", 0.52), ("with alignment", 0.89)),
    ),
)


def coco_commands(table: Table) -> list[str]:
    """
    The commands for a table on COCO with the paper's settings; they need the Hub and GPUs.

    Lines that begin with # describe data to provide and manual steps.
    """
    launch, config, pairs = "accelerate launch -m gmail_hf.commands", "--config examples/configs", "--dataset coco-sd2"

    def generate(name: str, split: str = "train") -> str:
        captions = f"--dataset org/{name}-captions --split {split} --real_image_column image"
        return f"{launch}.generate {captions} --output_dir {name}-sd2"

    def align(name: str) -> str:
        return f"{launch}.train {config}/{name}.yaml --dataset {name}-sd2 --output_dir gmail-{name}"

    def adapt(name: str) -> list[str]:
        """From captions to CLIP's text side."""
        text = f"--stage text --model gmail-{name} --dataset {name}-sd2"
        text = f"{launch}.train {text} --output_dir gmail-{name}-text"
        return [generate(name), align(name), text]

    def score(model: str, benchmarks: str, options: str = "") -> str:
        options += f" --output_dir {model}-scores"
        return f"gmail-hf evaluate --model {model} --benchmarks {benchmarks}{options}"

    # Stage 2 ends with the real images of the validation split.
    both = [generate("coco"), generate("coco", "validation")]
    captioners = [*both, align("coco")]
    for name, options in {"": (), "-taken-for-real": TAKEN_FOR_REAL, "-real": ON_REAL}.items():
        words = " ".join(("--model gmail-coco", pairs, *options, f"--output_dir clipcap-coco{name}"))
        captioners.append(f"{launch}.caption {config}/clipcap_coco.yaml {words}")
        captioners.append(score(f"clipcap-coco{name}", "coco"))
    long_captions = [
        "# FOLDER: share-captioner_coco_lcs_sam_1246k_1107.json of Lin-Chen/ShareGPT4V, and its first 1,000 images.",
        score("gmail-coco-text", "coco,flickr30k,sharegpt4v", " --dataset sharegpt4v=FOLDER"),
    ]
    classes = score("gmail-coco-text", "dtd,cars,sun397,food101,aircraft,pets,caltech101,imagenet")
    scales = [[*adapt(name), score(f"gmail-{name}-text", "flickr30k")] for name in ("coco", "cc3m", "cc12m")]
    tower = f"{launch}.train {config}/coco_llava.yaml {pairs} --output_dir gmail-coco-336"
    llama = f"{launch}.vlm {config}/llama3_8b.yaml --model gmail-coco {pairs}"
    llava = f"{launch}.vlm {config}/llava_1.5_7b.yaml --model gmail-coco-336 {pairs}"
    answers = {name: score(name, "scienceqa,mmmu", " --dtype bfloat16") for name in ("llama3-coco", "llava-coco")}
    ablations = [
        "# One branch: --train_real --generated_modality real in stage 1, then the captioner with --modality real.",
        "# Another rank: --lora_rank 2 --lora_alpha 4 in stage 1; fewer pairs: --max_train_samples in both stages.",
        "# Another generator: --generator, and all else on its pairs.",
        "# Mixing, by hand: pairs with a column of both images by turns, then --modality real --image_column COLUMN.",
    ]
    commands = {
        "captioning": captioners,
        "retrieval": [*adapt("coco"), *long_captions],
        "zero_shot": [*adapt("coco"), classes],
        "retrieval_by_scale": sum(scales, []),
        "alignment_ablation": [*captioners, "# Both branches trained: --train_real in stage 1, then the captioners."],
        "ablations": [*captioners, *ablations],
        "llama_questions": [*both, align("coco"), f"{llama} --output_dir llama3-coco", answers["llama3-coco"]],
        "llava_questions": [*both, tower, f"{llava} --output_dir llava-coco", answers["llava-coco"]],
        "cost": [generate("coco"), align("coco"), "# The cost of a training is in its folder: train_results.json."],
        "alignment": [
            *(generate("coco"), generate("coco", "test"), align("coco")),
            score("gmail-coco", "coco", " --dataset coco=coco-sd2"),
        ],
    }
    captions = "# org/NAME-captions: images and captions on the Hub, split train, and of COCO validation and test too."
    return [captions, *commands[table.rows.__name__]]
