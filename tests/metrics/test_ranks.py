import tracemalloc

import numpy as np
import pytest

from gmail_hf.metrics import (
    image_text_ranks,
    image_text_retrieval,
    ranks_from_similarity,
    recall_at_k,
    retrieval_ranks,
)


def unit(array):
    return array.astype(np.float64) / np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)


def test_hand_worked_matrix():
    similarity = np.array(
        [
            [0.9, 0.1, 0.3, 0.2],  # its own target is first
            [0.8, 0.5, 0.6, 0.1],  # two others come before it
            [0.4, 0.4, 0.4, 0.4],  # three others tie with it, all before it
            [0.7, 0.2, 0.1, 0.7],  # one other ties with it
        ]
    )
    ranks = ranks_from_similarity(similarity, np.eye(4, dtype=bool))
    assert ranks.tolist() == [1, 3, 4, 2]
    assert recall_at_k(ranks, (1, 2, 3, 4)) == {"R@1": 0.25, "R@2": 0.5, "R@3": 0.75, "R@4": 1.0}


def test_several_relevant_targets_are_judged_by_the_best():
    similarity = np.array([[0.2, 0.9, 0.5, 0.9], [0.9, 0.1, 0.8, 0.1]])
    relevant = np.array([[True, True, False, False], [False, True, True, False]])
    # Row 0: 0.9 ties with the wrong target 3. Row 1: 0.8 comes after one wrong target; its other answer is far behind.
    assert ranks_from_similarity(similarity, relevant).tolist() == [2, 2]
    # Two right answers that tie with each other are no obstacle.
    assert ranks_from_similarity(np.array([[0.9, 0.9, 0.1]]), np.array([[True, True, False]])).tolist() == [1]


def test_a_collapsed_model_gets_nothing():
    collapsed = np.tile(np.random.default_rng(0).normal(size=(1, 48)), (301, 1)).astype(np.float32)
    noise = np.random.default_rng(1).normal(scale=1e-9, size=collapsed.shape)  # below what float32 resolves
    for embeds in (collapsed, collapsed + noise):
        ranks = retrieval_ranks(embeds, embeds)
        assert (ranks == 301).all()
        assert recall_at_k(ranks)["R@10"] == 0.0


def test_ids_and_blocks_agree_with_the_whole_matrix(monkeypatch):
    rng = np.random.default_rng(2)
    queries, gallery = rng.normal(size=(37, 8)), rng.normal(size=(23, 8))
    query_ids, gallery_ids = rng.integers(0, 5, 37), np.arange(23) % 5
    expected = ranks_from_similarity(unit(queries) @ unit(gallery).T, query_ids[:, None] == gallery_ids[None, :])
    monkeypatch.setattr("gmail_hf.metrics._checks.BLOCK", 4)  # both sets in several blocks, the last ones smaller
    names = np.array(["ant", "bee", "cat", "dog", "eel"])
    assert retrieval_ranks(queries, gallery, query_ids, gallery_ids).tolist() == expected.tolist()
    assert retrieval_ranks(queries, gallery, names[query_ids], names[gallery_ids]).tolist() == expected.tolist()


def test_either_of_two_ids_makes_an_entry_relevant():
    queries = np.array([[1.0, 0.0]])
    gallery = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    query_ids = np.array([["image 1", "caption 7"]])
    gallery_ids = np.array([["image 2", "caption 8"], ["image 3", "caption 7"], ["image 1", "caption 9"]])
    assert retrieval_ranks(queries, gallery, query_ids, gallery_ids).tolist() == [2]  # by its caption
    assert retrieval_ranks(queries, gallery, query_ids[:, 0], gallery_ids[:, 0]).tolist() == [3]


def test_image_text_retrieval_by_hand():
    images = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the first image has two captions
    texts = np.array([[0.9, 0.4], [0.2, 0.9], [0.8, 0.6]])
    # Image a: its captions score 0.91 and 0.22, the other 0.80: found first. Image b: its own 0.60, others 0.41, 0.98.
    # Captions: a's first is nearer to a, a's second nearer to b, b's nearer to a.
    scores = image_text_retrieval(images, texts, ["a", "a", "b"], ks=(1, 2))
    assert scores == pytest.approx(
        {
            "image_to_text_R@1": 0.5,
            "image_to_text_R@2": 1.0,
            "image_to_text_median_rank": 1.5,
            "text_to_image_R@1": 1 / 3,
            "text_to_image_R@2": 1.0,
            "text_to_image_median_rank": 2.0,
        }
    )
    # Two images of one caption are right answers for each other's captions.
    alike = image_text_retrieval(images[1:], texts[[1, 1]], ["a", "b"], ["same", "same"], ks=(1,))
    assert (alike["image_to_text_R@1"], alike["text_to_image_R@1"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="exactly one caption per image"):
        image_text_retrieval(images, texts, ["a", "a", "b"], ["x", "y", "z"])


def test_ranks_of_images_once_or_once_a_caption():
    rng = np.random.default_rng(3)
    images, owner = rng.normal(size=(7, 16)), np.array([4, 4, 0, 6, 1, 2, 2, 3, 5, 5, 0])
    texts = images[owner] + 2 * rng.normal(size=(11, 16))
    names = np.array(list("gfedcba"))
    ranks = image_text_ranks(images, texts, names, text_image_ids=names[owner])
    similarity, relevant = unit(images) @ unit(texts).T, np.arange(7)[:, None] == owner
    assert ranks["image_to_text"].tolist() == ranks_from_similarity(similarity, relevant).tolist()
    assert ranks["text_to_image"].tolist() == ranks_from_similarity(similarity.T, relevant.T).tolist()
    assert ranks["image_to_text"].max() > 1 and ranks["text_to_image"].max() > 1  # neither is trivial
    repeated = image_text_ranks(images[owner], texts, names[owner])
    seen = [4, 0, 6, 1, 2, 3, 5]  # the order of first rows
    assert repeated["image_to_text"].tolist() == ranks["image_to_text"][seen].tolist()
    assert repeated["text_to_image"].tolist() == ranks["text_to_image"].tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-6])
def test_blocks_in_float32_rank_as_float64_does(monkeypatch, dtype, spread):
    # The smaller the spread, the more similarities lie closer together than float32 tells apart.
    monkeypatch.setattr("gmail_hf.metrics._checks.BLOCK", 64)
    rng = np.random.default_rng(4)
    images = (rng.normal(size=(1, 48)) + spread * rng.normal(size=(90, 48))).astype(dtype)
    owner = np.repeat(np.arange(90), 3)
    texts = (images[owner] + spread * rng.normal(size=(270, 48))).astype(dtype)
    before = images.copy(), texts.copy()
    ranks = image_text_ranks(images, texts, np.arange(90), text_image_ids=owner)
    similarity, relevant = unit(images) @ unit(texts).T, np.arange(90)[:, None] == owner
    assert ranks["image_to_text"].tolist() == ranks_from_similarity(similarity, relevant).tolist()
    assert ranks["text_to_image"].tolist() == ranks_from_similarity(similarity.T, relevant.T).tolist()
    assert (images == before[0]).all() and (texts == before[1]).all()


def test_captions_of_few_words_are_answers_for_many_images(monkeypatch):
    monkeypatch.setattr("gmail_hf.metrics._checks.BLOCK", 4)
    rng = np.random.default_rng(7)
    images, texts, caption_ids = rng.normal(size=(30, 5)), rng.normal(size=(30, 5)), rng.integers(0, 3, 30)
    ranks = image_text_ranks(images, texts, np.arange(30), caption_ids)
    similarity, relevant = unit(images) @ unit(texts).T, caption_ids[:, None] == caption_ids
    assert ranks["image_to_text"].tolist() == ranks_from_similarity(similarity, relevant).tolist()
    assert ranks["text_to_image"].tolist() == ranks_from_similarity(similarity.T, relevant.T).tolist()


@pytest.mark.parametrize(("ahead_by", "rank"), [(1e-6, 2), (5e-8, 2), (-5e-8, 2), (-1e-6, 1)])
def test_differences_below_float32_count_beyond_the_tolerance(ahead_by, rank):
    # Query i points along axis i; its right answer at cosine 0.6, a wrong one nearly there, both else along own axes.
    def entries(cosine, axis):
        gallery = np.zeros((30, 90))
        gallery[np.arange(30), np.arange(30)] = cosine
        gallery[np.arange(30), axis + np.arange(30)] = np.sqrt(1 - cosine**2)
        return gallery

    gallery = np.concatenate([entries(0.6, 30), entries(0.6 + ahead_by, 60)])
    assert (retrieval_ranks(np.eye(30, 90), gallery, np.arange(30), np.arange(60)) == rank).all()


def test_copies_tie_whatever_their_place():
    # BLAS sums a row by another order near the edge of a matrix: copies of the right answer must not come out behind.
    rng = np.random.default_rng(5)
    gallery = np.tile(rng.normal(size=(1, 767)), (1033, 1)).astype(np.float32)
    queries = gallery[:5] + rng.normal(scale=0.1, size=(5, 767)).astype(np.float32)
    assert (retrieval_ranks(queries, gallery, np.arange(5), np.arange(1033)) == 1033).all()


def test_memory_does_not_grow_with_the_captions(monkeypatch):
    monkeypatch.setattr("gmail_hf.metrics._checks.BLOCK", 256)
    rng = np.random.default_rng(6)
    peaks = {}
    for captions in (4_000, 40_000):
        images, owner = rng.normal(size=(500, 32)).astype(np.float32), np.arange(captions) % 500
        texts = rng.normal(size=(captions, 32)).astype(np.float32)
        tracemalloc.start()
        image_text_ranks(images, texts, np.arange(500), text_image_ids=owner)
        peaks[captions] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # 36,000 more captions: 72 MB of similarities in float32, 5 MB of embeddings; a few numbers each remain.
    assert peaks[40_000] - peaks[4_000] < 36_000 * 120


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval_ranks(np.ones((2, 3)), np.ones((4, 3))), "pass ids for both"),
        (lambda: retrieval_ranks(np.ones((2, 3)), np.ones((2, 4))), "have dimensions"),
        (lambda: retrieval_ranks(np.ones((0, 3)), np.ones((2, 3))), "queries is empty"),
        (lambda: retrieval_ranks(np.array([[1.0, 2.0], [np.nan, 0.0]]), np.ones((2, 2))), "first in row 1"),
        (lambda: retrieval_ranks(np.array([[1.0, 2.0], [0.0, 0.0]]), np.ones((2, 2))), "first row 1"),
        (lambda: retrieval_ranks(np.ones((2, 2)), np.ones((2, 2)), np.arange(2)), "or neither"),
        (lambda: retrieval_ranks(np.ones((2, 2)), np.ones((2, 2)), np.arange(3), np.arange(2)), "query_ids must"),
        (lambda: retrieval_ranks(np.ones((2, 2)), np.ones((2, 2)), np.arange(2), np.arange(2) + 1), "query 0 has no"),
        (lambda: image_text_retrieval(np.ones((3, 2)), np.ones((3, 2)), ["a", "b"]), r"ids must have shape \(3,\)"),
        (lambda: image_text_retrieval(np.ones((2, 2)), np.ones((3, 2)), [0, 0, 1]), "image_ids must have shape"),
        (lambda: image_text_ranks(np.ones((2, 2)), np.ones((2, 2)), [0, 1], ["a"]), "ids must have shape"),
        (lambda: image_text_ranks(np.ones((2, 2)), np.ones((2, 2)), [0, 1], None, [0, 0]), "image 1 .* no caption"),
        (lambda: image_text_ranks(np.ones((1, 2)), np.ones((2, 2)), [7], None, [7, 9]), "caption 1 .*id 9.* no image"),
        (lambda: image_text_ranks(np.ones((2, 2)), np.array([[1, 1], [1, np.inf]]), [0, 1]), "text_embeds .* row 1"),
        (lambda: image_text_ranks(np.array([[1, np.nan], [1, 1]]), np.ones((2, 2)), [0, 1]), "image_embeds .* row 0"),
        (lambda: ranks_from_similarity(np.ones((2, 2)), np.eye(3)), r"same shape \(n, m\)"),
        (lambda: ranks_from_similarity(np.array([[1.0], [np.inf]]), np.ones((2, 1))), "row 1"),
        (lambda: recall_at_k(np.array([0, 1])), "ranks must be"),
        (lambda: recall_at_k(np.array([1]), (0,)), "at least 1"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
