"""Plans and runs benchmarks, saves their results and resumes an interrupted evaluation."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import replacing, write_file, write_jsonl
from ..metrics import missing_metrics
from ..metrics._checks import optional_import
from ..metrics.environment import environment
from ..metrics.scores import WRITTEN, results_in
from .alignment import MIN_PAIRS, evaluate_alignment
from .answering import chats
from .captioning import CLIP_SCORES, FAILED, evaluate_captioning, sees_through
from .load_model import LoadedModel
from .measure import Measured, Settings
from .probe import DEFAULT_PROBE, evaluate_probe, open_training
from .registry import ALIGNMENT, CAPTIONING, PROBE, RETRIEVAL, VQA, ZERO_SHOT, Benchmark
from .report import SMALL, THUMBNAIL
from .retrieval import evaluate_retrieval
from .sources import Source, tasks_of
from .vqa import evaluate_vqa
from .zero_shot import evaluate_zero_shot

EVALUATORS = {
    RETRIEVAL: evaluate_retrieval,
    ZERO_SHOT: evaluate_zero_shot,
    PROBE: evaluate_probe,
    CAPTIONING: evaluate_captioning,
    VQA: evaluate_vqa,
    ALIGNMENT: evaluate_alignment,
}
SELF_SCORED = "its vision tower is the one that the captioner sees through, which favours the captioner"


@dataclass(frozen=True)
class Plan:
    """A benchmark, its data, and its tasks in order, each with the model to measure."""

    benchmark: Benchmark
    source: Source
    tasks: dict[str, LoadedModel]


def plan(
    benchmark: Benchmark,
    source: Source,
    model: LoadedModel,
    captioner: LoadedModel | None,
    settings: Settings,
    train_dataset: str | None = None,
) -> Plan:
    """
    Choose the tasks that can be measured with these models, and check their requirements before any computation.

    Args:
        benchmark, source: see `get_benchmark` and `open_source`.
        model: a CLIP, a vision-only model, or an image-text-to-text model.
        captioner: an image-text-to-text model, used together with a CLIP.
        settings: see [`Settings`].
        train_dataset: data set with the training images of a probe, see [`open_training`].

    Raises:
        ValueError: no task can be measured; the model for a task has no branch `settings.modality` or no chat
            template; a probe has no training images; or the limit leaves too few pairs.
        ImportError: the packages of `gmail-hf[evaluation]` are missing.
    """
    writer = captioner or model
    tasks = {}
    for task in tasks_of(benchmark, source):
        chosen = writer if task in WRITTEN else model
        if chosen.embeds != (task in WRITTEN) and _suits(task, chosen, settings):
            tasks[task] = chosen
    if not tasks:
        kind = "an image-text-to-text model" if set(benchmark.tasks) <= set(WRITTEN) else "a CLIP"
        raise ValueError(f"{benchmark.name} needs {kind}, but '{model.name}' is not one.")
    for task, chosen in tasks.items():
        if task != ALIGNMENT:
            chosen.check_modality(settings.modality)
    if PROBE in tasks:
        tasks[PROBE].check_modality(settings.train_modality or settings.modality)
        source = open_training(benchmark, source, train_dataset)
    elif train_dataset is not None:
        raise ValueError(f"{benchmark.name} has training images, but no probe: add --probe logistic.")
    if VQA in tasks and not chats(writer.processor):
        raise ValueError(f"{benchmark.name} needs a model with a chat template, but '{writer.name}' has none.")
    for package in ("scipy", "sklearn", "matplotlib"):  # intervals, separability, the figure
        optional_import(package)
    if ALIGNMENT in tasks:
        if source.limit is not None and source.limit < MIN_PAIRS:
            raise ValueError(f"{benchmark.name} measures alignment, which needs a --limit of {MIN_PAIRS} or more.")
    return Plan(benchmark, source, tasks)


def _suits(task: str, model: LoadedModel, settings: Settings) -> bool:
    """Whether a model suits a task. A probe runs on request, and for models that do not embed text."""
    if task == PROBE:
        return settings.probe is not None or not model.reads_text
    return model.reads_text or task not in (RETRIEVAL, ZERO_SHOT)


def identity(planned: Plan, settings: Settings) -> dict[str, Any]:
    """Return what determines a result: models, data and settings. Batch size and device only affect rounding."""
    source = planned.source
    models = {
        "clip" if chosen.embeds else "image-text-to-text": _identity_of(chosen) for chosen in planned.tasks.values()
    }
    if CAPTIONING in planned.tasks and settings.clip_scorer is not None:
        models["CLIPScore"] = _identity_of(settings.clip_scorer)
        if sees_through(planned.tasks[CAPTIONING].model, settings.clip_scorer.model):
            models["CLIPScore"]["note"] = SELF_SCORED
    data = {"name": source.name, "revision": source.revision, "split": source.split, "limit": source.limit}
    if source.train is not None:
        data["train"] = {
            "name": source.train.name,
            "revision": source.train.revision,
            "split": source.train.split,
            "modality": settings.train_modality or settings.modality,
            "probe": settings.probe or DEFAULT_PROBE,
        }
    return {
        "models": models,
        "dataset": data,
        "settings": {
            "modality": settings.modality,
            "seed": settings.seed,
            "num_beams": settings.num_beams,
            "word_vectors": settings.word_vectors,
        },
    }


def _identity_of(model: LoadedModel) -> dict[str, Any]:
    dtype = str(model.model.dtype).removeprefix("torch.")
    return {"name": model.name, "revision": model.revision, "dtype": dtype}


def finished(planned: Plan, settings: Settings, output_dir: str | os.PathLike) -> dict[str, Any] | None:
    """
    Return the result of an earlier run with the same models, data and settings. Return None if there is none, or if it
    lacks a score that can be computed now.

    Raises:
        FileExistsError: the folder has a result with other models, data or settings, possibly of another benchmark. A
            report must not mix them. The message lists the differences.
    """
    known, wanted = None, identity(planned, settings)
    for result in results_in(output_dir):
        there, here = _flat({key: result[key] for key in wanted}), _flat(wanted)
        if result["benchmark"] == planned.benchmark.name:
            known, keys = result, {**there, **here}
        else:
            keys = [key for key in there if key in here and not key.startswith("dataset.")]
        changed = [f"{key}: {there.get(key)} -> {here.get(key)}" for key in keys if there.get(key) != here.get(key)]
        if changed:
            path = Path(output_dir, f"{result['benchmark']}.json")
            raise FileExistsError(
                f"'{path}' is the result of another run (there -> here: {'; '.join(changed)}). Choose another "
                "--output_dir, or delete that file."
            )
    if known is None:
        return None
    lacked = [
        name
        for task in known["tasks"].values()
        for name, why in task["missing"].items()
        if why != FAILED and name not in CLIP_SCORES  # whether they can be computed is part of the settings
    ]
    return known if set(lacked) == set(missing_metrics(lacked, settings.word_vectors)) else None


def run(planned: Plan, settings: Settings, output_dir: str | os.PathLike) -> dict[str, Any]:
    """
    Run one benchmark, write `NAME.json` and its pictures and predictions in the folder `NAME`, and return the content.

    The JSON is written last and atomically, so a benchmark with a JSON file is finished.
    """
    start, benchmark = time.perf_counter(), planned.benchmark
    tasks = dict.fromkeys(planned.tasks)
    # Alignment reads all images and may refuse them: better before captioning, which takes longest.
    for task in sorted(tasks, key=lambda name: name != ALIGNMENT):
        chosen = planned.tasks[task]
        measured = EVALUATORS[task](chosen.model, chosen.processor, planned.source, settings)
        tasks[task] = _kept(measured, task, benchmark, Path(output_dir))
    result = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "source": benchmark.source,
        "paper": benchmark.paper,
        **identity(planned, settings),
        "tasks": tasks,
        "batch_size": settings.batch_size,
        "device": str(next(iter(planned.tasks.values())).model.device),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(),
    }
    content = json.dumps(result, indent=2, ensure_ascii=False)
    write_file(Path(output_dir, f"{benchmark.name}.json"), f"{content}\n")
    return json.loads(content)


def _kept(measured: Measured, task: str, benchmark: Benchmark, output_dir: Path) -> dict[str, Any]:
    """Save the pictures and predictions of a measurement as files, and return its entry in the JSON."""
    folder = output_dir / benchmark.name
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        "scores": measured.scores,
        "intervals": measured.intervals,
        "counts": measured.counts,
        "missing": measured.missing,
        "examples": [],
        "figures": {},
        "predictions": None,
    }
    for number, example in enumerate(measured.examples):
        files = []
        for which, image in enumerate(example.images):
            image = image.copy()
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            file = f"{benchmark.name}/{task}-{number}-{which}.webp"
            with replacing(output_dir / file) as partial:
                image.save(partial, "WEBP", lossless=max(image.size) <= SMALL, quality=85)
            files.append(file)
        facts = {"text": example.text, "reference": example.reference, "right": example.right}
        kept["examples"].append({"images": files, **facts})
    for number, (title, picture) in enumerate(measured.figures.items()):
        write_file(folder / f"{task}-figure-{number}.png", picture)
        kept["figures"][title] = f"{benchmark.name}/{task}-figure-{number}.png"
    if measured.predictions:
        write_jsonl(folder / f"{task}.jsonl", measured.predictions)
        kept["predictions"] = f"{benchmark.name}/{task}.jsonl"
    return kept


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
