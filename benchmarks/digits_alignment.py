"""Measure alignment: GMAIL, its variants and training-free baselines with several seeds on any paired data set.

    python benchmarks/digits_alignment.py                     # the shipped digits world, test split
    python benchmarks/digits_alignment.py --split validation  # the same on validation scenes: choose settings here
    python benchmarks/digits_alignment.py --name cifake --pairs cifake/pairs-train.parquet \\
        --real_test cifake/real-validation.parquet --model_name_or_path cifake/base-clip --label_column label

Paired data: a parquet file with columns real_image, generated_image, caption, image_id and labels; real test images: a
parquet file with columns image and labels; --split validation takes every second row of a class, and --split
test the others. Alignment and baselines are fitted on --num_pairs pairs. Readouts are fitted on the same pairs, and on
others that alignment never saw. A seed draws scenes and generator noise (digits) or which pairs are kept from training
(files), and the adapters and batches. It writes NAME.json and NAME.md with mean and standard deviation over the seeds.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

VARIANTS = {
    "GMAIL (Eq. 1)": {},
    "GMAIL + 5 (1 - cos)": {"consistency_weight": 5.0},
    "GMAIL, optimal pairing": {"pairing": "optimal"},
    "GMAIL, optimal pairing + 5 (1 - cos)": {"pairing": "optimal", "consistency_weight": 5.0},
    "GMAIL, sliced Wasserstein": {"align_weight": 0.0, "sliced_wasserstein_weight": 100.0},
    "GMAIL, recipe robust": {"recipe": "robust"},
}
# LoRA only in the upper layers: the lower layers need no backward pass, and their output could be cached.
UPPER_LAYERS = {"GMAIL (Eq. 1), upper 3 layers": 3, "GMAIL (Eq. 1), upper layer": 1}
VARIANTS |= {name: {} for name in UPPER_LAYERS}
SHOWN = ("name", "seeds", "variants")  # shown elsewhere in the report


def parse_args(argv: list[str] | None = None, description: str = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="digits", help="name of the two output files")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="real images to measure on")
    parser.add_argument("--pairs", help="parquet file of pairs instead of digits")
    parser.add_argument("--real_test", help="parquet file of real test images; needed with --pairs")
    parser.add_argument("--model_name_or_path", help="the CLIP to start from; needed with --pairs")
    parser.add_argument(
        "--label_column", nargs="+", default=["label"], help="label columns of --pairs; scores are averaged over them"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    default = [name for name in VARIANTS if name not in UPPER_LAYERS]
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=default)
    parser.add_argument("--num_pairs", type=int, default=2000, help="training pairs")
    parser.add_argument("--num_heldout", type=int, default=400, help="pairs to measure alignment on")
    parser.add_argument("--num_unseen", type=int, default=1000, help="pairs for readouts that alignment does not see")
    parser.add_argument(
        "--images_per_caption", type=int, default=1, help="generated images per caption of digits that alignment sees"
    )
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="guidance scale of the digits generator")
    parser.add_argument("--num_inference_steps", type=int, default=7, help="steps of the digits generator")
    parser.add_argument("--max_steps", type=int, default=250)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--bf16", action="store_true", help="train in bfloat16 with eager attention, fast on CPUs that support it"
    )
    args = parser.parse_args(argv)
    if args.pairs and not (args.real_test and args.model_name_or_path):
        parser.error("--pairs needs --real_test and --model_name_or_path")
    return args


def load_data(args: argparse.Namespace, seed: int):
    """
    (training pairs, held-out pairs, unseen pairs, real test images), of one seed. With several images per caption, the
    first `num_pairs` training pairs have the first image of each scene.
    """
    from datasets import concatenate_datasets, load_dataset

    if args.pairs is None:
        from gmail_hf.digits import generate_pairs, load_digits

        def generate(scenes, seed=seed):
            settings = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
            return generate_pairs(scenes, **settings, seed=seed)

        test = load_digits(args.split, seed=seed)
        scenes = load_digits("train", args.num_pairs + args.num_unseen, seed=seed)
        pairs, heldout = generate(scenes), generate(test.select(range(args.num_heldout)))
        unseen, train = pairs.select(range(args.num_pairs, len(pairs))), range(args.num_pairs)
        more = [generate(scenes.select(train), seed + 100 * i) for i in range(1, args.images_per_caption)]
        pairs = concatenate_datasets([pairs.select(train), *more])
        return pairs, heldout, unseen, test.rename_column("real_image", "image")
    pairs = load_dataset("parquet", data_files=args.pairs, split="train")
    test = load_dataset("parquet", data_files=args.real_test, split="train")
    kept = max(args.num_heldout, args.num_unseen)
    if len(pairs) < args.num_pairs + kept:
        raise ValueError(
            f"{args.pairs} has {len(pairs)} pairs; --num_pairs, --num_heldout and --num_unseen ask for "
            f"{args.num_pairs + kept}"
        )
    order = np.random.default_rng(seed).permutation(len(pairs))
    heldout, unseen = pairs.select(order[: args.num_heldout]), pairs.select(order[: args.num_unseen])
    pairs = pairs.select(order[kept : kept + args.num_pairs])
    return pairs, heldout, unseen, test.select(half(test[args.label_column[0]][:], args.split))


def half(labels: list, split: str) -> list[int]:
    """Every second row of each class: one half of the real images to choose settings, the other half for tables."""
    seen: dict = {}
    rows = []
    for row, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        if seen[label] % 2 == (split == "test"):
            rows.append(row)
    return rows


def labels_of(args: argparse.Namespace, rows) -> dict[str, np.ndarray]:
    if args.pairs is None:
        return {side: np.array(rows["digits"])[:, i] for i, side in enumerate(("left digit", "right digit"))}
    return {name: np.array(rows[name]) for name in args.label_column}


def run_seed(args: argparse.Namespace, model_path: str, seed: int, folder: str) -> list[dict]:
    """The table of one seed. The Trainer needs a `folder`, but leaves nothing in it."""
    import torch
    from transformers import AutoImageProcessor

    from gmail_hf import GmailCLIPModel, embed_images
    from gmail_hf.metrics import PairEmbeddings, train_on_generated

    train, heldout, unseen, test = load_data(args, seed)
    sets = train.select(range(args.num_pairs)), heldout, unseen
    processor = AutoImageProcessor.from_pretrained(model_path)  # no loss here reads a caption
    base = GmailCLIPModel.from_clip(model_path, dtype=torch.float32)

    def embed(images, model=base, modality="real"):
        return embed_images(model, processor, images, modality=modality)

    aligned = [{} for _ in sets]
    for name in args.variants:
        model = align(args, name, model_path, processor, train, seed, folder)
        for rows, embeds in zip(sets, aligned, strict=True):
            embeds[name] = embed(rows["generated_image"], model, "gen")
    first, heldout, unseen = (
        PairEmbeddings(embed(rows["generated_image"]), embed(rows["real_image"]), embeds, np.array(rows["caption"]))
        for rows, embeds in zip(sets, aligned, strict=True)
    )
    return train_on_generated(
        first,
        labels_of(args, sets[0]),
        heldout,
        embed(test["image"]),
        labels_of(args, test),
        seed=seed,
        unseen=unseen,
        unseen_labels=labels_of(args, sets[2]),
    )


def align(args: argparse.Namespace, name: str, model_path: str, processor, pairs, seed: int, folder: str):
    """A model that is trained by the variant `name`; the Trainer needs a `folder`, but keeps nothing in it."""
    import torch
    from transformers import set_seed

    from gmail_hf import GmailCLIPModel, GmailTrainer, GmailTrainingArguments

    print(f"seed {seed}: {name}", flush=True)
    set_seed(seed)
    attention = {"attn_implementation": "eager"} if args.bf16 else {}
    model = GmailCLIPModel.from_clip(model_path, dtype=torch.float32, lora_rank=4, **attention)
    trainer = GmailTrainer(
        model=model,
        args=GmailTrainingArguments(
            output_dir=folder,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            bf16=args.bf16,
            use_cpu=args.bf16 and not torch.cuda.is_available(),  # transformers asks for it
            logging_steps=max(1, args.max_steps // 4),
            save_strategy="no",
            report_to="none",
            seed=seed,
            **VARIANTS[name],
        ),
        train_dataset=pairs,
        processing_class=processor,
    )
    if name in UPPER_LAYERS:
        freeze_below(model, UPPER_LAYERS[name])
    trainer.train()
    return model.eval()


def freeze_below(model, upper: int) -> None:
    """Freeze the LoRA updates of all layers except the upper ones at zero."""
    layers = model.vision_model.encoder.layers
    layers[: len(layers) - upper].requires_grad_(False)


def main(argv: list[str] | None = None) -> dict:
    return run_seeds(parse_args(argv), run_seed, report)


def run_seeds(args: argparse.Namespace, run: Callable[..., list[dict]], text: Callable[[dict], str]) -> dict:
    """Call `run` for each seed; `text` gives the Markdown of the result, which is written after each seed."""
    start = time.perf_counter()
    if args.pairs is None:
        from gmail_hf.digits import clip_path

    model_path = args.model_name_or_path or clip_path()
    tables: dict[int, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            tables[seed] = run(args, str(model_path), seed, folder)
            result = write(args, tables, round(time.perf_counter() - start), text)
    return result


def write(args: argparse.Namespace, tables: dict[int, list[dict]], seconds: int, text: Callable[[dict], str]) -> dict:
    """Write the results of the seeds so far."""
    from gmail_hf.evaluation import environment
    from gmail_hf.metrics import aggregate

    mean, spread = aggregate(list(tables.values()))
    of_digits = ("guidance_scale", "num_inference_steps", "images_per_caption")
    of_files = ("pairs", "real_test", "model_name_or_path", "label_column")
    unused = ("output_dir", *(of_digits if args.pairs else of_files))
    settings = {key: value for key, value in vars(args).items() if key not in unused} | {"seeds": list(tables)}
    result = {
        "environment": environment(Path(__file__).parent),
        "settings": settings,
        "seconds": seconds,
        "mean": mean,
        "standard_deviation": spread,
        "seeds": tables,
    }
    return save(args, result, text(result))


def save(args: argparse.Namespace, result: dict, content: str) -> dict:
    """Write NAME.json and NAME.md, print the latter and return the result."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.output_dir / f"{args.name}.md").write_text(content)
    print(content)
    return result


def report(result: dict) -> str:
    from gmail_hf.evaluation import provenance
    from gmail_hf.metrics import to_markdown

    settings = result["settings"]
    table = to_markdown(result["mean"], result["standard_deviation"] if len(settings["seeds"]) > 1 else None)
    return "\n".join(
        [
            f"# {settings['name']}: train on generated, test on real",
            "",
            f"Mean ± standard deviation over the seeds {', '.join(map(str, settings['seeds']))}. The two readouts are "
            "fitted on each row's embeddings of the training pairs and tested on f_r(real test images). Gap closed = "
            "(row − generated taken for real) / (real − generated taken for real), seed by seed. Unseen: readouts of "
            f"{settings['num_unseen']} generated images that alignment never saw, compared with as many real ones. "
            "The last four columns compare held-out pairs; R@1 counts any real image of the same caption as right.",
            "",
            table,
            f"- settings: {', '.join(f'{key} {value}' for key, value in settings.items() if key not in SHOWN)}",
            *provenance(result),
            "",
        ]
    )


if __name__ == "__main__":
    main()
