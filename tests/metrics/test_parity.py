"""
The same numbers as clip_benchmark (LAION, version 1.6.2) on equal embeddings.

Its definitions, as its metrics/zeroshot_retrieval.py and metrics/zeroshot_classification.py state them, written anew:

- Similarities are products of normalised float32 embeddings. The first K of a query are those of `torch.topk`; it is a
  hit if one of its right answers is among them. Recall is the mean over queries.
- An image is of the class of the largest logit, `torch.topk` and `argmax` again. Accuracy is the mean over images,
  mean_per_class_recall scikit-learn's balanced accuracy: the mean over the classes that occur.

Ties go to whichever entry topk or argmax happens to return first, so a tie may count in the model's favour: where all
similarities are equal, R@1 is above zero by luck. Here they count against the model. Without ties both agree exactly;
benchmarks/evaluation.py compares with the package itself.
"""

import numpy as np
import pytest

from gmail_hf.metrics import class_embeddings, image_text_retrieval, zero_shot_accuracy


def normalize(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def their_recall(scores, right, k):
    """`scores` and `right` are (queries, entries)."""
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(right, first, axis=1).any(axis=1).mean()


@pytest.fixture(scope="module")
def captions():
    """200 images of one to seven captions, noisy enough that every recall lies well inside 0 and 1."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(200, 64)).astype(np.float32)
    owner = np.repeat(np.arange(200), rng.integers(1, 8, 200))
    texts = (images[owner] + 3 * rng.normal(size=(len(owner), 64))).astype(np.float32)
    return images, texts, owner


def test_recall(captions):
    images, texts, owner = captions
    ours = image_text_retrieval(images, texts, np.arange(200), text_image_ids=owner)
    scores = normalize(texts) @ normalize(images).T  # (captions, images)
    right = owner[:, None] == np.arange(200)
    for k in (1, 5, 10):
        assert ours[f"text_to_image_R@{k}"] == their_recall(scores, right, k)
        assert ours[f"image_to_text_R@{k}"] == their_recall(scores.T, right.T, k)
        assert 0.1 < ours[f"text_to_image_R@{k}"] < 0.9


def test_zero_shot():
    rng = np.random.default_rng(1)
    prompts = rng.normal(size=(12, 4, 32)).astype(np.float32)
    labels = rng.choice(np.delete(np.arange(12), 5), 300)  # one class never occurs, the others unequally often
    classes = normalize(normalize(prompts).mean(axis=1))
    images = (classes[labels] + 0.4 * rng.normal(size=(300, 32))).astype(np.float32)
    predicted = (100 * normalize(images) @ classes.T).argmax(axis=1)
    ours = zero_shot_accuracy(images, class_embeddings(prompts), labels)
    assert ours["top1"] == (predicted == labels).mean()
    recalls = [(predicted[labels == label] == label).mean() for label in np.unique(labels)]
    assert ours["mean_per_class"] == pytest.approx(np.mean(recalls))
    assert 0.1 < ours["top1"] < 0.9


def test_a_tie_counts_against_the_model_here_alone():
    same = np.ones((20, 8), dtype=np.float32)
    ours = image_text_retrieval(same, same, np.arange(20))
    theirs = their_recall(normalize(same) @ normalize(same).T, np.eye(20, dtype=bool), 1)
    assert (ours["image_to_text_R@1"], theirs) == (0.0, 1 / 20)
