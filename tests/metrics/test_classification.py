import numpy as np
import pytest

from gmail_hf.metrics import class_embeddings, zero_shot_accuracy, zero_shot_ranks


def test_hand_worked_classes():
    classes = np.array([[1.0, 0.0], [0.0, 2.0]])
    images = np.array([[3.0, 1.0], [1.0, 3.0], [1.0, 3.0], [1.0, 1.0]])  # the last lies between both
    scores = zero_shot_accuracy(images, classes, np.array([0, 1, 0, 1]))
    assert scores == {"top1": 0.5, "mean_per_class": 0.5}
    assert zero_shot_accuracy(images[:3], classes, np.array([0, 1, 1])) == {"top1": 1.0, "mean_per_class": 1.0}
    unbalanced = zero_shot_accuracy(images[[0, 0, 0, 1]], classes, np.array([0, 0, 0, 0]))
    assert unbalanced == {"top1": 0.75, "mean_per_class": 0.75}
    assert zero_shot_accuracy(images[[0, 0, 0, 0]], classes, np.array([0, 0, 0, 1]))["mean_per_class"] == 0.5


def test_a_collapsed_model_gets_nothing():
    scores = zero_shot_accuracy(np.ones((3, 4)), np.ones((2, 4)), np.array([0, 1, 0]))
    assert scores["top1"] == 0.0


def test_ranks_of_the_own_class():
    classes = np.eye(3)
    images = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 2.0]])
    assert zero_shot_ranks(images, classes, np.array([0, 1, 2])).tolist() == [1, 2, 3]


def test_prompts_are_averaged_at_length_one():
    ensemble = class_embeddings(np.array([[[10.0, 0.0], [0.0, 0.1]], [[0.0, 5.0], [0.0, 1.0]]]))
    np.testing.assert_allclose(ensemble, [[np.sqrt(0.5), np.sqrt(0.5)], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_embeddings(np.ones((2, 3))), r"\(classes, prompts, dim\)"),
        (lambda: class_embeddings(np.full((1, 2, 3), np.nan)), "row 0"),
        (lambda: class_embeddings(np.ones((2, 0, 3))), "at least one prompt per class"),
        (lambda: zero_shot_accuracy(np.ones((2, 3)), np.ones((0, 3)), np.zeros(2, int)), "classes is empty"),
        (lambda: zero_shot_accuracy(np.array([[1.0], [np.nan]]), np.ones((2, 1)), np.zeros(2, int)), "first in row 1"),
        (lambda: zero_shot_accuracy(np.ones((2, 3)), np.ones((2, 4)), np.zeros(2, int)), "have dimensions"),
        (lambda: zero_shot_accuracy(np.ones((2, 3)), np.ones((2, 3)), np.array([0, 2])), r"0\.\.1"),
        (lambda: zero_shot_accuracy(np.ones((2, 3)), np.ones((2, 3)), np.array(["a", "b"])), "integers"),
        (lambda: zero_shot_accuracy(np.ones((2, 3)), np.ones((2, 3)), np.zeros(3, int)), "labels"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
