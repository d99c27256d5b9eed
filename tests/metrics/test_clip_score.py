import numpy as np
import pytest

from gmail_hf.metrics import clip_score, ref_clip_score


def test_hand_worked_scores():
    images = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [1.0, 0.0]])
    captions = np.array([[0.6, 0.8], [5.0, 0.0], [-1.0, 0.0], [4.0, 3.0]])
    assert clip_score(images, captions) == pytest.approx([2.5 * 0.6, 0.0, 0.0, 2.5 * 0.8])
    references = [
        np.array([[0.8, -0.6], [0.0, 2.0]]),  # cosines 0 and 0.8
        np.array([[5.0, 0.0]]),  # a CLIPScore of 0
        np.array([[-1.0, 0.0]]),
        np.array([[-4.0, -3.0]]),  # no reference on the caption's side
    ]
    assert ref_clip_score(images, captions, references) == pytest.approx([2 * 1.5 * 0.8 / 2.3, 0.0, 0.0, 0.0])
    # The largest value: both cosines are 1.
    assert ref_clip_score(images[:1], images[:1], [images[:1]]) == pytest.approx([10 / 7])


def test_against_a_second_implementation():
    rng = np.random.default_rng(0)
    images, captions = rng.normal(size=(2, 40, 8)).astype(np.float32)
    references = [rng.normal(size=(rng.integers(1, 6), 8)).astype(np.float32) for _ in images]

    def cosine(one, two):
        return sum(float(x) * float(y) for x, y in zip(one, two, strict=True)) / np.sqrt(
            sum(float(x) ** 2 for x in one) * sum(float(y) ** 2 for y in two)
        )

    plain, with_references = [], []
    for image, caption, given in zip(images, captions, references, strict=True):
        score = 2.5 * max(cosine(image, caption), 0)
        best = max([0, *(cosine(caption, reference) for reference in given)])
        plain.append(score)
        with_references.append(2 / (1 / score + 1 / best) if score and best else 0)
    assert clip_score(images, captions) == pytest.approx(plain)
    assert ref_clip_score(images, captions, references) == pytest.approx(with_references)
    assert 0 in plain and np.count_nonzero(with_references) > 5


def test_errors():
    with pytest.raises(ValueError, match="images and captions must have the same number of rows, got 2 and 1"):
        clip_score(np.eye(2), np.eye(2)[:1])
    with pytest.raises(ValueError, match="captions has 1 all-zero row"):
        clip_score(np.eye(2), np.array([[0.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="2 captions, but references of 1 images"):
        ref_clip_score(np.eye(2), np.eye(2), [np.eye(2)])
    with pytest.raises(ValueError, match="references of row 1 is empty"):
        ref_clip_score(np.eye(2), np.eye(2), [np.eye(2), np.zeros((0, 2))])
