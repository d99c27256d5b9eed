"""
Retrieval and zero-shot classification compared with clip_benchmark on equal embeddings; retrieval by number of
captions.

clip_benchmark is LAION's evaluation of CLIP models. Its own functions run with a model that looks up the embeddings,
at the default batch size of 64. It needs torchvision and open_clip. Install it in a separate environment, and pass the
interpreter with `run.py --peer_python`. Each run is a separate process, and the sides take turns. Seconds and memory
(memory only on Linux) are those of the call, after imports and loading.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import MissingPeer, Settings, alone, forget_peak, growth, missing, peak_mb, row

DIM, CLASSES, PROMPTS, IMAGES_OF_CLASSES = 512, 1000, 7, 50_000


def retrieval(settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds and memory of Recall@K and, without an aim, of top-1 accuracy, with the difference of the scores."""
    settings = replace(settings, device="cpu")  # the computation is in numpy
    num_images, rounds = settings.choose(500, 5000, 5000), settings.choose(1, 3, 3)
    tasks = {
        "retrieval": f"Recall@K, {num_images:,} images x {5 * num_images:,} captions",
        "zero_shot": f"top-1, {IMAGES_OF_CLASSES:,} images x {CLASSES:,} classes of {PROMPTS} prompts",
    }
    with tempfile.TemporaryDirectory() as folder:
        write_embeddings(Path(folder), num_images)
        for task, measured in tasks.items():
            try:
                runs = [
                    (
                        alone(f"evaluation:{task}_ours", settings, folder=folder),
                        alone(f"evaluation:{task}_peer", settings, settings.peer_python, folder=folder),
                    )
                    for _ in range(rounds)
                ]
            except MissingPeer as reason:
                yield missing("retrieval", measured, "clip_benchmark", str(reason))
                continue
            apart = max(abs(their["scores"][k] - our["scores"][k]) for our, their in runs for k in their["scores"])
            note = f"scores differ by {apart:.1e} at most"
            aims = (
                {"seconds": ">= 2", "peak_mb": "<= 0.1"}
                if task == "retrieval"
                else dict.fromkeys(("seconds", "peak_mb"))
            )
            ours, theirs = ([1 / run["seconds"] for run in side] for side in zip(*runs, strict=True))
            yield row("retrieval", f"{measured}, speed", "clip_benchmark", "1/s", ours, theirs, aims["seconds"], note)
            ours, theirs = ([run["peak_mb"] for run in side] for side in zip(*runs, strict=True))
            yield row("retrieval", f"{measured}, memory", "clip_benchmark", "MB", ours, theirs, aims["peak_mb"], note)


def captions(settings: Settings) -> Iterator[dict[str, Any]]:
    """Recall@K of 1,000 images by number of captions."""
    settings = replace(settings, device="cpu")
    counts = settings.choose((10_000, 30_000), (100_000, 300_000, 1_000_000), (100_000, 300_000, 1_000_000))
    runs = {count: alone("evaluation:recall_of", settings, num_captions=count) for count in counts}
    for name, unit in {"seconds": "s", "peak_mb": "MB"}.items():
        points = {count: run[name] for count, run in runs.items()}
        yield growth("scale", f"{name} of Recall@K by captions", points, unit, "1,000 images")


def write_embeddings(folder: Path, num_images: int) -> None:
    """Write noisy copies of random directions, so that the scores are well between 0 and 1."""
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    images, owner = normal(num_images, DIM), np.repeat(np.arange(num_images), 5)
    texts = 0.16 * images[owner] + normal(len(owner), DIM)
    prompts, labels = normal(CLASSES, PROMPTS, DIM), rng.integers(0, CLASSES, IMAGES_OF_CLASSES)
    classified = 0.25 * prompts.mean(axis=1)[labels] + normal(IMAGES_OF_CLASSES, DIM)
    arrays = {"images": images, "texts": texts, "owner": owner, "prompts": prompts, "labels": labels}
    for name, array in (arrays | {"classified": classified}).items():
        np.save(folder / f"{name}.npy", array)


def timed(call: Callable[[], dict[str, float]], settings: Settings) -> dict[str, Any]:
    """Scores and seconds of a call, and the growth of the process at its peak in MB."""
    forget_peak(settings)
    before, start = peak_mb(settings), time.perf_counter()
    scores = call()
    return {"scores": scores, "seconds": time.perf_counter() - start, "peak_mb": peak_mb(settings) - before}


def arrays(folder: str, *names: str) -> list:
    import numpy as np

    return [np.load(Path(folder) / f"{name}.npy") for name in names]


def retrieval_ours(settings: Settings, folder: str) -> dict:
    import numpy as np

    from gmail_hf.metrics import image_text_retrieval

    images, texts, owner = arrays(folder, "images", "texts", "owner")
    return timed(lambda: image_text_retrieval(images, texts, np.arange(len(images)), text_image_ids=owner), settings)


def zero_shot_ours(settings: Settings, folder: str) -> dict:
    from gmail_hf.metrics import class_embeddings, zero_shot_accuracy

    classified, prompts, labels = arrays(folder, "classified", "prompts", "labels")
    return timed(lambda: zero_shot_accuracy(classified, class_embeddings(prompts), labels), settings)


def recall_of(settings: Settings, num_captions: int) -> dict:
    import numpy as np

    from gmail_hf.metrics import image_text_retrieval

    rng = np.random.default_rng(0)
    images = rng.standard_normal((1000, DIM), dtype=np.float32)
    texts = rng.standard_normal((num_captions, DIM), dtype=np.float32)
    owner = np.arange(len(texts)) % len(images)
    return timed(lambda: image_text_retrieval(images, texts, np.arange(len(images)), text_image_ids=owner), settings)


def lookup(images, texts):
    """A model whose encoders return image rows unchanged and look up texts by number, and its tokenizer."""
    import torch

    class Lookup(torch.nn.Module):
        def encode_image(self, rows):
            return rows

        def encode_text(self, numbers):
            return texts[numbers]

    return Lookup(), lambda numbers: torch.tensor([int(number) for number in numbers])


def clip_benchmark(name: str) -> Any:
    """Import a module of clip_benchmark's metrics."""
    import numpy

    remedy = (
        '`python -m venv peer && peer/bin/pip install clip_benchmark "numpy<2.4"` and `--peer_python peer/bin/python`'
    )
    try:
        module = importlib.import_module(f"clip_benchmark.metrics.{name}")
    except ImportError as error:
        raise MissingPeer(f"{error}: {remedy}") from error
    if name == "zeroshot_classification" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        raise MissingPeer(f"clip_benchmark 1.6.2 fails with numpy {numpy.__version__}: {remedy}")
    return module


def retrieval_peer(settings: Settings, folder: str) -> dict:
    import torch

    zeroshot_retrieval = clip_benchmark("zeroshot_retrieval")
    images, texts = map(torch.from_numpy, arrays(folder, "images", "texts"))
    model, tokenizer = lookup(images, texts)
    batches = [
        (rows, [range(5 * i, 5 * i + 5) for i in range(64 * number, 64 * number + len(rows))])
        for number, rows in enumerate(images.split(64))
    ]
    ks = [1, 5, 10]
    run = timed(
        lambda: zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=ks), settings
    )
    names = {"text_retrieval_recall": "image_to_text_R", "image_retrieval_recall": "text_to_image_R"}
    run["scores"] = {f"{ours}@{k}": run["scores"][f"{theirs}@{k}"] for theirs, ours in names.items() for k in ks}
    return run


def zero_shot_peer(settings: Settings, folder: str) -> dict:
    import torch

    zeroshot_classification = clip_benchmark("zeroshot_classification")
    classified, prompts, labels = map(torch.from_numpy, arrays(folder, "classified", "prompts", "labels"))
    model, tokenizer = lookup(classified, prompts.flatten(0, 1))
    names = [str(number) for number in range(CLASSES)]
    # A prompt is a number in base PROMPTS: its last digit is the prompt, the others are the class.
    templates = {name: [PROMPTS * int(name) + i for i in range(PROMPTS)] for name in names}

    class Batches(list):
        dataset = argparse.Namespace(classes=names)

    batches = Batches(zip(classified.split(64), labels.split(64), strict=True))
    run = timed(
        lambda: zeroshot_classification.evaluate(model, batches, tokenizer, names, templates, "cpu", amp=False),
        settings,
    )
    run["scores"] = {"top1": run["scores"]["acc1"], "mean_per_class": run["scores"]["mean_per_class_recall"]}
    return run
