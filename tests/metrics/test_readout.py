import numpy as np
import pytest

from gmail_hf.metrics import coral, gap_closed, logistic_probe, mean_shift, nearest_centroid, sgd_probe, tuned_probe


def blobs(rng, n=300, classes=3, dim=8, noise=0.6):
    labels = np.arange(n) % classes
    return 3 * np.eye(dim)[labels] + rng.normal(scale=noise, size=(n, dim)), labels


def test_nearest_centroid_by_hand():
    train = np.array([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.2, 1.0]])
    labels = np.array(["right", "right", "up", "up"])
    test = np.array([[5.0, 1.0], [1.0, 5.0], [1.0, 2.0], [2.0, 1.0]])
    assert nearest_centroid(train, labels, test, np.array(["right", "up", "right", "right"])) == 0.75


def test_logistic_probe_is_the_documented_sklearn_model():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    (train, labels), (test, test_labels) = blobs(rng, noise=1.5), blobs(rng, noise=1.5)
    train_unit, test_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    mean, deviation = train_unit.mean(axis=0), train_unit.std(axis=0)
    model = LogisticRegression(max_iter=2000).fit((train_unit - mean) / deviation, labels)
    expected = model.score((test_unit - mean) / deviation, test_labels)
    assert 0.4 < expected < 1.0
    assert logistic_probe(train, labels, test, test_labels) == pytest.approx(expected)


def test_tuned_probe_is_the_protocol_of_synclr():
    """Every penalty fitted by itself, chosen on validation, fitted again on both."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    rng = np.random.default_rng(0)
    (train, labels), (test, test_labels) = blobs(rng, 90, noise=2.5), blobs(rng, 90, noise=2.5)
    names = np.array(["bird", "cat", "dog"])
    found = tuned_probe(train, names[labels], test, names[test_labels], seed=3)

    def standardised(rows, by):
        unit, by = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, by))
        return (unit - by.mean(axis=0)) / by.std(axis=0)

    part, rest = train_test_split(np.arange(90), test_size=18, stratify=labels, random_state=3)
    assert np.bincount(labels[rest]).tolist() == [6, 6, 6]
    scores = {}
    for penalty in 10 ** np.linspace(5, -6, 45):
        probe = LogisticRegression(C=1 / penalty, max_iter=5000).fit(
            standardised(train[part], train[part]), labels[part]
        )
        scores[penalty] = probe.score(standardised(train[rest], train[part]), labels[rest])
    assert len(set(scores.values())) > 3
    penalty = max(scores, key=scores.get)
    assert (found.chosen, found.validation) == (pytest.approx(penalty), scores[penalty])
    both = np.concatenate([train[part], train[rest]])
    final = LogisticRegression(C=1 / penalty, max_iter=5000).fit(
        standardised(both, both), labels[np.concatenate([part, rest])]
    )
    predicted = final.predict(standardised(test, both))
    assert found.predicted.tolist() == names[predicted].tolist()
    assert found.top1 == (predicted == test_labels).mean() < 1
    given = tuned_probe(train[part], labels[part], test, test_labels, train[rest], labels[rest])
    assert (given.top1, given.chosen, given.predicted.tolist()) == (found.top1, found.chosen, predicted.tolist())


def test_tuned_probe_chooses_by_accuracy_per_class_where_asked():
    """By accuracy a penalty that predicts the frequent class alone wins; it knows half of the classes."""
    rng = np.random.default_rng(0)
    labels = (np.arange(100) % 10 == 0).astype(int)
    sets = [rng.normal(size=(100, 8)) + 0.8 * labels[:, None] * np.eye(8)[0] for _ in range(3)]
    args = sets[0], labels, sets[1], labels, sets[2], labels
    whole, by_class = tuned_probe(*args), tuned_probe(*args, per_class=True)
    assert (whole.validation, whole.top1, whole.mean_per_class) == (0.9, 0.9, 0.5)
    assert by_class.validation > 0.5 and by_class.chosen < whole.chosen
    hits = by_class.predicted == labels
    assert by_class.mean_per_class == pytest.approx((hits[labels == 0].mean() + hits[labels == 1].mean()) / 2)


def test_sgd_probe_reaches_the_regression_without_penalty():
    """The loss is convex: with rates of this size 90 epochs end where L-BFGS ends."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    (train, labels), (test, test_labels), (given, given_labels) = (blobs(rng, noise=2.5) for _ in range(3))
    names = np.array(["bird", "cat", "dog"])
    found = sgd_probe(train, names[labels], test, names[test_labels], given, names[given_labels])
    both, both_labels = np.concatenate([train, given]), np.concatenate([labels, given_labels])
    both, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (both, test))
    mean, deviation = both.mean(axis=0), both.std(axis=0)
    model = LogisticRegression(C=1e6, max_iter=2000).fit((both - mean) / deviation, both_labels)
    expected = model.predict((test - mean) / deviation)
    assert (found.predicted == names[expected]).mean() > 0.97
    assert found.top1 == (found.predicted == names[test_labels]).mean() < 1
    again = sgd_probe(train, labels, test, test_labels, given, given_labels)
    assert names[again.predicted].tolist() == found.predicted.tolist() and again.chosen == found.chosen
    assert sgd_probe(train, labels, test, test_labels, given, given_labels, epochs=1).chosen > found.chosen


@pytest.mark.parametrize(
    "readout",
    [
        logistic_probe,
        nearest_centroid,
        lambda *args: tuned_probe(*args).top1,
        lambda *args: sgd_probe(*args, epochs=10).top1,
    ],
)
def test_readouts_ignore_length_and_know_easy_classes(readout):
    rng = np.random.default_rng(1)
    (train, labels), (test, test_labels) = blobs(rng), blobs(rng)
    score = readout(train, labels, test, test_labels)
    assert score > 0.95
    lengths = rng.uniform(0.1, 9, size=(len(train), 1))
    assert readout(train * lengths, labels, test * 5, test_labels) == score
    one = test_labels == test_labels[0]
    assert 0.9 < readout(train, labels, test[one], test_labels[one]) <= 1  # only training needs two classes


def test_mean_shift_moves_the_mean_and_nothing_else():
    rng = np.random.default_rng(2)
    source, target = rng.normal(size=(50, 4)), rng.normal(loc=3.0, size=(70, 4))
    moved = mean_shift(source, target)(source)
    np.testing.assert_allclose(moved.mean(axis=0), target.mean(axis=0))
    np.testing.assert_allclose(moved - moved[0], source - source[0], atol=1e-12)


def test_coral_undoes_a_known_linear_distortion():
    rng = np.random.default_rng(3)
    target = rng.normal(size=(4000, 3)) @ rng.normal(size=(3, 3)) + 2.0
    # A symmetric positive map of whitened data is what CORAL can undo; any rotation it cannot see.
    source = rng.normal(size=(4000, 3)) * [5.0, 0.3, 1.0] - 4.0
    moved = coral(source, target, shrinkage=1e-9)(source)
    np.testing.assert_allclose(moved.mean(axis=0), target.mean(axis=0))
    np.testing.assert_allclose(np.cov(moved.T), np.cov(target.T), rtol=1e-5, atol=1e-6)
    # Equal sets stay where they are, whatever the shrinkage.
    np.testing.assert_allclose(coral(target, target, shrinkage=0.5)(target), target, atol=1e-9)


def test_coral_with_fewer_rows_than_dimensions_is_finite():
    rng = np.random.default_rng(4)
    assert np.isfinite(coral(rng.normal(size=(5, 20)), rng.normal(size=(6, 20)))(rng.normal(size=(9, 20)))).all()


def test_baselines_close_a_gap_that_is_a_shift():
    rng = np.random.default_rng(5)
    (real, labels), (test, test_labels) = blobs(rng), blobs(rng)
    generated = blobs(rng)[0] + 3 * (np.eye(8)[1] - np.eye(8)[0])  # class 0 lands where class 1 should be
    before = nearest_centroid(generated, labels, test, test_labels)
    upper = nearest_centroid(real, labels, test, test_labels)
    for fit in (mean_shift, coral):
        after = nearest_centroid(fit(generated, real)(generated), labels, test, test_labels)
        assert gap_closed(after, before, upper).value > 0.9


def test_gap_closed_by_hand():
    assert gap_closed(0.8, 0.6, 0.9) == (pytest.approx(2 / 3), "")
    assert gap_closed(0.5, 0.6, 0.9).value == pytest.approx(-1 / 3)
    # The paper's Table 9 (CIDEr, ClipCap on COCO): 115.35 without, 119.53 with alignment, 119.78 on real images.
    assert gap_closed(119.53, 115.35, 119.78).value == pytest.approx(0.94, abs=0.005)


@pytest.mark.parametrize(
    ("generated", "real", "reason"), [(0.9, 0.8, "no gap"), (0.8, 0.8, "no gap"), (0.8, 0.805, "too small")]
)
def test_gap_closed_refuses_to_divide_by_nothing(generated, real, reason):
    gap = gap_closed(0.85, generated, real)
    assert np.isnan(gap.value)
    assert reason in gap.reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logistic_probe(np.ones((3, 2)), [0, 0, 0], np.ones((1, 2)), [0]), "needs at least two classes"),
        (lambda: tuned_probe(np.eye(3), [0, 0, 1], np.eye(3), [0, 0, 1]), "class 1 has only one training row"),
        (lambda: tuned_probe(np.eye(2), [0, 1], np.eye(2), [0, 1], np.eye(2), [0, 7]), "contain 7, train_labels"),
        (lambda: nearest_centroid(np.ones((3, 2)), [0, 1], np.ones((1, 2)), [0]), "one label per embedding"),
        (lambda: nearest_centroid(np.ones((2, 2)), [0, 1], np.ones((2, 2)), [0, 2]), "contain 2, train_labels"),
        (lambda: nearest_centroid(np.ones((2, 2)), [0, 1], np.ones((2, 3)), [0, 1]), "have dimensions"),
        (
            lambda: nearest_centroid(np.array([[1.0, 0], [-1.0, 0], [0, 1.0]]), [0, 0, 1], np.ones((2, 2)), [0, 1]),
            "class centroids has 1 all-zero",
        ),
        (lambda: mean_shift(np.ones((2, 2)), np.ones((2, 3))), "have dimensions"),
        (lambda: mean_shift(np.eye(2), np.eye(2))(np.eye(3)), "fitted on dimension 2"),
        (lambda: coral(np.ones((1, 2)), np.eye(2)), "source has no variance"),
        (lambda: coral(np.eye(2), np.ones((5, 2))), "target has no variance"),
        (lambda: coral(np.eye(2), np.eye(2), shrinkage=0), "must be positive"),
        (lambda: gap_closed(float("nan"), 0.5, 0.6), "aligned is nan"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
