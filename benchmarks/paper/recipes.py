"""The rows of each table and the figures of the paper, on the digits world."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from runs import ALONE, PAPER, Runs

BEFORE, GENERATED, REAL = "no fine-tuning", "generated taken for real", "real (upper bound)"
TRAINING_FREE = {"mean shift": "mean_shift", "CORAL": "coral"}
CONSISTENT, TOKENS = "GMAIL + 5 (1 - cos)", "GMAIL + token alignment"
ROBUST = "GMAIL, recipe robust"
TOKEN_SETS = "GMAIL + token sliced Wasserstein"
TAKEN_FOR_REAL = ("--modality", "real")
ON_REAL = ("--modality", "real", "--image_column", "real_image")
CAPTION_SCORES = ("exact_match", "BLEU@4", "METEOR", "CIDEr", "ROUGE-L")


def captioned(name: str, run: tuple[Path, dict]) -> dict:
    folder, scores = run
    return {"row": name, **{score: scores.get(f"eval_{score}") for score in CAPTION_SCORES}, "METEOR": meteor(folder)}


def meteor(folder: Path) -> float | None:
    """METEOR of a run's captions. Starting it takes ten seconds, so all runs share one process."""
    from gmail_hf.metrics.caption_scores import caption_metrics

    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    captions, references = [row["caption"] for row in rows], [row["references"] for row in rows]
    with ALONE:
        return caption_metrics(captions, references, ["METEOR"])["METEOR"]


def captioning(runs: Runs) -> list[dict]:
    rows = [captioned(GENERATED, runs.clipcap(GENERATED, *TAKEN_FOR_REAL))]
    for name, function in TRAINING_FREE.items():
        rows.append(captioned(name, runs.clipcap(name, *TAKEN_FOR_REAL, pairs=function)))
    for name, options in gmail_rows(runs).items():
        rows.append(captioned(name, runs.clipcap(name, **options)))
    return [*rows, captioned(REAL, runs.clipcap(REAL, *ON_REAL))]


def gmail_rows(runs: Runs) -> dict[str, dict[str, str]]:
    """Model and pairs of stage 2 by row. Unseen: generated images that stage 1 never saw."""
    rows = {name: {"model": runs.aligned(name)} for name in (PAPER, CONSISTENT, ROBUST)}
    unseen = {f"{name}, unseen images": {**rows[name], "pairs": "unseen"} for name in (PAPER, ROBUST)}
    return rows | unseen


def siglip_captioning(runs: Runs) -> list[dict]:
    """ClipCap on the small SigLIP."""
    models = {name: runs.aligned(name, base="siglip") for name in (PAPER, CONSISTENT)}
    found = {GENERATED: runs.clipcap(f"siglip {GENERATED}", *TAKEN_FOR_REAL, model=models[PAPER])}
    found |= {name: runs.clipcap(f"siglip {name}", model=model) for name, model in models.items()}
    found[REAL] = runs.clipcap(f"siglip {REAL}", *ON_REAL, model=models[PAPER])
    return [captioned(name, run) for name, run in found.items()]


def ifcap_captioning(runs: Runs) -> list[dict]:
    return [
        captioned("text only", runs.ifcap("text only", "--text_only", "true")),
        captioned(GENERATED, runs.ifcap(GENERATED, *TAKEN_FOR_REAL)),
        captioned(PAPER, runs.ifcap(PAPER)),
        captioned(REAL, runs.ifcap(REAL, *ON_REAL)),
    ]


def retrieved(name: str, scores: dict, prefix: str = "eval") -> dict:
    keys = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return {"row": name, **{key: scores[f"{prefix}_{key}"] for key in keys}}


def text_runs(runs: Runs) -> dict[str, tuple[Path, dict]]:
    """Runs of CLIP's text encoder by row."""
    taken_for_real = ("--generated_modality", "real")
    found = {GENERATED: runs.text(GENERATED, *taken_for_real)}
    for name, function in TRAINING_FREE.items():
        found[name] = runs.text(name, *taken_for_real, pairs=function)
    for name, options in gmail_rows(runs).items():
        found[name] = runs.text(name, **options)
    found[REAL] = runs.text(REAL, "--gen_text_weight", "0", "--real_text_weight", "1")
    return found


def retrieval(runs: Runs) -> list[dict]:
    found = text_runs(runs)
    before = json.loads((found[GENERATED][0] / "before_results.json").read_text())
    return [retrieved(BEFORE, before, "before"), *(retrieved(name, run[1]) for name, run in found.items())]


def retrieval_by_scale(runs: Runs) -> list[dict]:
    """[`retrieval`] with fewer pairs in both stages."""
    found = text_runs(runs)
    rows = [retrieved(name, found[name][1]) for name in (GENERATED, REAL)]
    for count in sizes(runs):
        few = ("--max_train_samples", str(count))
        model = runs.aligned(PAPER, "pairs", *few)
        rows.insert(-1, retrieved(f"GMAIL, {count} pairs", runs.text(f"gmail {count}", *few, model=model)[1]))
    return [*rows[:-1], retrieved(f"GMAIL, {runs.num_pairs} pairs", found[PAPER][1]), rows[-1]]


def base_retrieval(runs: Runs, base: str, pairs: str) -> list[dict]:
    """Retrieval with the text encoder of another base, before and after stage 2."""
    before = runs.aligned(pairs=pairs, base=base)
    common = {"pairs": pairs, "model": before}
    found = {GENERATED: runs.text(f"{base} {GENERATED}", "--generated_modality", "real", **common)}
    for name in (PAPER, CONSISTENT):
        found[name] = runs.text(f"{base} {name}", model=runs.aligned(name, pairs, base=base), pairs=pairs)
    found[REAL] = runs.text(f"{base} {REAL}", "--gen_text_weight", "0", "--real_text_weight", "1", **common)
    scores = json.loads((found[GENERATED][0] / "before_results.json").read_text())
    return [retrieved(BEFORE, scores, "before"), *(retrieved(name, run[1]) for name, run in found.items())]


def long_retrieval(runs: Runs) -> list[dict]:
    """Long captions: the bundled CLIP with stretched positions instead of Long-CLIP."""
    return base_retrieval(runs, "longclip", "long")


def siglip_retrieval(runs: Runs) -> list[dict]:
    return base_retrieval(runs, "siglip", "pairs")


def probes(runs: Runs) -> list[dict]:
    """Linear probes of digits and colors on a vision-only tower, trained on generated and scored on real images."""
    from datasets import load_from_disk

    from gmail_hf import metrics

    pairs = load_from_disk(runs.pairs())
    train, test = pairs["train"], pairs[runs.split]
    labels = {
        split: {
            f"{column} {side}": [row[side] for row in rows[column]]
            for column in ("digits", "colors")
            for side in (0, 1)
        }
        for split, rows in (("train", train), ("test", test))
    }
    models = {name: runs.aligned(name, base="synclr") for name in (PAPER, CONSISTENT, ROBUST)}
    embeds = {
        GENERATED: encoded(models[PAPER], train["generated_image"], "real"),
        REAL: encoded(models[PAPER], train["real_image"], "real"),
    }
    for name, function in TRAINING_FREE.items():
        embeds[name] = getattr(metrics, function)(embeds[GENERATED], embeds[REAL])(embeds[GENERATED])
    embeds |= {name: encoded(folder, train["generated_image"], "gen") for name, folder in models.items()}
    scored = encoded(models[PAPER], test["real_image"], "real")
    rows = []
    for name in (GENERATED, *TRAINING_FREE, *models, REAL):
        scores = {}
        for kind in ("digits", "colors"):
            tasks = [task for task in labels["train"] if task.startswith(kind)]
            found = [
                metrics.tuned_probe(embeds[name], labels["train"][task], scored, labels["test"][task], seed=runs.seed)
                for task in tasks
            ]
            scores[kind] = sum(probe.top1 for probe in found) / len(found)
        rows.append({"row": name, **scores})
    return rows


def encoded(folder: str, images: list, modality: str):
    """Embeddings `(n, dim)` of images by a model with branches."""
    from transformers import AutoImageProcessor, AutoModel

    from gmail_hf import embed_images

    with ALONE:
        model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
        return embed_images(model, processor, images, modality)


def sizes(runs: Runs) -> tuple[int, ...]:
    return runs.num_pairs // 8, runs.num_pairs // 4, runs.num_pairs // 2


def zero_shot(runs: Runs) -> list[dict]:
    found = text_runs(runs)
    folders = {BEFORE: runs.aligned(), **{name: folder for name, (folder, _) in found.items()}}
    return [{"row": name, "digits": zero_shot_digits(runs, str(folder))} for name, folder in folders.items()]


def zero_shot_digits(runs: Runs, folder: str) -> float:
    """Accuracy for the left and the right digit. Each class is an ensemble of all captions with this digit there."""
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
    rows += [answered(name, train(name, model=runs.aligned(name))) for name in (PAPER, TOKENS, TOKEN_SETS)]
    return [*rows, answered(REAL, train(REAL, *ON_REAL))]


def llama_questions(runs: Runs) -> list[dict]:
    return questions(runs.llama, runs)


def llava_questions(runs: Runs) -> list[dict]:
    untrained = runs.llava(BEFORE, *TAKEN_FOR_REAL, "--learning_rate", "0", "--max_steps", "1")
    return [answered(BEFORE, untrained), *questions(runs.llava, runs)]


def vlm_questions(runs: Runs) -> list[dict]:
    found = {BEFORE: runs.vlm(BEFORE, "real", "generated_image", 0), GENERATED: runs.vlm(GENERATED, "real")}
    found |= {name: runs.vlm(name, variant=name) for name in (PAPER, TOKENS, TOKEN_SETS)}
    found[REAL] = runs.vlm(REAL, "real", "real_image")
    return [answered(name, run) for name, run in found.items()]


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
    """Alignment of held-out pairs, by pooled embeddings and by the patch tokens that LLaVA reads."""
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
    """Embeddings `(n, dim)` and LLaVA's patch tokens `(n, tokens, hidden)` of held-out real or generated images."""
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
    """Figure 2: real images, each with five images generated from its caption."""
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
