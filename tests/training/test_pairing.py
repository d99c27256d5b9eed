"""Optimal pairing against brute force, pairs of images that share a caption, and batches of them."""

import builtins
from itertools import permutations

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from tiny import assert_equal, logged, make_model, make_pairs, weights

from gmail_hf import pair_by_caption
from gmail_hf.training.pairing import CaptionSampler, EpochCallback, optimal_pairing, random_pairing


def unit_rows(count, seed, dim=5):
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def total(gen, real, rows, partners):
    return float(sum(gen[row] @ real[partner] for row, partner in zip(rows, partners, strict=True)))


@pytest.mark.parametrize("seed", range(5))
def test_equals_brute_force_within_each_caption(seed):
    gen, real = unit_rows(13, seed), unit_rows(13, seed + 100)
    captions = np.random.default_rng(seed).choice(["a", "b", "c"], 13).tolist()
    partners = optimal_pairing(gen, real, captions)
    assert sorted(partners) == list(range(13)) and partners.dtype == np.int64
    for caption in set(captions):
        rows = [row for row in range(13) if captions[row] == caption]
        assert {captions[partner] for partner in partners[rows]} == {caption}
        best = max(total(gen, real, rows, order) for order in permutations(rows))
        assert total(gen, real, rows, partners[rows]) == pytest.approx(best, abs=1e-5)


def test_captions_of_their_own_keep_their_pairs():
    gen, real = unit_rows(6, 0), unit_rows(6, 1)
    assert optimal_pairing(gen, real, list("abcdef")).tolist() == list(range(6))


def test_finds_a_hidden_permutation():
    real = unit_rows(40, 0, dim=16)
    order = np.random.default_rng(1).permutation(40)
    assert optimal_pairing(real[order], real, ["same"] * 40).tolist() == order.tolist()


def test_large_groups_are_split():
    gen, real = unit_rows(50, 0), unit_rows(50, 1)
    captions = ["a"] * 30 + ["b"] * 20
    whole = optimal_pairing(gen, real, captions)
    split = optimal_pairing(gen, real, captions, max_group=8)
    assert sorted(split) == list(range(50)) and (split[:30] < 30).all()
    own = total(gen, real, range(50), range(50))
    assert own < total(gen, real, range(50), split) < total(gen, real, range(50), whole)
    assert np.array_equal(split, optimal_pairing(gen, real, captions, max_group=8))
    assert not np.array_equal(split, optimal_pairing(gen, real, captions, max_group=8, seed=1))


@pytest.mark.parametrize("name", ["gen_embeds", "real_embeds"])
def test_row_that_is_not_finite_is_named(name):
    embeds = {"gen_embeds": unit_rows(4, 0), "real_embeds": unit_rows(4, 1)}
    embeds[name][2, 1] = np.nan
    with pytest.raises(ValueError, match=f"`{name}` row 2"):
        optimal_pairing(**embeds, captions=["a"] * 4)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="4 generated and 3 real.*4 captions"):
        optimal_pairing(unit_rows(4, 0), unit_rows(3, 1), ["a"] * 4)


def test_missing_scipy_names_the_remedy(monkeypatch):
    original = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"gmail-hf\[evaluation\]"):
        optimal_pairing(unit_rows(2, 0), unit_rows(2, 1), ["a", "a"])


CLASSES = ["a cat", "a dog", "a cat", "a cat", "a dog", "a cat", "a fox"]


def test_random_partners_share_the_caption_and_change_with_the_epoch():
    draws = [random_pairing(CLASSES * 4, 0, epoch) for epoch in (0, 0, 1)]
    for partners in draws:
        assert sorted(partners) == list(range(28))
        assert [(CLASSES * 4)[row] for row in partners] == CLASSES * 4
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


def test_sampler_draws_each_row_once_in_blocks_of_a_caption():
    captions = CLASSES * 4  # 16 cats, 8 dogs, 4 foxes
    sampler = CaptionSampler(captions, 4)
    rows = list(sampler)
    assert len(sampler) == 28 and sorted(rows) == list(range(28))
    blocks = [[captions[row] for row in rows[start : start + 4]] for start in range(0, 28, 4)]
    assert all(len(set(block)) == 1 for block in blocks)
    assert rows == list(sampler) != list(range(28))
    sampler.set_epoch(1)
    assert rows != list(sampler)


def test_pairs_by_caption_use_every_image():
    generated = make_pairs(5, captions=["a cat", "a dog", "a dog", "a dog", "an owl"])
    real = make_pairs(5, seed=100, captions=["a cat", "a dog", "a cat", "a fox", "a cat"])
    generated = generated.select_columns(["generated_image", "caption"])
    pairs = pair_by_caption(generated, real.select_columns(["real_image", "caption", "image_id"]))
    # The dog's one photograph serves three generated images, the cat's one generated image three photographs.
    assert pairs["caption"][:] == ["a cat", "a dog", "a dog", "a dog", "a cat", "a cat"]
    assert pairs["image_id"][:] == ["id-0", "id-1", "id-1", "id-1", "id-2", "id-4"]
    for i, row in enumerate([0, 1, 2, 3, 0, 0]):
        assert pairs[i]["generated_image"] == generated[row]["generated_image"]
        assert pairs[i]["real_image"] == real[[0, 1, 1, 1, 2, 4][i]]["real_image"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.rename_column("image_id", "id"), "`real` lacks the column.*image_id"),
        (lambda rows: rows.map(lambda row: {"caption": row["caption"] + "!"}), "share no caption"),
    ],
    ids=["column", "captions"],
)
def test_images_that_cannot_be_paired_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pair_by_caption(make_pairs(2).select_columns(["generated_image", "caption"]), change(make_pairs(2)))


def test_training_without_partners_draws_real_images_of_the_caption(train):
    pairs = make_pairs(20, captions=["a cat", "a dog"] * 10)
    options = {"recipe": "robust", "per_device_train_batch_size": 8, "images_per_caption": 4, "max_steps": 5}
    trainer = train(pairs, pairing="none", **options)  # three steps are an epoch
    dataset = trainer.train_dataset
    partners = [dataset.partners.copy()]
    for epoch in range(2):
        dataset.set_epoch(epoch)
        partners.append(dataset.partners)
    assert (partners[0] == partners[2]).all() and (partners[0] != partners[1]).any()
    assert isinstance(trainer.get_train_dataloader().batch_sampler.sampler, CaptionSampler)
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["caption_ids"].unique(return_counts=True)[1].tolist()) in ([4, 4], [8])
    again = train(pairs, pairing="none", **options)
    assert [entry.get("loss") for entry in again.state.log_history] == [
        entry.get("loss") for entry in trainer.state.log_history
    ]


def test_one_caption_for_all_images_trains_without_negatives(train):
    pairs = make_pairs(8, captions=["a cat"] * 8)
    train(pairs, recipe="robust", pairing="none", max_steps=1)
    with pytest.raises(ValueError, match="All rows of train_dataset have caption='a cat'"):
        train(pairs, max_steps=1)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"trainable_modalities": ["real", "gen"]}, {"pairing": "none"}, 'pairing="none"` needs a frozen real branch'),
        ({}, {"images_per_caption": 2}, "train_dataset is streamed"),
    ],
    ids=["trained", "streamed"],
)
def test_what_cannot_be_drawn_by_caption_is_refused(clip_folder, train, fields, options, message):
    pairs = make_pairs(8) if fields else make_pairs(8).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        train(pairs, model=make_model(clip_folder, **fields), recipe="robust", **options)


def test_resumed_in_an_epoch_draws_what_a_straight_run_draws(train, tmp_path):
    pairs = make_pairs(20, captions=["a cat", "a dog"] * 10)
    options = {"recipe": "robust", "pairing": "none", "images_per_caption": 2, "per_device_train_batch_size": 8}
    options |= {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = train(pairs, output_dir=str(tmp_path / "run"), **options)
    resumed = train(pairs, output_dir=str(tmp_path / "run"), resume=str(tmp_path / "run" / "checkpoint-4"), **options)
    assert logged(resumed) == pytest.approx(logged(straight))
    assert_equal(weights(resumed), weights(straight))


def test_the_epoch_reaches_data_and_sampler_of_several_processes(train):
    pairs = make_pairs(8, captions=["a cat", "a dog"] * 4)
    trainer = train(pairs, recipe="robust", pairing="none", images_per_caption=2, max_steps=1)
    loader = trainer.get_train_dataloader()
    sampler = loader.batch_sampler.sampler
    shards = BatchSamplerShard(loader.batch_sampler, num_processes=2, process_index=1)
    parts = skip_first_batches(DataLoaderShard(loader.dataset, batch_sampler=shards), 1)
    trainer.state.epoch = 3.4
    EpochCallback().on_epoch_begin(trainer.args, trainer.state, trainer.control, train_dataloader=parts)
    assert sampler.epoch == 3
    assert (loader.dataset.partners == loader.dataset.redraw(3)).all()
