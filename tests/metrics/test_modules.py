"""The modules of the evaluate library: the functions' own numbers, in one call, in batches and combined."""

import doctest

import evaluate
import numpy as np
import pytest

from gmail_hf import metrics
from gmail_hf.metrics import metric_path, missing_metrics
from gmail_hf.metrics.answers import multiple_choice_accuracy
from gmail_hf.metrics.modules import METRICS


@pytest.fixture(autouse=True)
def load(tmp_path_factory, monkeypatch):
    """evaluate copies a module before it loads it, and keeps inputs in files: all in one temporary folder here."""
    folder = tmp_path_factory.getbasetemp() / "evaluate"
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", folder / "metrics")
    monkeypatch.setattr("evaluate.loading.init_dynamic_modules", lambda: dynamic_modules(folder))
    return lambda name: evaluate.load(metric_path(name))


def dynamic_modules(folder, init=evaluate.loading.init_dynamic_modules):
    return init(hf_modules_cache=folder / "modules")


@pytest.fixture(scope="module")
def embeds():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(30, 16)).astype(np.float32)
    return (real + 2 * rng.normal(size=real.shape)).astype(np.float32), real


def in_batches(metric, inputs, **arguments):
    size = len(next(iter(inputs.values())))
    for start in range(0, size, 7):
        metric.add_batch(**{name: values[start : start + 7] for name, values in inputs.items()})
    return metric.compute(**arguments)


def cases(embeds):
    """By name: inputs, arguments of compute, and what the function gives."""
    first, second = embeds
    images, classes = np.repeat(np.arange(10), 3), second[:5]
    labels = np.arange(30) % 5
    choices = [0, None, 2, 3, 1, 1, 0, 2, 3, 0]
    return {
        "paired_cosine": ({}, {"paired_cosine": metrics.paired_cosine(first, second)}),
        "separability": ({"seed": 3, "folds": 4}, {"separability": metrics.separability(first, second, 3, 4)}),
        "clip_score": ({}, {"clip_score": float(metrics.clip_score(second, first).mean())}),
        "recall_at_k": (
            {"ks": [1, 3], "inputs": {"image_ids": images}},
            metrics.image_text_retrieval(first, second, images, ks=[1, 3]),
        ),
        "zero_shot_accuracy": (
            {"classes": classes, "inputs": {"references": labels}},
            metrics.zero_shot_accuracy(first, classes, labels),
        ),
        "multiple_choice_accuracy": (
            {"inputs": {"predictions": choices, "references": labels[:10]}},
            multiple_choice_accuracy(choices, labels[:10].tolist()),
        ),
        "yes_no_scores": (
            {"inputs": {"predictions": labels % 2, "references": labels // 3}},
            metrics.yes_no_scores(labels % 2, labels // 3),
        ),
    }


@pytest.mark.parametrize("name", [name for name in METRICS if name != "caption_scores"])
def test_one_call_and_batches_give_the_functions_numbers(load, embeds, name):
    arguments, expected = cases(embeds)[name]
    inputs = {"predictions": embeds[0], "references": embeds[1]} | arguments.pop("inputs", {})
    assert load(name).compute(**inputs, **arguments) == expected
    assert in_batches(load(name), inputs, **arguments) == expected
    assert len(set(expected.values())) > 1 or next(iter(expected.values())) not in (0, 1)  # not a score at its bound


def test_caption_scores(load):
    captions, references = ["a red three", "a blue two"], [["a red three", "three"], ["a two in green"]]
    if missing_metrics(["ROUGE-L"]):
        assert load("caption_scores").compute(predictions=captions, references=references, metrics=["ROUGE-L"]) == {
            "ROUGE-L": None
        }
        return
    expected = metrics.caption_metrics(captions, references, ["ROUGE-L", "CIDEr"])
    inputs = {"predictions": captions, "references": references}
    assert load("caption_scores").compute(**inputs, metrics=["ROUGE-L", "CIDEr"]) == expected
    metric = load("caption_scores")
    for caption, truths in zip(captions, references, strict=True):
        metric.add(prediction=caption, reference=truths)
    assert metric.compute(metrics=["ROUGE-L", "CIDEr"]) == expected


def test_combined(load, embeds):
    names = ["paired_cosine", "separability", "recall_at_k"]
    first, second = embeds
    apart = [metrics.paired_cosine(first, second), metrics.separability(first, second)]
    expected = dict(zip(names, apart, strict=False)) | metrics.image_text_retrieval(first, second, np.arange(30))
    combined = evaluate.combine([metric_path(name) for name in names])
    for start in range(0, 30, 11):
        rows = slice(start, start + 11)
        combined.add_batch(predictions=first[rows], references=second[rows], image_ids=np.arange(30)[rows])
    assert combined.compute() == expected
    shared = evaluate.combine([load(name) for name in names[:2]])
    assert shared.compute(predictions=first, references=second) == dict(zip(names, apart, strict=False))


def test_ids_may_be_strings(load, embeds):
    names = np.array([f"image {i // 3}" for i in range(30)])
    scores = load("recall_at_k").compute(predictions=embeds[0], references=embeds[1], image_ids=names)
    assert scores == metrics.image_text_retrieval(*embeds, names)


@pytest.mark.parametrize("name", METRICS)
def test_each_says_what_it_is_and_its_example_runs(load, name):
    metric = load(name)
    assert metric.name == name
    assert metric.description and metric.citation.startswith("@") and "Returns:" in metric.inputs_description
    if name == "caption_scores" and missing_metrics(["ROUGE-L"]):
        pytest.skip("needs pycocoevalcap and Java")
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, 0)
    result = doctest.DocTestRunner().run(example)
    assert result.attempted and not result.failed


def test_bad_inputs_are_refused(load, embeds):
    first, second = embeds
    broken = np.where(np.arange(30)[:, None] == 4, np.nan, first)
    with pytest.raises(ValueError, match="first in row 4"):
        load("paired_cosine").compute(predictions=broken, references=second)
    with pytest.raises(ValueError, match=r"Mismatch in the number of predictions \(30\) and references \(29\)"):
        load("separability").compute(predictions=first, references=second[:29])
    with pytest.raises(ValueError, match=r"references \(1\)"):
        load("caption_scores").compute(predictions=["a three", "a two"], references=[["a three"]])
    with pytest.raises(ValueError, match="classes is empty"):
        load("zero_shot_accuracy").compute(predictions=first, references=[0] * 30, classes=np.ones((0, 16)))
    with pytest.raises(ValueError, match="unknown metric 'recall'; choose from"):
        metric_path("recall")
