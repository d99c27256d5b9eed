"""Curation: decisions worked out by hand, the mask and its checks, and the command on tiny images."""

import importlib
import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import CAPTIONS, IMAGE_SIZE, make_clip, make_pairs, picture, png
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gmail_hf import GmailCLIPModel
from gmail_hf.commands import cli
from gmail_hf.generation import apply_mask, choosing, curate, read_mask, write_mask
from gmail_hf.generation.choosing import CONSTANT, DUPLICATE, MISMATCH, NOT_BEST, REAL_COPY, UNREADABLE


def at(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


SCORER = 9  # the seed of a tiny CLIP whose embeddings of noise and captions have positive cosines
CLOSE = float(np.cos(np.radians(5)))  # images within 5 degrees are copies


def test_a_duplicate_is_one_of_an_image_that_is_kept(monkeypatch):
    embeds = at(0, 4, 8, 90, 91, 180)
    # 8 is near 4, but not near 0, which is kept.
    expected = [-1, 0, -1, -1, 3, -1]
    assert choosing.near_duplicates(embeds, CLOSE).tolist() == expected
    assert choosing.near_duplicates(embeds[[1, 0, 2, 4, 3, 5]], CLOSE).tolist() == [-1, 0, 0, -1, 3, -1]
    monkeypatch.setattr("gmail_hf.metrics._checks.BLOCK", 2)
    assert choosing.near_duplicates(embeds, CLOSE).tolist() == expected


def test_duplicates_against_a_loop(monkeypatch):
    monkeypatch.setattr("gmail_hf.metrics._checks.BLOCK", 7)
    embeds = np.random.default_rng(0).normal(size=(60, 3))
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    kept, duplicates = [], set()
    for row in range(60):
        near = any(embeds[row] @ embeds[other] >= 0.9 for other in kept)
        duplicates.add(row) if near else kept.append(row)
    found = choosing.near_duplicates(embeds, 0.9)
    assert set(np.flatnonzero(found >= 0)) == duplicates and len(duplicates) > 10
    assert all(embeds[row] @ embeds[found[row]] >= 0.9 and found[row] in kept for row in duplicates)


def test_wrong_captions_are_of_other_images_with_another_caption():
    texts = np.eye(4)[[0, 0, 1, 2]]
    images = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [2, 1, 2, 0], [0, 1, 0, 1]], float)
    scores = choosing.mismatched_scores(images, texts, ["a", "a", "b", "c"])
    norms = np.linalg.norm(images, axis=1)
    allowed = [{2, 3}, {2, 3}, {2}, {0, 1}]
    for score, values, norm in zip(scores, allowed, norms, strict=True):
        assert any(score == pytest.approx(2.5 * value / norm) for value in values)
    assert len(choosing.mismatched_scores(images, texts, ["a"] * 4)) == 0


def test_each_reason_of_a_hand_worked_set():
    embeds = at(0, 40, 80, 83, 120, 160, 200, 240)
    embeds[1] = np.nan
    states = [None, UNREADABLE, None, None, CONSTANT, None, None, None]
    scores = np.array([0.9, np.nan, 0.7, 0.8, 0.9, 0.2, 0.6, 0.5])
    captions = ["a", "a", "b", "b", "b", "c", "d", "d"]
    options = {"duplicate_threshold": CLOSE, "min_clip_score": 0.3, "best_k": 1}
    reasons, copy_of = choosing.choose(states, embeds, at(300, 2), scores, captions, **options)
    assert reasons == [REAL_COPY, UNREADABLE, DUPLICATE, None, CONSTANT, MISMATCH, None, NOT_BEST]
    assert copy_of.tolist() == [1, -1, 3, -1, -1, -1, -1, -1]  # the better one of 80 and 83 degrees is kept
    # Without scores, copies alone, and the first one is kept.
    reasons, copy_of = choosing.choose(states, embeds, duplicate_threshold=CLOSE)
    assert reasons == [None, UNREADABLE, None, DUPLICATE, CONSTANT, None, None, None] and copy_of[3] == 2


def test_an_image_in_several_rows_is_one_image():
    embeds, scores = at(0, 0, 90, 90), np.array([0.5, 0.6, 0.4, 0.4])
    first_rows = np.array([0, 0, 2, 2])
    options = {"scores": scores, "captions": ["a"] * 4, "first_rows": first_rows, "duplicate_threshold": CLOSE}
    assert choosing.choose([None] * 4, embeds, **options)[0] == [None] * 4
    assert choosing.choose([None] * 4, embeds, best_k=1, **options)[0] == [None, None, NOT_BEST, NOT_BEST]
    embeds[2:] = embeds[:2]  # both rows of the second image share its fate
    reasons, copy_of = choosing.choose([None] * 4, embeds, **options)
    assert reasons == [None, None, DUPLICATE, DUPLICATE] and copy_of.tolist() == [-1, -1, 1, 1]


def set_of(count: int = 12, **cells) -> datasets.Dataset:
    """Generated images of noise; `cells` by row replace some."""
    pairs = make_pairs(count)
    images = pairs.cast_column("generated_image", datasets.Image(decode=False))["generated_image"][:]
    for row, cell in cells.items():
        images[int(row.removeprefix("row"))] = cell
    rest = pairs.remove_columns(["generated_image", "real_image"])
    features = datasets.Features(generated_image=datasets.Image())
    images = datasets.Dataset.from_dict({"generated_image": images}, features=features)
    return datasets.concatenate_datasets([rest, images], axis=1)


def flat(level: int) -> dict:
    noise = np.random.default_rng(0).integers(0, 3, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return datasets.Image().encode_example(Image.fromarray(noise + np.uint8(level)))


def almost(seed: int) -> dict:
    """The image of a seed with one pixel changed."""
    image = picture(seed)
    image.putpixel((0, 0), (0, 0, 0))
    return datasets.Image().encode_example(image)


def reasons_of(dataset, clip_folder, processor, **options) -> list:
    model = GmailCLIPModel.from_clip(clip_folder)
    return curate(model, processor, dataset, **{"duplicate_threshold": 0.999, "min_clip_score": 0.0, **options})[1]


def test_planted_images_are_found(clip_folder, processor, tmp_path):
    dataset = set_of(row2=flat(100), row4=png(9, truncated=True), row6=almost(3), row7=almost(20), row9=None)
    real = make_pairs(12).select_columns(["real_image"])  # seeds 0, 2, 4, ...
    mask = reasons_of(dataset, clip_folder, processor, real_images=real)
    found = {row: reason for row, reason in enumerate(mask["reason"].to_pylist()) if reason}
    copies = mask["copy_of"].to_pylist()
    scores = mask["clip_score"].to_numpy(zero_copy_only=False)
    better = max(1, 6, key=lambda row: scores[row])
    assert found == {2: CONSTANT, 4: UNREADABLE, 7 - better: DUPLICATE, 7: REAL_COPY, 9: UNREADABLE}
    assert copies[7 - better] == better and copies[7] == 10
    assert mask["kept"].to_pylist() == [row not in found for row in range(12)]
    assert np.isnan(scores[[2, 4, 9]]).all() and np.isfinite(np.delete(scores, [2, 4, 9])).all()
    write_mask(mask, tmp_path / "mask.parquet", {})
    assert len(apply_mask(dataset, tmp_path / "mask.parquet")) == 12 - len(found)


def test_a_wrong_caption_is_found_by_the_other_model(clip_folder, processor, tmp_path):
    """The model that scores is the one given: here one that knows a caption for each level of red."""
    reds = [0, 1, 2, 3] * 3
    captions = [CAPTIONS[red] for red in reds]
    captions[5] = CAPTIONS[3]
    rng = np.random.default_rng(0)
    cells = [
        datasets.Image().encode_example(
            Image.fromarray(np.uint8([60 * red, 0, 0] + rng.integers(0, 30, (IMAGE_SIZE, IMAGE_SIZE, 3))))
        )
        for red in reds
    ]
    dataset = set_of(12, **{f"row{row}": cell for row, cell in enumerate(cells)})
    dataset = dataset.remove_columns("caption").add_column("caption", captions)

    class RedModel(GmailCLIPModel):
        def embed_images(self, pixel_values, modality=None, **images):
            level = pixel_values[:, 0].mean(dim=(1, 2))
            levels = level.new_tensor([((60 * red + 14.5) / 255 - 0.48145466) / 0.26862954 for red in range(4)])
            nearest = (level[:, None] - levels).abs().argmin(dim=1)
            return level.new_zeros(len(level), self.embed_dim).scatter_(1, nearest[:, None], 1)

        def get_text_features(self, input_ids, attention_mask=None):
            known = processor.tokenizer(list(CAPTIONS), padding=True, return_tensors="pt")["input_ids"]
            same = [[row[row != 513].tolist() == other[other != 513].tolist() for other in known] for row in input_ids]
            nearest = input_ids.new_tensor(same).int().argmax(dim=1)
            texts = input_ids.new_zeros(len(input_ids), self.embed_dim).float()
            return BaseModelOutputWithPooling(pooler_output=texts.scatter_(1, nearest[:, None], 1))

    make_clip(seed=5).save_pretrained(tmp_path)
    model, scorer = GmailCLIPModel.from_clip(clip_folder), RedModel.from_clip(tmp_path)
    options = {"duplicate_threshold": 1.0, "score_model": scorer, "score_processor": processor}
    result, mask = curate(model, processor, dataset, min_clip_score=1.0, **options)
    assert [row for row, reason in enumerate(mask["reason"].to_pylist()) if reason == MISMATCH] == [5]
    assert mask["clip_score"].to_pylist()[4:6] == [2.5, 0.0]
    assert result["clip_score"]["mean"] == pytest.approx(2.5 * 11 / 12) and result["clip_score"]["mean_of_kept"] == 2.5


def test_the_default_threshold_leaves_out_what_fits_no_better_than_other_captions(processor, tmp_path):
    make_clip(SCORER).save_pretrained(tmp_path)
    result, mask = curate(GmailCLIPModel.from_clip(tmp_path), processor, set_of(40), duplicate_threshold=1.0)
    scores, threshold = mask["clip_score"].to_numpy(), result["clip_score"]["threshold"]
    assert [reason == MISMATCH for reason in mask["reason"].to_pylist()] == (scores < threshold).tolist()
    assert result["dropped"][MISMATCH] > 0 and not result["clip_score"]["threshold_given"] and result["same_model"]


def test_one_image_for_several_captions_and_several_photographs(clip_folder, processor):
    """Rows that name an image several times are no duplicates; copies of it under other ids are."""
    cell = png(1)
    dataset = set_of(6, row2=cell, row3=cell, row4=cell)  # row 0 is this image too
    for column, values in (
        ("image_id", ["a", "b", "a", "c", "d", "e"]),
        ("caption", ["x", "y", "z", "x", "w", "v"]),
    ):
        dataset = dataset.remove_columns(column).add_column(column, values)
    reasons = reasons_of(dataset, clip_folder, processor)["reason"].to_pylist()
    assert [reasons[row] is None for row in (0, 2)] in ([True, True], [False, False])  # one image
    assert sum(reason == DUPLICATE for reason in reasons) >= 2
    paired = datasets.concatenate_datasets([dataset, make_pairs(6).select_columns(["real_image"])], axis=1)
    reasons = reasons_of(paired, clip_folder, processor)["reason"].to_pylist()
    assert len({reasons[row] for row in (0, 2, 3)}) == 1  # row 3: another photograph of caption x


@pytest.fixture
def mask_file(tmp_path, clip_folder, processor):
    mask = reasons_of(set_of(row3=flat(10)), clip_folder, processor)
    write_mask(mask, tmp_path / "mask.parquet", {"dataset": "here"})
    return tmp_path / "mask.parquet"


def test_a_mask_selects_the_rows_it_was_made_for(mask_file, tmp_path):
    dataset = set_of(row3=flat(10))
    kept = apply_mask(dataset, mask_file)
    assert kept["image_id"][:] == [f"id-{row}" for row in range(12) if row != 3]
    assert len(apply_mask(dataset.select(range(6)), mask_file)) == 5  # --max_train_samples
    folder = tmp_path / "images"
    folder.mkdir()
    raw = dataset.cast_column("generated_image", datasets.Image(decode=False))
    paths = [folder / f"{row}.png" for row in range(12)]
    for path, row in zip(paths, raw, strict=True):
        path.write_bytes(row["generated_image"]["bytes"])
    files = datasets.Dataset.from_dict({"generated_image": list(map(str, paths))})
    assert len(apply_mask(files.cast_column("generated_image", datasets.Image()), mask_file)) == 11
    settings = pq.read_schema(mask_file).metadata[b"gmail_hf"]
    assert json.loads(settings) == {"dataset": "here"} and read_mask(mask_file).num_rows == 12


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda: set_of(13), "'here' has 13 rows, but '.*' is for 12"),
        (lambda: set_of(row3=flat(10), row8=png(99)), "Row 8 of 'here' has another image"),
        (lambda: set_of(row3=flat(10)).select(range(11, -1, -1)), "Row 0 of 'here' has another image"),
        (lambda: set_of(row3=flat(10)).select([3]), "Row 0"),
        (lambda: set_of().remove_columns("generated_image"), "needs a column 'generated_image'"),
    ],
)
def test_a_mask_of_other_data_is_refused(mask_file, dataset, message):
    with pytest.raises(ValueError, match=message):
        apply_mask(dataset(), mask_file, name="'here'")


def test_a_mask_that_keeps_nothing_and_files_that_are_none(tmp_path, clip_folder, processor):
    mask = reasons_of(set_of(), clip_folder, processor, min_clip_score=2.5)
    write_mask(mask, tmp_path / "none.parquet", {})
    with pytest.raises(ValueError, match="keeps none of the 12 rows"):
        apply_mask(set_of(), tmp_path / "none.parquet")
    set_of().to_parquet(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match="is not a mask"):
            read_mask(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duplicate_threshold": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"best_k": 0}, "best_k must be at least 1"),
    ],
)
def test_mistakes(clip_folder, processor, options, message):
    with pytest.raises(ValueError, match=message):
        reasons_of(set_of(4), clip_folder, processor, **options)


@pytest.fixture
def folder(tmp_path, clip_folder, processor):
    """Pairs on disk with planted images, and another CLIP."""
    pairs = make_pairs(24, bad_generated=(5,))
    raw = pairs.cast_column("generated_image", datasets.Image(decode=False))
    images = raw["generated_image"][:]
    images[6], images[7] = images[1], flat(200)
    pairs = pairs.remove_columns("generated_image").add_column("generated_image", images)
    pairs.cast_column("generated_image", datasets.Image()).save_to_disk(tmp_path / "pairs")
    make_clip(SCORER).save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    return tmp_path


def test_the_command_and_a_training_on_what_it_keeps(folder, clip_folder, capsys, monkeypatch):
    base, pairs, out = ["--model", str(clip_folder)], str(folder / "pairs"), folder / "curated"
    options = ["--score_model", str(folder / "other"), "--min_clip_score", "0", "--duplicate_threshold", "0.999"]
    cli.run("curate", [*base, "--dataset", pairs, "--output_dir", str(out), *options])
    result = json.loads((out / "curation.json").read_text())
    assert result["dropped"] == dict.fromkeys(choosing.IN_WORDS, 0) | {UNREADABLE: 1, CONSTANT: 1, DUPLICATE: 1}
    assert not result["same_model"] and result["real_images"] == 24
    page = (out / "report.html").read_text()
    assert "Left out: all pixels are alike" in page and "copy of row" in page and "http" not in page
    assert "21 of 24 generated images are kept" in capsys.readouterr().out

    train = ["--use_cpu", "--max_steps", "1", "--report_to", "none", "--output_dir", str(folder / "run")]
    train += [*base, "--per_device_train_batch_size", "21", "--curated", str(out / "mask.parquet")]
    make_pairs(24, seed=50).save_to_disk(folder / "others")
    with pytest.raises(SystemExit):
        cli.run("train", ["--dataset", str(folder / "others"), *train])
    assert "Row 0 of Split 'train' of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run("train", ["--dataset", pairs, *train[:-1], str(out / "no.parquet")])
    assert "There is no mask" in capsys.readouterr().err
    cli.run("train", ["--dataset", pairs, *train])
    state = json.loads((folder / "run" / "trainer_state.json").read_text())
    assert state["epoch"] == 1  # one batch of the 21 rows


def test_a_folder_of_generated_images_with_captions(tmp_path, processor, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        picture(i if i else 3).save(folder / f"{i}.png")  # 0 and 3 are equal files
        (folder / f"{i}.txt").write_text(CAPTIONS[i % 2])
    photographs = tmp_path / "photographs" / "all"
    photographs.mkdir(parents=True)
    picture(6).save(photographs / "a.png")
    make_clip(SCORER).save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    options = ["--output_dir", str(tmp_path / "out"), "--real_dataset", str(tmp_path / "photographs")]
    options += ["--duplicate_threshold", "0.999", "--min_clip_score", "0", "--best_k", "2"]
    cli.run("curate", ["--model", str(tmp_path / "clip"), "--dataset", str(folder), *options])
    rows = pq.read_table(tmp_path / "out" / "mask.parquet").to_pylist()
    by_name = {row["file_name"]: row["reason"] for row in rows}
    assert by_name["6.png"] == REAL_COPY and [by_name["0.png"], by_name["3.png"]].count(DUPLICATE) == 1
    for caption in CAPTIONS[:2]:
        of_caption = [row for row in rows if row["caption"] == caption and row["reason"] in (None, NOT_BEST)]
        kept = {row["clip_score"] for row in of_caption if row["kept"]}
        assert len(kept) == 2 and all(row["kept"] or row["clip_score"] <= min(kept) for row in of_caption)
    assert json.loads((tmp_path / "out" / "curation.json").read_text())["same_model"]
    assert "does not see its own mistakes" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "default"), [("curate", "curated"), ("diagnose", "diagnosis")])
def test_an_output_folder_among_the_images_is_refused(command, default, tmp_path, monkeypatch, capsys):
    """The mask and the JSON would be read as tables of the data set."""
    picture(0).save(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    for options in (["--dataset", "."], ["--dataset", str(tmp_path), "--output_dir", f"sub/{default}"]):
        with pytest.raises(SystemExit):
            cli.run(command, ["--model", "x", *options])
        assert f"{default}' is inside '{options[1]}', which this command reads" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]


@pytest.mark.parametrize(
    ("command", "first_use"),
    [("caption", "gmail_hf.captioners.check_captions"), ("vlm", "gmail_hf.commands.bundled.conversations")],
)
def test_stage_2_gets_the_rows_that_are_kept(mask_file, tmp_path, command, first_use, monkeypatch):
    class Reached(Exception):
        pass

    def reached(rows, *_, **__):
        raise Reached(len(rows))

    monkeypatch.setattr(first_use, reached)
    paired = datasets.concatenate_datasets(
        [set_of(row3=flat(10)), make_pairs(12).select_columns(["real_image"])], axis=1
    )
    paired.save_to_disk(tmp_path / "pairs")
    main = importlib.import_module(f"gmail_hf.commands.{command}").main
    options = ["--model", "x", "--text_model", "x", "--dataset", str(tmp_path / "pairs"), "--eval_split", "train"]
    options += ["--use_cpu", "true", "--output_dir", str(tmp_path / command), "--curated", str(mask_file)]
    with pytest.raises(Reached, match="11"):
        main(options)
    with pytest.raises(Reached, match="11"):  # the upper bound on the same rows
        main([*options, "--modality", "real", "--image_column", "real_image"])
