"""
Retrieval and zero-shot classification beside clip_benchmark's, on equal embeddings: scores, seconds, peak memory.

    python benchmarks/evaluation.py --peer_python peer/bin/python --output benchmarks/results/evaluation.json

clip_benchmark is LAION's evaluation of CLIP models. It needs torchvision and open_clip, so it has an environment of
its own (`pip install clip_benchmark "numpy<2.4"`: version 1.6.2 fails with later ones) with the interpreter
`--peer_python`. Its own functions run, with a model that looks up the embeddings, at its default batch of 64. Each run
has a process to itself and the sides take turns. Seconds and memory (Linux) are of the call alone, with imports done
and embeddings loaded. Without `OMP_NUM_THREADS` one thread computes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIM, CLASSES, PROMPTS, IMAGES_OF_CLASSES = 512, 1000, 7, 50_000


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", help="The interpreter that has clip_benchmark; without it, ours alone.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_images", type=int, default=5000, help="Of five captions each.")
    parser.add_argument("--scaling", type=int, nargs="*", default=[100_000, 300_000, 1_000_000], help="Captions.")
    parser.add_argument("--output", type=Path, help="A JSON file for the results.")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    from gmail_hf.benchmarks import environment

    start = time.perf_counter()
    sides = {"ours": sys.executable} | ({"clip_benchmark": args.peer_python} if args.peer_python else {})
    result = {"dim": DIM, "threads": os.environ.get("OMP_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        write_embeddings(Path(folder), args.num_images)
        for task in ("retrieval", "zero_shot"):
            runs = {side: [] for side in sides}
            for _ in range(args.repeats):
                for side, python in sides.items():
                    runs[side].append(measure(python, f"{task}_{side}", folder))
            result[task] = summary(runs)
            print(f"{task}: {sizes(task, args.num_images)}", *lines(result[task]), sep="\n  ")
    result["scaling"] = {}
    for captions in args.scaling:
        run = measure(sys.executable, "scaling", str(captions))
        result["scaling"][captions] = run
        print(f"1,000 images x {captions:,} captions: {run['seconds']:.1f} s, {run['peak_mb']:.0f} MB")
    result |= {"seconds": round(time.perf_counter() - start), "environment": environment(Path(__file__).parent)}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def sizes(task: str, num_images: int) -> str:
    if task == "retrieval":
        return f"{num_images:,} images x {5 * num_images:,} captions"
    return f"{IMAGES_OF_CLASSES:,} images x {CLASSES:,} classes of {PROMPTS} prompts"


def write_embeddings(folder: Path, num_images: int) -> None:
    """Noisy copies of random directions, so that the scores lie well inside 0 and 1."""
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


def summary(runs: dict[str, list[dict]]) -> dict:
    """Medians of each side, their ratios, and how far the scores are apart."""
    sides = {
        side: {
            "scores": repeats[0]["scores"],
            **{key: statistics.median(run[key] for run in repeats) for key in ("seconds", "cpu_seconds", "peak_mb")},
            "repeats": [{key: run[key] for key in run if key != "scores"} for run in repeats],
        }
        for side, repeats in runs.items()
    }
    if len(sides) == 1:
        return sides
    ours, peer = sides["ours"], sides["clip_benchmark"]
    for key in ("seconds", "cpu_seconds", "peak_mb"):
        sides[f"ratio_{key}"] = peer[key] / ours[key]
    sides["largest_difference"] = max(abs(peer["scores"][key] - ours["scores"][key]) for key in peer["scores"])
    return sides


def lines(task: dict) -> list[str]:
    text = [
        f"{side}: {task[side]['seconds']:.2f} s ({task[side]['cpu_seconds']:.2f} s of CPU), "
        f"{task[side]['peak_mb']:.0f} MB, "
        + ", ".join(f"{name} {value:.5f}" for name, value in task[side]["scores"].items())
        for side in ("ours", "clip_benchmark")
        if side in task
    ]
    if "ratio_seconds" in task:
        text.append(
            f"clip_benchmark / ours: {task['ratio_seconds']:.1f} times the seconds, "
            f"{task['ratio_peak_mb']:.1f} times the memory; scores differ by {task['largest_difference']:.1e} at most"
        )
    return text


def measure(python: str, job: str, argument: str) -> dict:
    """Run one of `JOBS` in a process of its own."""
    done = subprocess.run([python, __file__, "--job", job, argument], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def timed(call) -> dict:
    """Scores, wall and CPU seconds of a call, and the MB that the process grew by at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at what is held now
    before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    scores = call()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "scores": scores,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": (memory("VmHWM") - before) / 1024,
    }


def memory(key: str) -> int:
    """kB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def load(folder: str, *names: str) -> list:
    import numpy as np

    return [np.load(Path(folder) / f"{name}.npy") for name in names]


def retrieval_ours(folder: str) -> dict:
    import numpy as np

    from gmail_hf.evaluation import image_text_retrieval

    images, texts, owner = load(folder, "images", "texts", "owner")
    return timed(lambda: image_text_retrieval(images, texts, np.arange(len(images)), text_image_ids=owner))


def zero_shot_ours(folder: str) -> dict:
    from gmail_hf.evaluation import class_embeddings, zero_shot_accuracy

    classified, prompts, labels = load(folder, "classified", "prompts", "labels")
    return timed(lambda: zero_shot_accuracy(classified, class_embeddings(prompts), labels))


def scaling(num_captions: str) -> dict:
    import numpy as np

    from gmail_hf.evaluation import image_text_retrieval

    rng = np.random.default_rng(0)
    images = rng.standard_normal((1000, DIM), dtype=np.float32)
    texts = rng.standard_normal((int(num_captions), DIM), dtype=np.float32)
    owner = np.arange(len(texts)) % len(images)
    return timed(lambda: image_text_retrieval(images, texts, np.arange(len(images)), text_image_ids=owner))


def lookup(images, texts):
    """A model that "encodes" rows of images as they are, and numbers of texts by looking them up."""
    import torch

    class Lookup(torch.nn.Module):
        def encode_image(self, rows):
            return rows

        def encode_text(self, numbers):
            return texts[numbers]

    return Lookup(), lambda numbers: torch.tensor([int(number) for number in numbers])


def retrieval_clip_benchmark(folder: str) -> dict:
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    images, texts = map(torch.from_numpy, load(folder, "images", "texts"))
    model, tokenizer = lookup(images, texts)
    batches = [
        (rows, [range(5 * i, 5 * i + 5) for i in range(64 * number, 64 * number + len(rows))])
        for number, rows in enumerate(images.split(64))
    ]
    ks = [1, 5, 10]
    run = timed(lambda: zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=ks))
    names = {"text_retrieval_recall": "image_to_text_R", "image_retrieval_recall": "text_to_image_R"}
    run["scores"] = {f"{ours}@{k}": run["scores"][f"{theirs}@{k}"] for theirs, ours in names.items() for k in ks}
    return run


def zero_shot_clip_benchmark(folder: str) -> dict:
    import torch
    from clip_benchmark.metrics import zeroshot_classification

    classified, prompts, labels = map(torch.from_numpy, load(folder, "classified", "prompts", "labels"))
    model, tokenizer = lookup(classified, prompts.flatten(0, 1))
    names = [str(number) for number in range(CLASSES)]
    # A prompt is its number: the class in full, the prompt as the last digit of base PROMPTS.
    templates = {name: [PROMPTS * int(name) + i for i in range(PROMPTS)] for name in names}

    class Batches(list):
        dataset = argparse.Namespace(classes=names)

    batches = Batches(zip(classified.split(64), labels.split(64), strict=True))
    run = timed(
        lambda: zeroshot_classification.evaluate(model, batches, tokenizer, names, templates, "cpu", amp=False)
    )
    run["scores"] = {"top1": run["scores"]["acc1"], "mean_per_class": run["scores"]["mean_per_class_recall"]}
    return run


JOBS = {
    "retrieval_ours": retrieval_ours,
    "retrieval_clip_benchmark": retrieval_clip_benchmark,
    "zero_shot_ours": zero_shot_ours,
    "zero_shot_clip_benchmark": zero_shot_clip_benchmark,
    "scaling": scaling,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(JOBS[sys.argv[2]](sys.argv[3])))
    else:
        main()
