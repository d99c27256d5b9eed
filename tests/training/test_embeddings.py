"""Embeddings of data sets and their cache: equal to fresh ones, read when current, never when stale."""

import zipfile

import datasets
import numpy as np
import pytest
import torch
from tiny import IMAGE_SIZE, clip_config, make_model, make_pairs, picture, png, randomise
from transformers import CLIPImageProcessor

from gmail_hf import GmailCLIPModel, GmailConfig, embed_images
from gmail_hf.training import decoding, embeddings
from gmail_hf.training.data import GmailCollator, decode_image, undecoded
from gmail_hf.training.embeddings import cache_key, cached_embeds, embeds_array
from gmail_hf.training.preparation import EmbeddedPairs


@pytest.fixture
def forwards(monkeypatch):
    """Sizes of the batches that the model embeds."""
    sizes = []
    original = GmailCLIPModel.embed_images

    def counting(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        return original(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(GmailCLIPModel, "embed_images", counting)
    return sizes


def real_images(pairs):
    return [decode_image(cell) for cell in undecoded(pairs)["real_image"]]


# embed_images


@pytest.mark.parametrize("modality", ["real", "gen"])
def test_order_and_batch_size_do_not_matter(model, processor, pairs, modality):
    images = real_images(pairs)
    expected = []
    for image in images:
        pixel_values = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values, modality=modality).pooler_output[0]
        expected.append((features / features.norm()).detach().numpy())
    for size in (1, 5, 64):
        embeds = embed_images(model, processor, images, modality, batch_size=size)
        assert embeds.dtype == np.float32
        np.testing.assert_allclose(embeds, np.stack(expected), atol=1e-6)
    np.testing.assert_allclose(
        embed_images(model, processor.image_processor, iter(images), modality), embeds, atol=1e-6
    )


def test_embeds_in_evaluation_mode_and_restores_it(clip_folder, processor, pairs):
    model = make_model(clip_folder, lora_dropout=0.9).train()
    images = real_images(pairs)
    first = embed_images(model, processor, images, "gen")
    assert np.array_equal(first, embed_images(model, processor, images, "gen")) and model.training
    with pytest.raises(ValueError, match="Unknown modality"):
        embed_images(model, processor, images, "generated")
    assert model.training


@pytest.mark.parametrize("desc", [None, "Embedding"])
def test_bad_image_is_told_by_its_index(model, processor, desc):
    cells = [png(i, truncated=i == 4) for i in range(6)]
    with pytest.raises(ValueError, match="Image 4:"):
        embed_images(model, processor, cells, batch_size=3, desc=desc)


def test_no_images_give_an_empty_array(model, processor):
    assert embed_images(model, processor, []).shape == (0, 24)


# The cache


def test_cached_equals_fresh_and_is_read_again(model, processor, pairs, forwards):
    expected = embed_images(model, processor, real_images(pairs))
    forwards.clear()
    cached = cached_embeds(pairs, "real_image", model.train(), processor, batch_size=5)
    assert model.training and forwards == [5, 5, 2]
    np.testing.assert_allclose(embeds_array(cached), expected, atol=1e-6)
    again = cached_embeds(pairs, "real_image", model, processor)
    assert forwards == [5, 5, 2] and np.array_equal(embeds_array(again), embeds_array(cached))
    assert again.cache_files and cached.column_names == ["image_embeds"]  # on disk, not in memory


def test_selected_rows_have_their_own_embeddings(model, processor, pairs):
    whole = embeds_array(cached_embeds(pairs, "real_image", model, processor))
    some = cached_embeds(pairs.select([7, 2, 9]), "real_image", model, processor)
    np.testing.assert_allclose(embeds_array(some), whole[[7, 2, 9]], atol=1e-6)


def test_images_that_could_not_be_read_are_tried_again(model, processor, pairs, forwards, tmp_path, caplog):
    """A disk or a network that was away for a moment does not drop rows for good."""
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    features = datasets.Features({"real_image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"real_image": [str(path) for path in paths]}, features=features)
    read = decoding.image_content

    def away(cell):
        if cell["path"] == str(paths[2]):
            raise OSError("away")
        return read(cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "image_content", away)
        for _ in range(2):
            caplog.clear()
            cached = cached_embeds(rows, "real_image", model, processor)
            assert np.isnan(embeds_array(cached)).any(axis=1).tolist() == [False, False, True, False]
            assert forwards == [3] and caplog.text.count("row 2: ") == 1
        with pytest.raises(ValueError, match="row 2: .*away"):
            cached_embeds(rows, "real_image", model, processor, on_bad_image="error")
    again = cached_embeds(rows, "real_image", model, processor)
    np.testing.assert_allclose(embeds_array(again), embed_images(model, processor, map(str, paths)), atol=1e-6)
    assert again._fingerprint != cached._fingerprint


def test_embeddings_that_are_not_finite_are_not_cached(model, processor, pairs, forwards):
    bias = model.vision_model.encoder.layers[1].mlp.fc2.bias
    with torch.no_grad():
        bias[3] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match="row 0 is not finite.*float32"):
            cached_embeds(pairs, "real_image", model, processor, batch_size=5)
    assert forwards == [5, 5]


def base_weight(model, processor, pairs):
    with torch.no_grad():
        model.vision_model.encoder.layers[1].mlp.fc2.bias[3] += 1e-3
    return model, processor, pairs


def base_projection(model, processor, pairs):
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    return model, processor, pairs


def activation(model, processor, pairs):
    twin = GmailCLIPModel(GmailConfig.from_base_config(clip_config(hidden_act="gelu"))).eval()
    twin.load_state_dict(model.state_dict())
    return twin, processor, pairs


def precision(model, processor, pairs):
    return model.bfloat16(), processor, pairs


def processor_settings(model, processor, pairs):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return model, CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5, 0.5, 0.4]), pairs


def one_image(model, processor, pairs):
    cells = undecoded(pairs)["real_image"][:]
    cells[5] = png(999)
    features = datasets.Features({"real_image": datasets.Image()})
    return model, processor, datasets.Dataset.from_dict({"real_image": cells}, features=features)


def other_column(model, processor, pairs):
    return model, processor, pairs.select_columns(["generated_image"]).rename_column("generated_image", "real_image")


def order_of_rows(model, processor, pairs):
    return model, processor, pairs.select(range(len(pairs) - 1, -1, -1))


@pytest.mark.parametrize(
    "change",
    [base_weight, base_projection, activation, precision, processor_settings, one_image, other_column, order_of_rows],
)
def test_whatever_decides_the_embeddings_makes_a_new_key(model, processor, pairs, forwards, change):
    before = embeds_array(cached_embeds(pairs, "real_image", model, processor))
    forwards.clear()
    model, processor, pairs = change(model, processor, pairs)
    after = embeds_array(cached_embeds(pairs, "real_image", model, processor))
    assert sum(forwards) == len(pairs)
    assert not np.array_equal(before, after)


def test_other_adapters_share_the_cache(clip_folder, processor, pairs, forwards):
    model = make_model(clip_folder)
    cached_embeds(pairs, "real_image", model, processor)
    forwards.clear()
    cached_embeds(pairs, "real_image", randomise(model, seed=5), processor)
    cached_embeds(pairs, "real_image", make_model(clip_folder, lora_rank=2, text_lora=True), processor)
    assert not forwards


def test_trained_branch_is_cached_by_its_own_adapters(clip_folder, processor, pairs, forwards):
    model = make_model(clip_folder)
    cached = cached_embeds(pairs, "generated_image", model, processor, "gen")
    expected = embed_images(model, processor, pairs["generated_image"], "gen")
    np.testing.assert_allclose(embeds_array(cached), expected, atol=1e-6)
    forwards.clear()
    cached_embeds(pairs, "generated_image", model, processor, "gen")
    assert not forwards
    keys = {cache_key(undecoded(pairs), "generated_image", model, processor, name) for name in ("gen", "real")}
    keys.add(cache_key(undecoded(pairs), "generated_image", randomise(model, seed=5), processor, "gen"))
    stronger = make_model(clip_folder, lora_alpha=9)
    keys.add(cache_key(undecoded(pairs), "generated_image", stronger, processor, "gen"))
    assert len(keys) == 4


def test_image_file_that_changed_on_disk_makes_a_new_key(model, processor, tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    dataset = datasets.Dataset.from_dict({"real_image": paths}).cast_column("real_image", datasets.Image())
    before = embeds_array(cached_embeds(dataset, "real_image", model, processor))
    key = cache_key(undecoded(dataset), "real_image", model, processor)
    assert cache_key(undecoded(dataset), "real_image", model, processor) == key
    picture(50).save(tmp_path / "1.png")
    assert cache_key(undecoded(dataset), "real_image", model, processor) != key
    after = embeds_array(cached_embeds(dataset, "real_image", model, processor))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert not np.allclose(before[1], after[1], atol=1e-3)


def test_archive_that_changed_on_disk_makes_a_new_key(model, processor, tmp_path):
    paths = [f"zip://{i}.png::{tmp_path / 'images.zip'}" for i in range(3)]
    dataset = datasets.Dataset.from_dict({"real_image": paths}).cast_column("real_image", datasets.Image())
    embeds = []
    for seed in (0, 50):
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for i in range(3):
                archive.writestr(f"{i}.png", png(seed + i)["bytes"])
        embeds.append(embeds_array(cached_embeds(dataset, "real_image", model, processor)))
    assert np.isfinite(embeds).all() and not np.allclose(*embeds, atol=1e-3)


def test_interrupted_run_goes_on_with_the_next_shard(model, processor, pairs, monkeypatch, forwards):
    expected = embed_images(model, processor, real_images(pairs))
    monkeypatch.setattr(embeddings, "CACHE_SHARD_ROWS", 3)
    original = embeddings._embed
    forwards.clear()

    def interrupted(*args):
        if len(forwards) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(embeddings, "_embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_embeds(pairs, "real_image", model, processor)
    assert forwards == [3, 3] and not model.training
    monkeypatch.setattr(embeddings, "_embed", original)
    cached = cached_embeds(pairs, "real_image", model, processor)
    assert forwards == [3, 3, 3, 3]
    np.testing.assert_allclose(embeds_array(cached), expected, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_shards_of_several_processes_make_the_whole(model, processor, pairs, monkeypatch, forwards, world_size):
    monkeypatch.setattr(embeddings, "CACHE_SHARD_ROWS", 4)
    whole = embeds_array(cached_embeds(pairs, "real_image", model, processor))
    # Others first: whoever comes last has only its own shards left.
    datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE / "other"
    left = []

    def barrier_of(rank):
        return lambda: left.append((rank, sum(forwards)))

    forwards.clear()
    parts = []
    for rank in range(world_size):
        arguments = {"rank": rank, "world_size": world_size, "barrier": barrier_of(rank)}
        parts.append(embeds_array(cached_embeds(pairs, "real_image", model, processor, **arguments)))
    assert left[0] == (0, sum(4 for shard in range(3) if shard % world_size == 0))
    assert sum(forwards) == len(pairs)  # each image once, by whichever process came first
    for part in parts:
        np.testing.assert_array_equal(part, whole)


def test_unreadable_images_have_no_embedding(model, processor, caplog):
    pairs = make_pairs(6, bad_real=(1, 4))
    cached = cached_embeds(pairs, "real_image", model, processor, batch_size=2)
    assert [row is None for row in cached["image_embeds"]] == [False, True, False, False, True, False]
    assert "row 1" in caplog.text and "row 4" in caplog.text
    array = embeds_array(cached)
    assert np.isnan(array[[1, 4]]).all() and np.isfinite(array[[0, 2, 3, 5]]).all()
    batch = GmailCollator(processor)(EmbeddedPairs(pairs, cached).__getitems__(list(range(6))))
    assert batch["skipped_pairs"] == 2 and batch["real_embeds"].shape == (4, 24)
    np.testing.assert_array_equal(batch["real_embeds"].numpy(), array[[0, 2, 3, 5]])
    assert "id-1" in caplog.text and "id-4" in caplog.text


def test_unreadable_image_stops_under_error(model, processor, monkeypatch):
    monkeypatch.setattr(embeddings, "CACHE_SHARD_ROWS", 2)
    with pytest.raises(ValueError, match="row 4"):
        cached_embeds(make_pairs(6, bad_real=(4,)), "real_image", model, processor, on_bad_image="error")


# EmbeddedPairs


def test_partners_move_image_and_id_together(model, processor, pairs):
    cached = cached_embeds(pairs, "real_image", model, processor)
    array = embeds_array(cached)
    partners = np.random.default_rng(0).permutation(len(pairs))
    embedded = EmbeddedPairs(pairs, cached, partners=partners)
    assert len(embedded) == len(pairs)
    raw = undecoded(pairs)
    for i, row in enumerate(embedded.__getitems__(list(range(len(pairs))))):
        assert row.keys() == {"generated_image", "caption", "image_id", "real_embeds"}
        assert row["generated_image"] == raw[i]["generated_image"] and row["caption"] == raw[i]["caption"]
        assert row["image_id"] == f"id-{partners[i]}"
        np.testing.assert_array_equal(np.float32(row["real_embeds"]), array[partners[i]])
        assert embedded[i] == row
