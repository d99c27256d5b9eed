import builtins
import subprocess
import sys

import numpy as np
import pytest

from gmail_hf.metrics import (
    alignment_metrics,
    centroid_distance,
    paired_cosine,
    separability,
    token_similarity,
)


def test_hand_worked_numbers():
    first = np.array([[2.0, 0.0], [0.0, 1.0]])
    second = np.array([[1.0, 0.0], [3.0, 0.0]])
    assert paired_cosine(first, second) == pytest.approx(0.5)
    # Means (0.5, 0.5) and (1, 0) after normalisation.
    assert centroid_distance(first, second) == pytest.approx(np.sqrt(0.5))


def test_metrics_of_a_hand_worked_set():
    real = np.eye(3)
    generated = np.eye(3)[[0, 2, 2]]  # the second one looks like the third's partner
    metrics = alignment_metrics(generated, real)
    assert metrics["paired_cosine"] == pytest.approx(2 / 3)
    assert metrics["gen_to_real_R@1"] == pytest.approx(2 / 3)
    assert metrics["gen_to_real_R@5"] == 1.0
    assert list(metrics) == [
        "paired_cosine",
        "gen_to_real_R@1",
        "gen_to_real_R@5",
        "gen_to_real_R@10",
        "centroid_distance",
    ]
    # Of one caption, the second and the third are right answers for each other.
    assert alignment_metrics(generated, real, caption_ids=["a", "b", "b"])["gen_to_real_R@1"] == 1.0


def test_copies_of_one_real_image_are_no_wrong_answers():
    real = np.eye(3)[[0, 0, 1]]
    captions = np.array(["one", "two", "three"])
    assert alignment_metrics(real, real, captions)["gen_to_real_R@1"] == pytest.approx(1 / 3)
    assert alignment_metrics(real, real, captions, image_ids=np.array([7, 7, 8]))["gen_to_real_R@1"] == 1.0


def test_a_real_image_of_several_pairs_counts_once():
    """The first image looks like the second one, whose five copies would fill the five nearest places."""
    real = np.eye(3)[[0, 0, 1, 1, 1, 1, 1, 2]]
    ids, captions = np.array([7, 7, 8, 8, 8, 8, 8, 9]), np.arange(8)
    generated = real + np.array([[0, 0.5, 0]])
    generated[:2] = [0.5, 1, 0]
    assert alignment_metrics(generated, real, captions)["gen_to_real_R@5"] == pytest.approx(6 / 8)
    metrics = alignment_metrics(generated, real, captions, ids)
    assert metrics["gen_to_real_R@1"] == pytest.approx(6 / 8) and metrics["gen_to_real_R@5"] == 1.0
    captions[1] = captions[3]  # a later caption of the second image
    assert alignment_metrics(generated, real, captions, ids)["gen_to_real_R@1"] == pytest.approx(7 / 8)


def test_separability_of_known_sets():
    rng = np.random.default_rng(0)
    one, same = rng.normal(size=(400, 6)), rng.normal(size=(400, 6))
    assert separability(one, same) == pytest.approx(0.5, abs=0.06)
    apart = same + np.array([9.0, 0, 0, 0, 0, 0])
    assert separability(one, apart) > 0.95
    # Chance stays one half when one set is four times the other.
    assert separability(one, same[:100]) == pytest.approx(0.5, abs=0.08)


def test_separability_keeps_pairs_in_one_fold():
    # Pairs that nearly coincide: a probe that met one half of each would guess the other half wrong.
    rng = np.random.default_rng(0)
    generated = rng.normal(size=(60, 40))
    real = generated + rng.normal(scale=1e-3, size=generated.shape)
    assert 0.35 < separability(generated, real) < 0.65


def test_separability_keeps_the_pairs_of_a_real_image_in_one_fold():
    """As with five captions per image: a probe would recognise the copies of images that it was trained on."""
    rng = np.random.default_rng(0)
    images, generated = rng.normal(size=(200, 64)), rng.normal(size=(1000, 64))
    ids = np.repeat(np.arange(200), 5).astype(str)
    real = np.repeat(images, 5, axis=0)
    assert separability(generated, real) > 0.56
    assert separability(generated, real, image_ids=ids) == pytest.approx(0.5, abs=0.03)
    unique = rng.permutation(200).astype(str)
    assert separability(generated[:200], images, image_ids=unique) == separability(generated[:200], images)


def test_separability_is_seeded():
    rng = np.random.default_rng(3)
    sets = rng.normal(size=(50, 4)), rng.normal(loc=0.5, size=(50, 4))
    assert separability(*sets, seed=1) == separability(*sets, seed=1)
    assert len({separability(*sets, seed=seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_cosine(np.ones((2, 3)), np.ones((3, 3))), "same number of rows, got 2 and 3"),
        (lambda: paired_cosine(np.ones((2, 3)), np.ones((2, 4))), "have dimensions 3 and 4"),
        (lambda: paired_cosine(np.ones(3), np.ones(3)), r"shape \(n, dim\)"),
        (lambda: paired_cosine(np.array([["a"]]), np.ones((1, 1))), "real numbers"),
        (lambda: centroid_distance(np.zeros((2, 3)), np.ones((2, 3))), "all-zero"),
        (lambda: centroid_distance(np.array([[1.0], [1.0], [np.inf]]), np.ones((2, 1))), "first in row 2"),
        (lambda: separability(np.ones((3, 2)), np.ones((9, 2))), r"folds must be in 2\.\.3"),
        (lambda: separability(*np.ones((2, 9, 2)), image_ids=np.arange(9) // 3), r"folds must be in 2\.\.3"),
        (lambda: alignment_metrics(np.ones((3, 2)), np.ones((3, 2)), caption_ids=["a"]), "caption_ids must have"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_package_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match=r'pip install "gmail-hf\[evaluation\]"'):
        separability(np.eye(5), np.eye(5))


def test_importing_the_package_needs_no_extra():
    hide = "import sys\nfor name in ('sklearn', 'scipy', 'matplotlib'): sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", hide + "import gmail_hf.metrics"], check=True)


def test_tokens_find_their_best_match_by_hand():
    first = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    second = np.array([[[0.0, 3.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]])
    # Pair 0 holds the same tokens in another order. In pair 1 both tokens meet (1, 1) at 0.71; back, 0.71 and 0.
    root = np.sqrt(0.5)
    assert token_similarity(first, second) == pytest.approx(((1 + root) / 2 + (1 + root / 2) / 2) / 2)
    assert token_similarity(first, first[:, ::-1]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"\(n, tokens, dim\)"):
        token_similarity(first, second[:1])
    second[1, 1, 0] = np.nan
    with pytest.raises(ValueError, match="second.*row 3"):
        token_similarity(first, second)
