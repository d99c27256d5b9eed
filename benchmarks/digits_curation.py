"""What `gmail-hf curate` is worth on digits: the gap before alignment and after, with and without curation.

    python benchmarks/digits_curation.py
    python benchmarks/digits_curation.py --split validation --seeds 7    # choose settings here

Per seed, the bundled generator makes --images_per_caption images for each of --num_captions real scenes. Sets of them:

    first of each caption        as if one image had been made for each caption
    best of each caption         curated with best_k=1
    all
    all, curated                 with the default thresholds
    all + planted                images spoiled on purpose in 20 % of the rows: 8 % show another caption, 8 % are
                                 another image of their caption with noise of at most 2 of 255, 4 % are black
    all + planted, curated       the same, curated with the default thresholds

CLIPScore and copies come from the bundled CLIP, which is also the one that is aligned: there is no other one for this
world. Readouts are trained on each set's generated images with the labels of their captions and tested on real test
scenes, before alignment and after. It writes NAME.json and NAME.md with mean and standard deviation over the seeds.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from digits_alignment import save

TASKS = ("left digit", "right digit")
PLANTED = {"wrong caption": 0.08, "copy": 0.08, "black": 0.04}
FOUND_AS = {"wrong caption": "mismatch", "copy": "duplicate", "black": "constant"}
READOUTS = ("probe", "centroid")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="digits-curated", help="of the two files written")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="real images to measure on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_captions", type=int, default=250)
    parser.add_argument("--images_per_caption", type=int, default=3)
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="of the generator")
    parser.add_argument("--num_inference_steps", type=int, default=7, help="of the generator")
    parser.add_argument("--recipe", default="robust")
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    return parser.parse_args(argv)


def generate(args: argparse.Namespace, seed: int):
    """Pairs of a seed, the images of a caption in consecutive rows."""
    from datasets import concatenate_datasets

    from gmail_hf.digits import generate_pairs, load_digits

    scenes = load_digits("train", args.num_captions * args.images_per_caption, seed=seed)
    scenes = scenes.select(range(args.num_captions))
    sampling = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    parts = [
        generate_pairs(scenes, seed=1000 * seed + number, **sampling) for number in range(args.images_per_caption)
    ]
    order = np.arange(len(scenes) * len(parts)).reshape(len(parts), -1).T.ravel()
    return concatenate_datasets(parts).select(order)


def plant(pairs, seed: int) -> tuple[Any, list[str | None], dict[int, int]]:
    """The pairs with spoiled images in some rows, what was done to each row, or None, and the originals of copies."""
    from datasets import Dataset, Features, Image, concatenate_datasets
    from PIL import Image as PILImage

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pairs))
    counts = [round(share * len(pairs)) for share in PLANTED.values()]
    kinds: list[str | None] = [None] * len(pairs)
    for kind, rows in zip(PLANTED, np.split(order, np.cumsum(counts)), strict=False):
        for row in rows:
            kinds[row] = kind
    captions, images = pairs["caption"][:], pairs["generated_image"][:]
    by_caption: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        by_caption.setdefault(caption, []).append(row)
    changed, originals = list(images), {}
    for row, kind in enumerate(kinds):
        pixels = np.asarray(images[row])
        if kind == "wrong caption":
            others = [other for other in rng.integers(len(pairs), size=50) if captions[other] != captions[row]]
            pixels = np.asarray(images[others[0]])
        elif kind == "copy":
            twins = [other for other in by_caption[captions[row]] if other != row and kinds[other] is None]
            if not twins:
                kinds[row] = None
                continue
            originals[row] = twins[0]
            noise = rng.integers(-2, 3, pixels.shape)
            pixels = np.clip(np.asarray(images[twins[0]]).astype(int) + noise, 0, 255).astype(np.uint8)
        elif kind == "black":
            pixels = np.zeros_like(pixels)
        changed[row] = PILImage.fromarray(pixels)
    spoiled = Dataset.from_dict({"generated_image": changed}, features=Features(generated_image=Image()))
    return concatenate_datasets([pairs.remove_columns("generated_image"), spoiled], axis=1), kinds, originals


def run_seed(args: argparse.Namespace, seed: int, folder: str) -> tuple[list[dict], dict]:
    """The table of one seed, and what curation found of what was planted."""
    import torch
    from transformers import AutoProcessor

    from gmail_hf import GmailCLIPModel, embed_images
    from gmail_hf.digits import clip_path, load_digits
    from gmail_hf.generation import curate
    from gmail_hf.metrics import logistic_probe, nearest_centroid

    processor = AutoProcessor.from_pretrained(clip_path())
    base = GmailCLIPModel.from_clip(clip_path(), dtype=torch.float32).eval()
    test = load_digits(args.split, seed=seed)
    pairs = generate(args, seed)
    spoiled, kinds, originals = plant(pairs, seed)

    def kept(rows, **options) -> tuple[np.ndarray, list]:
        mask = curate(base, processor, rows, seed=seed, **options)[1]
        return np.flatnonzero(mask["kept"].to_numpy(zero_copy_only=False)), mask["reason"].to_pylist()

    planted_rows, reasons = kept(spoiled)
    sets = {
        "first of each caption": (pairs, np.arange(0, len(pairs), args.images_per_caption)),
        "best of each caption": (pairs, kept(pairs, best_k=1)[0]),
        "all": (pairs, np.arange(len(pairs))),
        "all, curated": (pairs, kept(pairs)[0]),
        "all + planted": (spoiled, np.arange(len(pairs))),
        "all + planted, curated": (spoiled, planted_rows),
    }
    real_test = embed_images(base, processor, test["real_image"])

    def score(embeds, rows) -> dict[str, float]:
        labels, truth = np.array(rows["digits"]), np.array(test["digits"])
        return {
            name: float(np.mean([readout(embeds, labels[:, i], real_test, truth[:, i]) for i in range(len(TASKS))]))
            for name, readout in zip(READOUTS, (logistic_probe, nearest_centroid), strict=True)
        }

    table = []
    for name, (source, chosen) in sets.items():
        print(f"seed {seed}: {name}, {len(chosen)} images", flush=True)
        rows = source.select(chosen)
        model = align(args, rows, processor, seed, folder)
        row = {"row": name, "images": len(chosen)}
        for when, by, modality in (("before", base, "real"), ("after", model, "gen")):
            embeds = embed_images(by, processor, rows["generated_image"], modality)
            row |= {f"{readout}_{when}": value for readout, value in score(embeds, rows).items()}
        table.append(row)
    scenes = load_digits("train", len(pairs), seed=seed)
    upper = score(embed_images(base, processor, scenes["real_image"]), scenes)
    table.append({"row": "real images", "images": len(scenes)})
    table[-1] |= {f"{readout}_{when}": upper[readout] for when in ("before", "after") for readout in READOUTS}
    outcomes: dict[str, list[set]] = {kind: [] for kind in (*PLANTED, "nothing")}
    for row, kind in enumerate(kinds):
        if row not in originals.values():  # of a copy and its original, the one with the higher score is kept
            outcomes[kind or "nothing"].append({reasons[row], reasons[originals.get(row, row)]} - {None})
    found = {
        kind: {
            "rows": len(rows),
            "left out": sum(map(bool, rows)),
            "for this reason": sum(FOUND_AS.get(kind) in row for row in rows),
        }
        for kind, rows in outcomes.items()
    }
    return table, found


def align(args: argparse.Namespace, pairs, processor, seed: int, folder: str):
    """The bundled CLIP, aligned on these pairs."""
    import torch
    from transformers import set_seed

    from gmail_hf import GmailCLIPModel, GmailTrainer, GmailTrainingArguments
    from gmail_hf.digits import clip_path

    set_seed(seed)
    model = GmailCLIPModel.from_clip(clip_path(), dtype=torch.float32, lora_rank=4)
    arguments = GmailTrainingArguments(
        output_dir=folder,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        recipe=args.recipe,
        logging_steps=args.max_steps,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = GmailTrainer(
        model=model, args=arguments, train_dataset=pairs, processing_class=processor.image_processor
    )
    trainer.train()
    return model.eval()


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start = time.perf_counter()
    tables: dict[int, list[dict]] = {}
    found: dict[int, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            tables[seed], found[seed] = run_seed(args, seed, folder)
            result = write(args, tables, found, round(time.perf_counter() - start))
    return result


def write(args: argparse.Namespace, tables: dict[int, list[dict]], found: dict[int, dict], seconds: int) -> dict:
    """Write the results of the seeds so far."""
    from gmail_hf.evaluation import environment
    from gmail_hf.metrics import aggregate

    for table in tables.values():
        for row in table:
            for name in [name for name in row if name.partition("_")[0] in READOUTS and not name.endswith("_gap")]:
                row[f"{name}_gap"] = table[-1][name] - row[name]
    mean, spread = aggregate(list(tables.values()))
    settings = {key: value for key, value in vars(args).items() if key != "output_dir"} | {"seeds": list(tables)}
    result = {
        "environment": environment(Path(__file__).parent),
        "settings": settings,
        "seconds": seconds,
        "mean": mean,
        "standard_deviation": spread,
        "planted": found,
        "seeds": tables,
    }
    return save(args, result, report(result))


def report(result: dict) -> str:
    from gmail_hf.evaluation import provenance

    settings = result["settings"]
    columns = [f"{readout}_{when}" for readout in READOUTS for when in ("before", "after")]
    titles = [f"{name.replace('_', ', ')} | gap" for name in columns]
    table = [f"| trained on | images | {' | '.join(titles)} |", "|---|---:|" + "---:|" * 2 * len(columns)]
    for row, spread in zip(result["mean"], result["standard_deviation"], strict=True):
        cells = [f"{row['images']:.0f} ± {spread['images']:.0f}"]
        cells += [f"{row[name]:.3f} ± {spread[name]:.3f}" for column in columns for name in (column, f"{column}_gap")]
        table.append(f"| {row['row']} | {' | '.join(cells)} |")
    planted = ["| planted | rows | left out | for this reason |", "|---|---:|---:|---:|"]
    for kind in (*PLANTED, "nothing"):
        counts = [seed[kind] for seed in result["planted"].values()]
        sums = [str(sum(count[name] for count in counts)) for name in counts[0]]
        planted.append(f"| {kind} | {' | '.join(sums[:2] + (sums[2:] if kind in PLANTED else ['–']))} |")
    options = [f"{key} {value}" for key, value in settings.items() if key not in ("name", "seeds")]
    return "\n".join(
        [
            f"# {settings['name']}: curated or not, before alignment and after",
            "",
            f"Mean ± standard deviation over the seeds {', '.join(map(str, settings['seeds']))}. Readouts are trained "
            "on the generated images of each set with the labels of their captions, and tested on f_r(real test "
            "images); before: by f_r, after: by f_g, aligned on the same set. The gap is to a readout trained on as "
            "many real images as `all` has. Planted images were spoiled on purpose. CLIPScore and copies come from "
            "the CLIP that is aligned.",
            "",
            *table,
            "",
            "What curation left out of the planted set, all seeds together (of a copy and its original, one):",
            "",
            *planted,
            "",
            f"- settings: {', '.join(options)}",
            *provenance(result),
            "",
        ]
    )


if __name__ == "__main__":
    main()
