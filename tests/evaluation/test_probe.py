"""Linear probes by `gmail-hf evaluate`: training images, branches, models without text."""

import json
import shutil

import numpy as np
import pytest
from benchmark_data import CLASS_NAMES, save_gmail, webp, write_captions, write_classes, write_webdataset
from datasets import Dataset, Image
from tiny import picture, randomise
from towers import make
from transformers import AutoProcessor, ViTImageProcessor

from gmail_hf import from_base
from gmail_hf.commands import evaluate
from gmail_hf.commands.bundled import BENCHMARKS, get_benchmark
from gmail_hf.evaluation import Settings, evaluate_probe, load_model, open_source, open_training
from gmail_hf.evaluation.embedding import image_embeds
from gmail_hf.metrics import tuned_probe
from gmail_hf.publishing.results import benchmark_results, results_text

LABELS = {"train": [0, 1, 2, 1] * 6, "test": [2, 0, 1, 1, 0, 2, 1], "validation": [1, 0, 2, 2, 0, 1, 0]}
FIRST = {"train": 0, "test": 100, "validation": 200}  # the seeds of images


@pytest.fixture(scope="module")
def wds(tmp_path_factory):
    """A data set with the splits train, test and validation."""
    folder = tmp_path_factory.mktemp("probe") / "wds"
    write_classes(folder)
    for split, labels in LABELS.items():
        samples = [{"webp": webp(FIRST[split] + i), "cls": str(label).encode()} for i, label in enumerate(labels)]
        write_webdataset(folder, samples, split, shards=2 if split != "train" else 1)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A CLIP with branches, and of two vision-only architectures a plain model and one with branches."""
    root = tmp_path_factory.mktemp("models")
    folders = {"gmail": save_gmail(root / "gmail")}
    for name in ("dinov2", "vit"):
        make(name).save_pretrained(root / name)
        randomise(from_base(root / name)).save_pretrained(root / f"gmail-{name}")
        for folder in (root / name, root / f"gmail-{name}"):
            ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
            folders[folder.name] = str(folder)
    return folders


@pytest.fixture
def run(models, wds, tmp_path):
    def main(model, *options, benchmark="dtd", dataset=wds):
        where = ["--model", models[model], "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
        data = ["--benchmarks", benchmark, "--dataset", f"{benchmark}={dataset}"]
        return evaluate.main([*where, *data, *map(str, options)])

    return main


def embed(loaded, split, modality):
    images = [picture(FIRST[split] + i) for i in range(len(LABELS[split]))]
    return image_embeds(loaded.model, loaded.processor, images, modality, Settings(batch_size=3), split)


@pytest.mark.parametrize(("name", "per_class"), [("dtd", False), ("pets", True)])
def test_probe_is_fitted_on_one_branch_and_scored_on_the_other(models, wds, name, per_class):
    loaded, benchmark = load_model(models["gmail"]), get_benchmark(name)
    found = open_training(benchmark, open_source(benchmark, str(wds)))
    settings = Settings("real", batch_size=4, train_modality="gen")
    measured = evaluate_probe(loaded.model, loaded.processor, found, settings)
    train, given = (embed(loaded, split, "gen") for split in ("train", "validation"))
    expected = tuned_probe(
        *(train, np.array(LABELS["train"]), embed(loaded, "test", "real"), np.array(LABELS["test"])),
        *(given, np.array(LABELS["validation"])),
        per_class=per_class,
    )
    assert measured.scores == {"top1": expected.top1, "mean_per_class": expected.mean_per_class}
    low, high = measured.intervals["top1"]
    assert low <= expected.top1 <= high
    assert measured.counts == {"images": 7, "classes": 3, "training images": 24, "validation images": 7}


def test_the_protocol_says_which_accuracy_counts():
    by_class = [name for name, benchmark in BENCHMARKS.items() if benchmark.per_class]
    assert by_class == ["aircraft", "pets", "caltech101"]


@pytest.mark.parametrize("model", ["dinov2", "vit", "gmail-dinov2"])
def test_models_without_text_are_probed(run, models, wds, model):
    result = run(model)["dtd"]
    assert list(result["tasks"]) == ["probe"]
    assert result["dataset"]["train"] == {
        **{"name": str(wds), "revision": result["dataset"]["revision"], "split": "train"},
        **{"modality": "real", "probe": "logistic"},
    }
    # The real branch is the base, and so are its scores.
    plain = load_model(models[model.removeprefix("gmail-")])
    (train, labels), (test, right), (given, theirs) = (
        (embed(plain, split, "real"), np.array(LABELS[split])) for split in ("train", "test", "validation")
    )
    expected = tuned_probe(train, labels, test, right, given, theirs)
    assert result["tasks"]["probe"]["scores"]["top1"] == expected.top1


def test_a_clip_is_probed_where_asked(run):
    assert list(run("gmail")["dtd"]["tasks"]) == ["zero_shot"]
    with pytest.raises(FileExistsError, match="dataset.train.probe: None -> sgd"):
        run("gmail", "--probe", "sgd")


def test_generated_training_images(run, wds, tmp_path):
    """Class folders without splits; nothing is left for validation, so a part is held out."""
    for number in range(15):
        folder = tmp_path / "generated" / CLASS_NAMES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(300 + number).save(folder / f"{number}.png")
    (tmp_path / "generated" / "classnames.txt").write_text("bird\ncat\ndog\n")
    options = ["--probe", "sgd", "--train_dataset", f"dtd={tmp_path / 'generated'}", "--train_modality", "gen"]
    with pytest.raises(ValueError, match="have different classes, or a different order"):
        run("gmail", *options)
    shutil.copytree(wds, tmp_path / "sorted")
    (tmp_path / "sorted" / "classnames.txt").write_text("bird\ncat\ndog\n")
    result = run("gmail", *options, dataset=tmp_path / "sorted")["dtd"]
    assert list(result["tasks"]) == ["zero_shot", "probe"]
    counts = result["tasks"]["probe"]["counts"]
    assert counts == {"images": 7, "classes": 3, "training images": 15, "validation images": 0}
    train = result["dataset"]["train"]
    assert (train["split"], train["modality"], train["probe"]) == ("all", "gen", "sgd")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| DTD | Linear probe | top-1 |" in report and "7 images, 3 classes, 15 training images |" in report
    page = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert "sgd, trained on <code>generated</code>, all, through <code>gen</code>" in page
    kept = json.loads((tmp_path / "out" / "dtd.json").read_text())
    text = results_text([kept])
    assert "photographs through `real`; probe (`sgd`) on `generated`, split `all`, through `gen`." in text
    conditions = {entry.task_type: entry.metric_args for entry in benchmark_results(kept)}
    assert conditions["zero-shot-image-classification"] is None
    expected = {"train_dataset": "generated", "train_modality": "gen", "probe": "sgd"}
    assert conditions["image-classification"] == expected


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("folders", "has no folder 'train'"),
        ("other splits", "has no folder 'train'"),
        ("tars", "has no split 'train'; it has"),
        ("table", "has no split 'test'; it has"),
    ],
)
def test_images_that_are_scored_are_never_trained_on(tmp_path, kind, reason):
    """A data set with one split, or without splits, is no training split of itself."""
    place = tmp_path / "photos"
    if kind in ("folders", "other splits"):
        for split in (".",) if kind == "folders" else ("test", "holdout"):
            for number, name in enumerate(CLASS_NAMES):
                (place / split / name).mkdir(parents=True)
                picture(number).save(place / split / name / f"{number}.png")
        (place / "classnames.txt").write_text("\n".join(CLASS_NAMES))
    else:
        write_classes(place)
        (place / "train" / "0.tar").unlink()
    if kind == "table":
        rows = Dataset.from_dict({"cls": [0, 1], "image": [webp(0), webp(1)]}).cast_column("image", Image())
        (place / "test" / "0.tar").unlink()
        (place / "test" / "1.tar").unlink()
        rows.to_parquet(place / "rows.parquet")
    benchmark = get_benchmark("dtd")
    source = open_source(benchmark, str(place))
    for dataset in (None, str(place), f"{place}/"):
        with pytest.raises(
            ValueError, match=f"separate from .* {reason}.* Pass them with --train_dataset dtd=DATASET"
        ):
            open_training(benchmark, source, dataset)


def test_validation_images_have_the_classes_of_the_others(tmp_path):
    """Without classnames.txt, each split numbers its own folders."""
    for split, names in {"train": CLASS_NAMES, "test": CLASS_NAMES, "val": CLASS_NAMES[1:]}.items():
        for number, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            picture(number).save(tmp_path / split / name / "0.png")
    benchmark = get_benchmark("dtd")
    with pytest.raises(ValueError, match=r"The validation images .* different classes, .*: \['cat'\]. Use the same"):
        open_training(benchmark, open_source(benchmark, str(tmp_path)))
    (tmp_path / "classnames.txt").write_text("\n".join(CLASS_NAMES))
    found = open_training(benchmark, open_source(benchmark, str(tmp_path)))
    assert [row["cls"] for row in found.validation.read()] == [2, 1]  # bird, dog


def test_training_images_are_no_validation_images(wds, tmp_path):
    """If the only split of the training images is called validation."""
    images = Dataset.from_dict({"cls": [0, 1, 2], "image": [webp(i) for i in range(3)]}).cast_column("image", Image())
    (tmp_path / "own").mkdir()
    images.to_parquet(tmp_path / "own" / "validation.parquet")
    shutil.copy(wds / "classnames.txt", tmp_path / "own")
    benchmark = get_benchmark("dtd")
    found = open_training(benchmark, open_source(benchmark, str(wds)), str(tmp_path / "own"))
    assert found.train.split == "validation" and found.validation is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_dataset", "dtd={wds}"], "dtd has training images, but no probe: add --probe logistic"),
        (["--train_modality", "gen"], "--train_modality needs a probe"),
        (["--train_dataset", "cars={wds}"], r"--train_dataset must be NAME=DATASET with NAME from \['dtd'\]"),
        (["--probe", "logistic", "--train_modality", "fake"], "has no branch 'fake'"),
        (["--probe", "knn"], "invalid choice: 'knn'"),
    ],
)
def test_mistakes(run, wds, options, message):
    with pytest.raises(ValueError, match=message):
        run("gmail", *(option.format(wds=wds) for option in options))


def test_a_model_without_text_cannot_retrieve(run, tmp_path):
    place = write_captions(tmp_path / "captions", [["a"], ["b"]])
    with pytest.raises(ValueError, match="coco needs a CLIP, but .*dinov2' is not one"):
        run("dinov2", benchmark="coco", dataset=place)


def test_the_processor_of_a_model_without_text(models):
    assert not hasattr(AutoProcessor.from_pretrained(models["dinov2"]), "tokenizer")
