"""Columns of embeddings in place of images, and when images are embedded."""

import datasets
import numpy as np
import pytest
import torch
from tiny import logged, make_model, make_pairs, make_processor, weights

from gmail_hf import GmailTrainer, embed_images
from gmail_hf.training import embeddings
from gmail_hf.training.checks import check_pairs

TEXT = {"align_weight": 0.0, "gen_text_weight": 1.0}
DIM = 24


def embeds_of(model, pairs, side, modality):
    return embed_images(model, make_processor(), pairs[f"{side}_image"], modality)


def with_embeds(pairs, side, rows, dtype="float32", length=-1):
    """The pairs with a column of embeddings; None for the rows that are None."""
    features = datasets.Features({f"{side}_embeds": datasets.List(datasets.Value(dtype), length=length)})
    embeds = datasets.Dataset.from_dict({f"{side}_embeds": [None if r is None else list(r) for r in rows]}, features)
    return datasets.concatenate_datasets([pairs, embeds], axis=1)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("length", [-1, DIM])
def test_real_embeddings_train_like_real_images(clip_folder, train, length, streamed):
    pairs = make_pairs(20)
    rows = 3 * embeds_of(make_model(clip_folder), pairs, "real", "real")  # the loss normalises them
    unreadable = make_pairs(20, bad_real=range(20))  # embeddings take precedence over images
    given = with_embeds(unreadable, "real", rows, length=length)
    if streamed:
        given, pairs = given.to_iterable_dataset(), pairs.to_iterable_dataset()
    runs = [train(dataset) for dataset in (given, pairs)]
    assert len(logged(runs[0])) == 4 and logged(runs[0]) == pytest.approx(logged(runs[1]), rel=1e-4)
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=1e-3, atol=1e-3)


def test_embeddings_of_both_branches_train_the_text_adapter(clip_folder, train):
    def aligned():
        model = make_model(clip_folder)
        model.add_text_lora()
        return model

    pairs = make_pairs(20)
    given = pairs.remove_columns(["real_image", "generated_image"])
    for side, modality in (("real", "real"), ("generated", "gen")):
        given = with_embeds(given, side, embeds_of(aligned(), pairs, side, modality))
    losses = {**TEXT, "real_text_weight": 0.5}
    runs = [train(dataset, model=aligned(), **losses) for dataset in (given, pairs)]
    assert len(logged(runs[0])) == 4 and logged(runs[0]) == pytest.approx(logged(runs[1]), rel=1e-4)
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=1e-3, atol=1e-3)


def test_evaluation_takes_embeddings_too(clip_folder, arguments):
    pairs, model = make_pairs(12), make_model(clip_folder)
    trainer = GmailTrainer(model, arguments(), pairs, pairs, make_processor())
    given = with_embeds(pairs.remove_columns("real_image"), "real", embeds_of(model, pairs, "real", "real") / 2)
    expected, metrics = trainer.evaluate(), trainer.evaluate(given)
    for name in ("loss", "paired_cosine", "gen_to_real_R@1"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-5)


def test_optimal_pairing_reads_given_embeddings(clip_folder, train):
    pairs = make_pairs(24, captions=["a cat", "a dog"] * 12)
    scales = np.random.default_rng(0).uniform(0.1, 10, (24, 1))
    rows = scales * embeds_of(make_model(clip_folder), pairs, "real", "real")
    runs = [train(dataset, pairing="optimal", max_steps=1) for dataset in (with_embeds(pairs, "real", rows), pairs)]
    assert np.array_equal(runs[0].train_dataset.partners, runs[1].train_dataset.partners)
    assert not np.array_equal(runs[0].train_dataset.partners, range(24))


def test_rows_without_an_embedding_are_skipped_or_refused(clip_folder, train):
    pairs = make_pairs(8)
    rows = list(embeds_of(make_model(clip_folder), pairs, "real", "real"))
    rows[2], rows[5] = None, np.full(DIM, np.nan)
    given = with_embeds(pairs, "real", rows)
    trainer = train(given, max_steps=4)  # two epochs
    assert logged(trainer, "skipped_pairs")[-1] == 4 and np.isfinite(logged(trainer)).all()
    with pytest.raises(ValueError, match="2 of 8 sampled pairs.*image_id id-2: no embedding in 'real_embeds'"):
        train(given, on_bad_image="error")
    alone = train(given, per_device_train_batch_size=1, consistency_weight=1.0, max_steps=8)
    assert alone.skipped_pairs == 2 and np.isfinite(logged(alone)).all()


def test_embeddings_of_a_branch_that_trains_are_refused(clip_folder, train):
    pairs = make_pairs(8)
    given = with_embeds(pairs, "generated", np.ones((8, DIM)))
    with pytest.raises(ValueError, match="'generated_embeds', but the `gen` branch trains.*remove_columns"):
        train(given)
    with pytest.raises(ValueError, match="'real_embeds', but the `real` branch trains"):
        train(
            with_embeds(pairs, "real", np.ones((8, DIM))), model=make_model(clip_folder, trainable_modalities=["real"])
        )
    with pytest.raises(ValueError, match="'real_embeds', but `token_weight` compares patch tokens"):
        train(with_embeds(pairs, "real", np.ones((8, DIM))), token_weight=1.0)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (np.ones((8, 7)), {}, r"'real_embeds' of pairs holds float64 of shape \(7,\).*list of 24 floats"),
        (np.ones((8, DIM), int), {"dtype": "int64"}, "holds int64"),
        ([np.ones(DIM)] * 7 + [np.ones(5)], {}, "shape \\(5,\\)|different lengths"),
        ([None] * 8, {}, "8 of 8 sampled pairs"),
        (np.full((8, DIM), np.nan), {}, "8 of 8 sampled pairs.*not finite"),
    ],
)
def test_other_columns_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        check_pairs(with_embeds(make_pairs(8), "real", rows, **options), "pairs", embed_dim=DIM)


def test_an_embedding_of_another_length_is_found_wherever_it_is():
    rows = [np.ones(DIM)] * 40
    rows[3] = np.ones(5)
    with pytest.raises(ValueError, match=r"'real_embeds' of pairs holds embeddings of different lengths: \[5, 24\]"):
        check_pairs(with_embeds(make_pairs(40), "real", rows), "pairs", sample=2, embed_dim=DIM)


def test_images_are_embedded_at_first_use(clip_folder, arguments, monkeypatch):
    embedded = []
    original = embeddings.cached_embeds

    def counting(dataset, column, *args, **kwargs):
        embedded.append((column, len(dataset)))
        return original(dataset, column, *args, **kwargs)

    monkeypatch.setattr("gmail_hf.training.preparation.cached_embeds", counting)
    trainer = GmailTrainer(
        make_model(clip_folder), arguments(max_steps=1), make_pairs(8), {"near": make_pairs(5)}, make_processor()
    )
    assert not embedded
    trainer.evaluate()
    assert embedded == [("real_image", 5)]
    trainer.train()
    assert embedded == [("real_image", 5), ("real_image", 8)]
    trainer.evaluate()
    trainer.get_train_dataloader()
    assert len(embedded) == 2  # once each
