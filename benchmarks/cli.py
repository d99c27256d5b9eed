"""The import of gmail_hf, `gmail-hf embed` compared with a bare loop, and `gmail-hf diagnose` without embedding."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import subjects
from measuring import Settings, row, take_turns, timed

PEERS = "import torch, transformers"
SIDE, DIM, CLASSES = 32, 512, 10  # pixels per edge, dimension of embeddings and classes of the images to diagnose


def imports(settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds of an import in a new process."""
    sides = {"with": lambda: python(f"{PEERS}, gmail_hf"), "without": lambda: python(PEERS)}
    seconds = take_turns(sides, settings.choose(1, 7, 7))
    yield row("import", f"{PEERS}, gmail_hf", PEERS, "s", seconds["with"], seconds["without"], "<= 1.05")


def python(code: str) -> float:
    """Seconds of the statements in a new interpreter, without its start."""
    timer = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", timer], capture_output=True, text=True, check=True).stdout)


def embed(settings: Settings) -> Iterator[dict[str, Any]]:
    """Images per second from a folder of JPEGs to a file of embeddings, including loading the model."""
    import datasets
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    from gmail_hf import GmailCLIPModel
    from gmail_hf.commands import embed as command

    size = settings.size or settings.choose("narrow", "vit-b-32", "vit-b-32")
    count, batch = settings.choose(8, 192, 2048), settings.choose(4, 64, 256)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        images.mkdir()
        for number, pair in enumerate(subjects.jpeg_pairs(count).to_list()):
            (images / f"{number:05}.jpg").write_bytes(pair["real_image"]["bytes"])
        subjects.gmail(size, settings).save_pretrained(folder / "model")
        subjects.image_processor().save_pretrained(folder / "model")

        def bare() -> None:
            model = GmailCLIPModel.from_pretrained(folder / "model").to(settings.device).eval()
            processor = AutoImageProcessor.from_pretrained(folder / "model")
            paths, embeds = sorted(images.glob("*.jpg")), []
            with torch.inference_mode():
                for start in range(0, count, batch):
                    opened = [Image.open(path).convert("RGB") for path in paths[start : start + batch]]
                    inputs = processor(images=opened, return_tensors="pt").to(settings.device)
                    features = model.get_image_features(**inputs, modality="real").pooler_output
                    embeds.append(torch.nn.functional.normalize(features, dim=-1).cpu().numpy())
            np.save(folder / "embeds.npy", np.concatenate(embeds))

        def ours() -> None:
            output = folder / "embeds.parquet"
            output.unlink(missing_ok=True)
            shutil.rmtree(folder / "cache", ignore_errors=True)
            words = {"model": folder / "model", "images": images, "output_file": output, "batch_size": batch}
            words |= {"device": settings.device}
            with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", folder / "cache"):
                command.main([word for key, value in words.items() for word in (f"--{key}", str(value))])

        sides = {"ours": ours, "bare": bare}
        for call in sides.values():
            call()
        turns = {side: lambda call=call: count / timed(call, settings) for side, call in sides.items()}
        speeds = take_turns(turns, settings.choose(1, 5, 5))
    note = f"{size}, {count} images in batches of {batch}"
    yield row("embed", "gmail-hf embed", "a bare loop", "images/s", speeds["ours"], speeds["bare"], ">= 0.97", note)


def diagnose(settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds of a diagnosis whose embeddings are cached already, against a minute."""
    from transformers import CLIPImageProcessor

    from gmail_hf import GmailCLIPModel, GmailConfig
    from gmail_hf.evaluation import diagnose as measure

    count = settings.choose(200, 10_000, 10_000)
    config = subjects.clip_config("narrow").to_dict()
    config["vision_config"] |= {"image_size": SIDE, "patch_size": SIDE // 4}
    model = GmailCLIPModel(GmailConfig(**config | {"projection_dim": DIM})).to(settings.device).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pairs = patterns(count)

    def run() -> None:
        measure(model, processor, pairs, label_column="label", max_samples=count)

    run()  # embeds
    seconds = [timed(run, settings) for _ in range(settings.choose(1, 3, 3))]
    note = f"{count:,} pairs, {DIM} numbers per embedding, {CLASSES} classes"
    yield row(
        "diagnose", "a diagnosis beyond its embeddings", "a minute", "s", seconds, [60.0] * len(seconds), "<= 1", note
    )


def patterns(count: int) -> Any:
    """Pairs of small pictures, one pattern per class; generated ones have less noise and another brightness."""
    import numpy as np
    from datasets import Dataset, Features, Image, Value

    rng = np.random.default_rng(0)
    labels, classes = rng.integers(0, CLASSES, count), rng.integers(60, 196, (CLASSES, SIDE, SIDE, 3))

    def pictures(noise: float, brightness: int) -> list[np.ndarray]:
        noisy = classes[labels] + rng.normal(brightness, noise, (count, SIDE, SIDE, 3))
        return list(noisy.clip(0, 255).astype(np.uint8))

    features = {"real_image": Image(), "generated_image": Image(), "caption": Value("string")}
    rows = {"real_image": pictures(60, 0), "generated_image": pictures(40, 20)}
    rows |= {"caption": [f"number {number}" for number in range(count)], "image_id": range(count), "label": labels}
    features |= {"image_id": Value("int64"), "label": Value("int64")}
    return Dataset.from_dict(rows, features=Features(features))
