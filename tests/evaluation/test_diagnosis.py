"""`gmail-hf diagnose`: the recommendation by what was found, and a whole run on tiny pairs."""

import json
import re

import datasets
import pytest
from tiny import make_model, make_pairs

from gmail_hf.commands import cli
from gmail_hf.commands.train import parse_args
from gmail_hf.evaluation import diagnosis
from gmail_hf.evaluation.diagnosis import AFTER, REAL_IMAGES, advise, describe_captions
from gmail_hf.metrics.train_on_generated import CORAL, GENERATED, MEAN_SHIFT

INSTANCES = {"kind": "instance-like", "captions": 90, "real_images_of_the_median_pairs_caption": 1.0}
CLASSES = {"kind": "class-like", "captions": 10, "real_images_of_the_median_pairs_caption": 90.0}


def table(probes: dict[str, float] | None = None, **separabilities: float) -> list[dict]:
    """Rows as of `diagnose`; `probes` are accuracies by row."""
    names = [GENERATED, MEAN_SHIFT, CORAL, *([AFTER] if "after" in separabilities else []), REAL_IMAGES]
    rows = [{"row": name, "separability": 0.5, "coverage": 0.9, "energy_distance": 0.2} for name in names]
    rows[0]["separability"] = separabilities.get("before", 0.8)
    if probes:
        for row in rows:
            row |= {"logistic_probe": probes[row["row"]], "nearest_centroid": 0.8}
    return rows


def probes(generated, shift, coral, real, **after):
    return {GENERATED: generated, MEAN_SHIFT: shift, CORAL: coral, REAL_IMAGES: real, **after}


@pytest.mark.parametrize(
    ("rows", "captions", "said", "recipe"),
    [
        (table(before=0.55), INSTANCES, "do not align", None),
        (table(before=0.8), INSTANCES, "--label_column", ["--recipe", "robust"]),
        (table(before=0.8), CLASSES, "class-like: 90 real images", ["--recipe", "robust", "--pairing", "none"]),
        (table(before=0.8), CLASSES | {"captions": 500}, "", ["--images_per_caption", "8"]),
        # Separable, but at no cost; within the noise of 1,000 test images.
        (table(probes(0.80, 0.80, 0.80, 0.805)), INSTANCES, "do not align", None),
        (table(probes(0.79, 0.80, 0.80, 0.802)), INSTANCES, "noise of 1000 test images", None),
        (table(probes(0.60, 0.65, 0.70, 0.80)), INSTANCES, "CORAL closes 50% of the gap (", ["--recipe", "robust"]),
        (table(probes(0.60, 0.79, 0.70, 0.80)), INSTANCES, "Try mean shift first", None),
        (
            table(probes(0.60, 0.65, 0.70, 0.80, **{AFTER: 0.75}), after=True),
            INSTANCES,
            "The gen branch closes 75% of the gap: use generated images through gen",
            None,
        ),
        (
            table(probes(0.60, 0.65, 0.70, 0.80, **{AFTER: 0.55}), after=True),
            CLASSES,
            "closes -25% of the gap, no more than CORAL",
            ["--recipe", "robust", "--pairing", "none"],
        ),
    ],
)
def test_advice(rows, captions, said, recipe):
    advice, options = advise(rows, captions, 1000)
    assert said in " ".join(advice)
    assert (options is None) == (recipe is None) and (options or [])[-len(recipe or []) :] == (recipe or [])


def test_little_coverage_is_said():
    rows = table()
    for row in rows[:-1]:
        row["coverage"] = 0.1
    assert "cover at most 10% of the real ones" in " ".join(advise(rows, INSTANCES, 0)[0])


def test_captions_by_real_images_not_by_rows():
    assert describe_captions(["a"] * 6 + ["b"], ["1"] * 7)["kind"] == "instance-like"  # several generated images
    found = describe_captions(["cat"] * 6 + ["dog"], list("123456") + ["7"])
    assert found == {"kind": "class-like", "captions": 2, "real_images_of_the_median_pairs_caption": 6.0}


@pytest.fixture
def folder(tmp_path, clip_folder, processor):
    """60 pairs of noise with labels, each real image twice; a model with a trained gen branch."""
    pairs = make_pairs(60, bad_real=(3,), captions=["a cat", "a dog"] * 30)
    pairs = pairs.add_column("kind", [[i % 2, i // 2 % 2] for i in range(60)])
    pairs = pairs.add_column("tags", [["new"] * (i % 3) for i in range(60)])
    ids = [f"id-{i % 50}" for i in range(60)]
    pairs.remove_columns("image_id").add_column("image_id", ids).save_to_disk(tmp_path / "pairs")
    make_model(clip_folder).save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    return tmp_path


def run(folder, model, *options) -> dict:
    out = folder / "out"
    cli.run(
        "diagnose", ["--model", str(model), "--dataset", str(folder / "pairs"), "--output_dir", str(out), *options]
    )
    return json.loads((out / "diagnosis.json").read_text())


def test_a_base(folder, clip_folder, capsys):
    result = run(folder, clip_folder, "--label_column", "kind")
    assert [row["row"] for row in result["rows"]] == [GENERATED, MEAN_SHIFT, CORAL, REAL_IMAGES]
    assert result["counts"]["pairs"] == 60 and result["counts"]["pairs embedded"] in (49, 50)  # row 53 has its id too
    assert all(set(diagnosis.SCORES) <= set(row) for row in result["rows"])
    assert result["captions"]["kind"] == "class-like"
    assert result["cosines"]["real_images_of_one_caption"] is not None
    examples = result["examples"]["most typical"]
    assert examples[0]["typicality"] >= examples[1]["typicality"]
    page = (folder / "out" / "report.html").read_text()
    assert page.count('<img class="small" src="data:image/webp;base64,') == 2 * 6 * 4 and "http" not in page
    assert re.search(
        r"two real images with different captions: -?0\.\d{3}; with the same caption: -?\d\.\d{3}\.</p>", page
    )
    printed = capsys.readouterr().out
    assert all(sentence in printed and sentence in page.replace("&#39;", "'") for sentence in result["advice"])


def test_captions_that_are_the_classes(folder, clip_folder):
    """One column can be both."""
    datasets.load_from_disk(folder / "pairs").rename_column("caption", "class").save_to_disk(folder / "classes")
    options = ["--dataset", str(folder / "classes"), "--caption_column", "class", "--label_column", "class"]
    result = run(folder, clip_folder, *options)
    assert "logistic_probe" in result["rows"][0] and result["settings"]["label_column"] == "class"


def test_one_caption_for_all_pairs(folder, clip_folder):
    make_pairs(40, captions=["a dog"] * 40).save_to_disk(folder / "pairs")
    result = run(folder, clip_folder)
    assert result["cosines"]["real_images_of_different_captions"] is None
    page = " ".join((folder / "out" / "report.html").read_text().split())
    cosine = result["cosines"]["real_images_of_one_caption"]
    assert f"Mean cosine of two real images with the same caption: {cosine:.3f}.</p>" in page


def test_a_generated_image_of_several_real_ones_is_used_once(folder, clip_folder):
    """Otherwise it would be in both halves, and in several folds of separability."""
    pairs = make_pairs(60)
    generated = datasets.Dataset.from_dict(
        {"generated_image": [pairs.data["generated_image"][i // 2].as_py() for i in range(60)]}
    ).cast_column("generated_image", datasets.Image())
    pairs = datasets.concatenate_datasets([pairs.remove_columns("generated_image"), generated], axis=1)
    pairs.save_to_disk(folder / "pairs")
    assert run(folder, clip_folder)["counts"] == {"pairs": 60, "pairs embedded": 30, "pairs measured": 15}


def test_a_generated_image_in_a_damaged_archive_is_unreadable(tmp_path, clip_folder, processor):
    (tmp_path / "all.zip").write_text("half a download")
    raw = make_pairs(40).cast_column("generated_image", datasets.Image(decode=False))
    cells = [{"bytes": None, "path": f"zip://0.png::{tmp_path / 'all.zip'}"}, *raw["generated_image"][1:]]
    pairs = raw.remove_columns("generated_image").add_column("generated_image", cells, feature=datasets.Image())
    found = diagnosis.diagnose(make_model(clip_folder), processor, pairs)
    assert found["counts"] == {"pairs": 40, "pairs embedded": 39, "pairs measured": 20}


def test_a_trained_model_is_measured_before_and_after(folder):
    before, _, _, after, _ = run(folder, folder / "trained", "--max_samples", "30")["rows"]
    assert after["row"] == AFTER and after["paired_cosine"] != before["paired_cosine"]
    assert "logistic_probe" not in before


def test_a_model_without_gen_is_measured_as_its_base(folder, clip_folder, processor):
    model = make_model(clip_folder, modalities=["real", "sd"], trainable_modalities=["sd"])
    found = diagnosis.diagnose(model, processor, datasets.load_from_disk(folder / "pairs"))
    assert [row["row"] for row in found["rows"]] == [GENERATED, MEAN_SHIFT, CORAL, REAL_IMAGES]


@pytest.mark.parametrize("name", ["base", "trained"])
def test_the_command_is_one_that_train_takes(name, folder, clip_folder, monkeypatch):
    recipe = ["--recipe", "robust", "--pairing", "none"]
    monkeypatch.setattr(diagnosis, "advise", lambda *_: (["Train."], recipe))
    pairs = datasets.load_from_disk(folder / "pairs")
    datasets.DatasetDict(train=pairs.select([0]), test=pairs).save_to_disk(folder / "splits")
    options = ["--dataset", str(folder / "splits"), "--split", "test", "--model_revision", "v2"]
    command = run(folder, clip_folder if name == "base" else folder / "trained", *options)["command"]
    model, data, training = parse_args([*command[2:], "--use_cpu", "--report_to", "none"])
    assert command[:2] == ["gmail-hf", "train"] and model.model == str(clip_folder)
    assert data.dataset == str(folder / "splits") and data.split == ("test" if name == "base" else "train")
    assert model.model_revision == ("v2" if name == "base" else None)
    assert (training.recipe, training.pairing) == ("robust", "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label_column", "class"], "no label column 'class'"),
        (["--label_column", "real_image"], "'real_image' does not hold classes"),
        (["--label_column", "tags"], "all lists need the same length"),
        (["--label_column", "image_id"], "No class of 'image_id' is in both halves"),
        (["--max_samples", "0"], "--max_samples must be at least 1"),
        (["--max_samples", "19"], "19 pairs with different real and different generated images can be read; at least"),
    ],
)
def test_mistakes(folder, clip_folder, options, message, capsys):
    with pytest.raises(SystemExit):
        run(folder, clip_folder, *options)
    assert message in capsys.readouterr().err
