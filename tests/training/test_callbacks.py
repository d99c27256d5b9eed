"""Pictures in the trackers: read back from what they wrote."""

import json
import logging
import sqlite3
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import assert_equal, make_model, make_pairs, make_processor, weights

from gmail_hf import GmailTrainer, embed_images
from gmail_hf.metrics import plot_embeddings, plot_pairs

HELD_OUT = make_pairs(16, seed=100, bad_real=(3,))


@pytest.fixture
def train_with_figures(clip_folder, arguments):
    """Two evaluations in four steps, held-out pairs of which one cannot be read."""

    def run(pairs=HELD_OUT, **fields):
        trainer = GmailTrainer(
            model=make_model(clip_folder),
            args=arguments(**{"eval_strategy": "steps", "eval_steps": 2, "log_figures": True, **fields}),
            train_dataset=make_pairs(8),
            eval_dataset=pairs,
            processing_class=make_processor(),
        )
        trainer.train()
        return trainer

    return run


@pytest.fixture
def expected():
    """The pictures that a trained model's held-out pairs give, drawn by themselves."""

    def draw(trainer):
        readable = [row for row in range(16) if row != 3]
        pairs = make_pairs(16, seed=100).select(readable)
        real, generated = pairs["real_image"][:], pairs["generated_image"][:]
        size = trainer.args.per_device_eval_batch_size  # other batches round differently, which t-SNE magnifies
        embeds = [
            embed_images(trainer.model, make_processor(), images, modality, batch_size=size)
            for images, modality in ((real, "real"), (generated, "real"), (generated, "gen"))
        ]
        pictures = {}
        for name, plot, data in (
            ("embeddings", plot_embeddings, embeds),
            ("pairs", plot_pairs, (real[:12], generated[:12], pairs["caption"][:12])),
        ):
            plot(buffer := BytesIO(), *data)
            pictures[name] = np.asarray(Image.open(buffer).convert("RGB"))
        return pictures

    return draw


@pytest.mark.integration
def test_tensorboard(train_with_figures, expected, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = train_with_figures(report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0}).Reload()
    assert {"eval/embeddings", "eval/pairs"} == set(events.Tags()["images"])
    assert [event.step for event in events.Images("eval/embeddings")] == [2, 4]
    assert [event.step for event in events.Images("eval/pairs")] == [2]
    for name, picture in expected(trainer).items():
        logged = Image.open(BytesIO(events.Images(f"eval/{name}")[-1].encoded_image_string))
        np.testing.assert_array_equal(np.asarray(logged), picture)
    assert "eval/paired_cosine" in events.Tags()["scalars"]


def test_tensorboard_logs_beside_the_model_from_the_first_evaluation(clip_folder, arguments, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    args = arguments(report_to="tensorboard", output_dir="run")
    trainer = GmailTrainer(
        make_model(clip_folder), args, make_pairs(8), make_pairs(8), processing_class=make_processor()
    )
    trainer.evaluate()
    trainer.train()
    logs = {path.parents[2] for path in tmp_path.rglob("events.out.*")}
    assert logs == {tmp_path / "run"}


@pytest.mark.integration
def test_the_figure_keeps_pairs_of_a_real_image_in_one_fold(train_with_figures, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    drawn, ids = [], [f"id-{i // 2}" for i in range(16)]

    def spy(path, *embeds, **options):
        drawn.append(options)
        plot_embeddings(path, *embeds, **options)

    monkeypatch.setattr("gmail_hf.training.callbacks.plot_embeddings", spy)
    pairs = HELD_OUT.remove_columns("image_id").add_column("image_id", ids)
    train_with_figures(pairs, report_to="tensorboard", eval_steps=4)
    assert drawn == [{"image_ids": ids[:3] + ids[4:]}]


@pytest.mark.integration
def test_training_does_not_notice(train_with_figures, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    drawn = train_with_figures(report_to="tensorboard")
    plain = train_with_figures(log_figures=False)
    assert_equal(weights(drawn), weights(plain))


def test_a_picture_that_fails_costs_no_training(train_with_figures, tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    plain = train_with_figures(log_figures=False)

    def fail(*args, **options):
        raise ValueError("Input contains NaN.")

    monkeypatch.setattr("gmail_hf.training.callbacks.plot_embeddings", fail)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("gmail_hf"), "propagate", True)
    drawn = train_with_figures(report_to="tensorboard")
    assert drawn.state.global_step == 4
    assert_equal(weights(drawn), weights(plain))
    assert "The figures of the evaluation at step 2 were not logged: ValueError('Input contains NaN.')" in caplog.text


def test_wandb(train_with_figures, expected, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = train_with_figures(report_to="wandb")
    summary, folder = dict(wandb.run.summary), Path(wandb.run.dir)
    wandb.finish()
    assert len(list(folder.rglob("*.png"))) == 3  # two evaluations, and the pairs once
    for name, picture in expected(trainer).items():
        path = folder / summary[f"eval/{name}"]["path"]
        np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), picture)


def test_trackio(train_with_figures, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    trainer = train_with_figures(report_to="trackio", project="figures", run_name="run")
    database = next((tmp_path / "trackio").rglob("*.db"))
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    pictures = [row for row in rows if "eval/embeddings" in row]
    assert [row["train/global_step"] for row in pictures] == [2, 4] and "eval/pairs" in pictures[0]
    shown = {"embeddings": pictures[-1]["eval/embeddings"], "pairs": pictures[0]["eval/pairs"]}
    for name, picture in expected(trainer).items():
        path = next((tmp_path / "trackio").rglob(Path(shown[name]["file_path"]).name))
        np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), picture)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"report_to": "none"}, ValueError, "needs 'tensorboard'"),
        ({"pairs": make_pairs(9)}, ValueError, "needs 10 readable pairs, got 9"),
        ({"pairs": {"one": make_pairs(12), "two": make_pairs(12)}}, TypeError, "one `datasets.Dataset`, got dict"),
        ({"pairs": None, "eval_strategy": "no"}, ValueError, "pass `eval_dataset`, or --eval_split"),
        ({"pairs": make_pairs(12).to_iterable_dataset()}, TypeError, "got IterableDataset"),
    ],
    ids=["no tracker", "few pairs", "several", "no pairs", "streamed"],
)
def test_mistakes_are_told_before_training(train_with_figures, fields, error, message):
    pytest.importorskip("tensorboard")
    with pytest.raises(error, match=message):
        train_with_figures(**{"report_to": "tensorboard", **fields})
