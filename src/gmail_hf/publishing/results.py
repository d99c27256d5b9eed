"""Scores in cards: the text, and the model-index that the Hub displays. Both come from result files."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..files import write_file
from ..metrics.scores import TASKS, WRITTEN, escaped, label, results_in, to_markdown
from .marker import signed, written_here
from .provenance import public_name

START, END = "<!-- scores of benchmarks -->", "<!-- end of scores -->"
NOT_RUN = "Not run yet."
# The Hub's names of tasks, where it has one.
TASK_TYPES = {
    "retrieval": "image-text-retrieval",
    "zero_shot": "zero-shot-image-classification",
    "probe": "image-classification",
    "captioning": "image-to-text",
    "vqa": "visual-question-answering",
    "alignment": "image-feature-extraction",
}
METRIC_TYPES = {"top1": "accuracy", "mean_per_class": "mean_class_accuracy"}
# Metrics that the Trainer computes on its evaluation pairs, by task.
TRAINER_TASKS = {
    "alignment": ("paired_cosine", "centroid_distance", "gen_to_real_R@"),
    "retrieval": ("image_to_text_", "text_to_image_"),
}


def add_results(card: str | os.PathLike, results: str | os.PathLike, model: str | None = None) -> ModelCard:
    """
    Write the scores of `gmail-hf evaluate` to a model card without changing the rest of the card.

    The text replaces earlier scores in the card, or is added at its end. In the metadata, entries with the same task,
    data set and metric are replaced. Scores of other models, such as the captioner that was scored with a CLIP, are
    left out.

    Args:
        card: a README.md, or its folder.
        results: output folder of the command.
        model: the card's model, by its name in the results. Defaults to the CLIP, or to the captioner if there is
            none.

    Returns:
        The saved card.

    Raises:
        FileNotFoundError: there is no card, or there are no results of the model.
    """
    path = card_file(card)
    measured = results_in(results)
    embeds = any("clip" in result["models"] for result in measured)
    for result in measured:
        result["tasks"] = {
            task: scores
            for task, scores in result["tasks"].items()
            if (_measured_model(result, task) == model if model else not (embeds and task in WRITTEN))
        }
    measured = [result for result in measured if result["tasks"]]
    if not measured:
        of = f" of '{model}'" if model else ""
        raise FileNotFoundError(f"'{results}' has no results{of} from gmail-hf evaluate: evaluate the model first.")
    with open(path, encoding="utf-8", newline="") as file:
        content = file.read()
    loaded = ModelCard(content)
    section = f"{START}\n{results_text(measured)}\n{END}"
    if START in loaded.text and END in loaded.text:
        loaded.text = re.sub(f"{START}.*?{END}", lambda _: section, loaded.text, count=1, flags=re.DOTALL)
    else:
        loaded.text = f"{loaded.text.rstrip()}\n\n## Results\n\n{section}\n"
    new = [entry for result in measured for entry in benchmark_results(result)]
    known = loaded.data.eval_results or []
    kept = [entry for entry in known if not any(entry.is_equal_except_value(other) for other in new)]
    loaded.data.model_name = loaded.data.model_name or path.absolute().parent.name
    loaded.data.eval_results = kept + new
    if written_here(content):
        loaded = ModelCard(signed(str(loaded)))
    write_file(path, str(loaded))
    return loaded


def _measured_model(result: dict[str, Any], task: str) -> str:
    """Return the name of the model that a task of a result measured."""
    return result["models"]["image-text-to-text" if task in WRITTEN else "clip"]["name"]


def card_file(card: str | os.PathLike) -> Path:
    """
    Return the file of a card, given the file or its folder.

    Raises:
        FileNotFoundError: there is no card.
    """
    path = Path(card, "README.md") if Path(card).is_dir() else Path(card)
    if not path.is_file():
        raise FileNotFoundError(f"No card found at '{path}'.")
    return path


def results_text(results: list[dict[str, Any]]) -> str:
    """Write a table of all scores with intervals, and the data, branch, machine and date of each benchmark."""
    lines = []
    for result in map(escaped, results):
        data, where = result["dataset"], result["environment"]
        revision = f", revision `{commit}`" if (commit := _commit(data["revision"])) else ""
        rows = f", {data['limit']} rows only" if data["limit"] else ""
        packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items() if number)
        lines.append(
            f"- {result['title']}: `{public_name(data['name'])}`{revision}, split `{data['split']}`{rows}; "
            f"photographs through `{result['settings']['modality']}`{_trained_on(data)}{_scored_by(result)}. "
            f"{where['date']}, {where['machine']}; {packages}."
        )
    bullets = "\n".join(lines)
    return f"{to_markdown(results)}\nMeasured by `gmail-hf evaluate`:\n\n{bullets}"


def _trained_on(data: dict[str, Any]) -> str:
    train = data.get("train")
    if train is None:
        return ""
    return (
        f"; probe (`{train['probe']}`) on `{public_name(train['name'])}`, split `{train['split']}`, through "
        f"`{train['modality']}`"
    )


def _scored_by(result: dict[str, Any]) -> str:
    clip = result["models"].get("CLIPScore")
    if clip is None:
        return ""
    return f"; CLIPScore by `{public_name(clip['name'])}`" + (f" ({clip['note']})" if "note" in clip else "")


def benchmark_results(result: dict[str, Any]) -> list[EvalResult]:
    """Convert the scores of one result file of `gmail-hf evaluate` to entries of the model-index."""
    data = result["dataset"]
    shared = {
        "dataset_type": public_name(data["name"]),
        "dataset_name": result["title"],
        "dataset_split": data["split"],
        "dataset_revision": _commit(data["revision"]),
        "dataset_args": {"limit": data["limit"]} if data["limit"] else None,
    }
    return [
        entry
        for task, measured in result["tasks"].items()
        for entry in _entries(task, measured["scores"], {**shared, "metric_args": _conditions(result, task)})
    ]


def _conditions(result: dict[str, Any], task: str) -> dict[str, Any] | None:
    """Return the settings of a task that differ from the defaults. Scores under other settings are other entries."""
    data, modality = result["dataset"], result["settings"]["modality"]
    found = {}
    if task != "alignment" and modality != "real":  # alignment measures both branches
        found["modality"] = modality
    if task == "probe" and data["train"]["name"] != data["name"]:
        found["train_dataset"] = public_name(data["train"]["name"])
    if task == "probe" and data["train"]["modality"] != modality:
        found["train_modality"] = data["train"]["modality"]
    if task == "probe" and data["train"]["probe"] != "logistic":
        found["probe"] = data["train"]["probe"]
    return found or None


def trainer_results(metrics: dict[str, Any], pairs: dict[str, Any]) -> list[EvalResult]:
    """
    Convert the Trainer's metrics of its evaluation pairs to entries of the model-index.

    Args:
        metrics: metrics by name, `eval_...`, see `read_metrics`.
        pairs: the data set in `provenance.json`.
    """
    shared = {
        "dataset_type": pairs["name"],
        "dataset_name": pairs["name"].split("/")[-1],
        "dataset_split": pairs["split"],
        "dataset_revision": pairs["revision"],
    }
    return [
        entry
        for task, names in TRAINER_TASKS.items()
        for entry in _entries(
            task,
            {
                name.removeprefix("eval_"): value
                for name, value in metrics.items()
                if name.startswith(tuple(f"eval_{known}" for known in names))
            },
            shared,
        )
    ]


def _entries(task: str, scores: dict[str, float | None], shared: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=TASK_TYPES[task],
            task_name=TASKS[task],
            metric_type=METRIC_TYPES.get(name, name),
            metric_name=label(name),
            metric_value=round(value, 4),
            **shared,
        )
        for name, value in scores.items()
        if value is not None and math.isfinite(value)
    ]


def _commit(revision: str | None) -> str | None:
    """Return a revision if it is a Hub commit. A fingerprint of local files has no meaning elsewhere."""
    return revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None


def read_metrics(folder: str | os.PathLike) -> dict[str, float]:
    """
    Read the metrics of a training by the Trainer's names.

    They are those that `Trainer.save_metrics` wrote, including `before_...`, unless a different run in the same folder
    wrote them, and those logged for the saved weights, which are from the last step or the best one.
    """
    metrics, state = read_json(folder, "all_results.json"), read_json(folder, "trainer_state.json")
    history, step = state.get("log_history", []), state.get("global_step", 0)
    end = max((i for i, entry in enumerate(history) if "train_runtime" in entry), default=len(history))
    summary = history[end] if end < len(history) else {}
    if step > 0 and metrics.get("train_runtime") != summary.get("train_runtime"):
        metrics = {}
    if summary and read_json(folder, "training_args.json").get("load_best_model_at_end"):
        step = state["best_global_step"] or step
    for i, entry in enumerate(history):
        if i >= end or entry["step"] == step:
            metrics |= {name: value for name, value in entry.items() if name.startswith(("train_", "eval_"))}
    # Sort numbers by value: R@5 before R@10.
    return dict(
        sorted(metrics.items(), key=lambda item: re.sub(r"\d+", lambda digits: f"{int(digits[0]):06d}", item[0]))
    )


def read_json(folder: str | os.PathLike, name: str) -> dict[str, Any]:
    path = Path(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
