import numpy as np
import pytest

from gmail_hf.metrics import PairEmbeddings, to_markdown, train_on_generated

CLASSES, DIM = 4, 12


def world(seed=0, n=400, m=200):
    """Real images in DIM dimensions; generated ones are turned a little and moved; "perfect" alignment undoes both."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.eye(DIM) + 0.35 * rng.normal(size=(DIM, DIM)))[0]
    offset = rng.normal(size=DIM)

    def real_images(labels):
        return 2 * np.eye(DIM)[labels] + rng.normal(scale=0.5, size=(len(labels), DIM))

    def pairs(labels):
        real = real_images(labels)
        twin = real + rng.normal(scale=0.1, size=real.shape)
        return PairEmbeddings(twin @ turn + offset, real, {"GMAIL": twin}, caption_ids=np.arange(len(labels)))

    labels, test_labels = np.arange(n) % CLASSES, np.arange(m) % CLASSES
    return {
        "train": pairs(labels),
        "labels": {"class": labels, "parity": labels % 2},
        "heldout": pairs(test_labels),
        "test_real": real_images(test_labels),
        "test_labels": {"class": test_labels, "parity": test_labels % 2},
    }


def test_the_table_of_a_world_whose_answer_is_known():
    rows = train_on_generated(**world())
    assert [row["row"] for row in rows] == [
        "generated taken for real",
        "mean shift",
        "CORAL",
        "GMAIL",
        "real (upper bound)",
    ]
    by_name = {row["row"]: row for row in rows}
    before, gmail, upper = by_name["generated taken for real"], by_name["GMAIL"], by_name["real (upper bound)"]
    for readout in ("logistic_probe", "nearest_centroid"):
        assert before[f"{readout}_gap_closed"] == 0
        assert upper[f"{readout}_gap_closed"] == 1
        assert gmail[f"{readout}_gap_closed"] == pytest.approx(1, abs=0.2)
    assert gmail["paired_cosine"] > 0.95 > before["paired_cosine"]
    assert gmail["centroid_distance"] < 0.1 < before["centroid_distance"]
    assert gmail["separability"] < 0.65 < before["separability"]
    assert upper["paired_cosine"] is None
    assert rows == train_on_generated(**world())


def test_unseen_pairs_fit_readouts_of_their_own():
    inputs = world()
    unseen = {"unseen": inputs["heldout"], "unseen_labels": inputs["test_labels"]}
    rows = train_on_generated(**inputs, **unseen)
    alone = train_on_generated(**inputs)
    swapped = train_on_generated(**inputs | {"train": inputs["heldout"], "labels": inputs["test_labels"]})
    for row, trained, fitted_on_unseen in zip(rows, alone, swapped, strict=True):
        assert {key: value for key, value in row.items() if "_unseen" not in key} == trained
        if row["row"] not in ("mean shift", "CORAL"):  # which are fitted on the training pairs
            for key in ("logistic_probe", "nearest_centroid"):
                assert row[f"{key}_unseen"] == fitted_on_unseen[key]
                assert row[f"{key}_unseen_gap_closed"] == fitted_on_unseen[f"{key}_gap_closed"]
    assert "probe, unseen" in to_markdown(rows) and "unseen" not in to_markdown(alone)
    with pytest.raises(ValueError, match="unseen_labels must have the tasks"):
        train_on_generated(**inputs, unseen=inputs["heldout"])


def test_scores_are_averaged_over_tasks():
    inputs = world()
    both = train_on_generated(**inputs)
    single = [
        train_on_generated(
            **inputs | {"labels": {task: inputs["labels"][task]}, "test_labels": {task: inputs["test_labels"][task]}}
        )
        for task in ("class", "parity")
    ]
    for row, one, other in zip(both, *single, strict=True):
        assert row["logistic_probe"] == pytest.approx((one["logistic_probe"] + other["logistic_probe"]) / 2)


def test_baselines_never_see_heldout_pairs():
    inputs = world()
    rows = train_on_generated(**inputs)
    held = inputs["heldout"]
    half = PairEmbeddings(held.generated[:100], held.real[:100], {"GMAIL": held.aligned["GMAIL"][:100]})
    fewer = train_on_generated(**inputs | {"heldout": half})
    assert [row["logistic_probe"] for row in rows] == [row["logistic_probe"] for row in fewer]


def test_no_gap_is_said_rather_than_divided_by():
    inputs = world()
    train = inputs["train"]
    inputs["train"] = PairEmbeddings(train.real, train.real, train.aligned)
    rows = train_on_generated(**inputs)
    assert all(row["logistic_probe_gap_closed"] is None for row in rows)
    assert "no gap" in rows[0]["logistic_probe_note"]
    assert "no gap" in to_markdown(rows)


def test_markdown_shows_every_row_and_the_spread():
    rows = train_on_generated(**world())
    plain, spread = to_markdown(rows).splitlines(), to_markdown(rows, spread=rows).splitlines()
    assert len(plain) == len(spread) == 2 + len(rows)
    assert plain[0].count("|") == plain[-1].count("|")
    assert f"{rows[3]['paired_cosine']:.3f}" in plain[5]
    assert "±" in spread[2] and "–" in spread[-1]


def test_errors_say_what_to_do():
    inputs = world()
    with pytest.raises(ValueError, match="same tasks"):
        train_on_generated(**inputs | {"test_labels": {"other": inputs["test_labels"]["class"]}})
    held = inputs["heldout"]
    with pytest.raises(ValueError, match="same aligned models"):
        train_on_generated(**inputs | {"heldout": PairEmbeddings(held.generated, held.real)})
    with pytest.raises(ValueError, match="GMAIL and real must have the same number of rows"):
        PairEmbeddings(held.generated, held.real, {"GMAIL": held.real[:-1]})
    broken = held.generated.copy()
    broken[17, 0] = np.nan
    with pytest.raises(ValueError, match="generated has NaN .* row 17"):
        PairEmbeddings(broken, held.real)
