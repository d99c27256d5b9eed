"""`gmail-hf embed`: the values of both formats, an interrupted run, images that cannot be read, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from tiny import make_model, make_pairs, picture

from gmail_hf import GmailCLIPModel, decode_image, embed_images, fit_detector
from gmail_hf.commands import embed
from gmail_hf.training import embeddings

NAMES = [f"{'deep/er/' if i % 3 == 0 else ''}{i:02d}.{'JPG' if i % 2 else 'png'}" for i in range(11)]


@pytest.fixture
def trained(clip_folder, processor, tmp_path) -> str:
    make_model(clip_folder).save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    return str(tmp_path / "trained")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eleven images in two formats, and files that are none."""
    for i, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path, "JPEG" if i % 2 else "PNG")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"no image")
    return tmp_path / "images"


def expected(model, processor, folder, modality, names=None) -> np.ndarray:
    images = [{"bytes": None, "path": str(folder / name)} for name in names or sorted(NAMES)]
    return embed_images(model, processor, images, modality)


def run(model, output, *options) -> Path:
    return embed.main(["--model", str(model), "--output_file", str(output), "--batch_size=4", *map(str, options)])


def read(path) -> tuple[list, np.ndarray]:
    if path.suffix == ".parquet":
        label, column = pq.read_table(path).columns
        return label.to_pylist(), np.array(column.to_pylist(), np.float32)
    with safe_open(path, "np") as file:
        embeds = file.get_tensor("embedding")
        return json.loads(file.metadata()["file_name"]) if "row" not in file.keys() else file.get_tensor("row"), embeds


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
@pytest.mark.parametrize("modality", ["real", "gen"])
def test_values_of_a_folder(trained, processor, folder, tmp_path, suffix, modality):
    output = run(trained, tmp_path / "new" / f"out{suffix}", "--images", folder, "--modality", modality)
    names, embeds = read(output)
    assert names == sorted(NAMES)
    wanted = expected(GmailCLIPModel.from_pretrained(trained), processor, folder, modality)
    np.testing.assert_allclose(embeds, wanted, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-6)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.stat().st_mode & 0o777 == Path(trained, "config.json").stat().st_mode & 0o777


def test_types_of_a_parquet_file(trained, folder, tmp_path):
    schema = pq.read_schema(run(trained, tmp_path / "out.parquet", "--images", folder))
    assert schema.equals(pa.schema([("file_name", pa.string()), ("embedding", pa.list_(pa.float32()))]))


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_values_of_a_column(trained, processor, tmp_path, suffix):
    pairs = make_pairs(9, bad_generated=(2, 5))
    datasets.DatasetDict(train=pairs.select([0]), test=pairs).save_to_disk(tmp_path / "pairs")
    options = ["--dataset", tmp_path / "pairs", "--split", "test", "--column", "generated_image", "--modality", "gen"]
    rows, embeds = read(run(trained, tmp_path / f"out{suffix}", *options))
    assert list(rows) == [0, 1, 3, 4, 6, 7, 8]
    cells = [cell for cell in pairs.cast_column("generated_image", datasets.Image(decode=False))["generated_image"]]
    wanted = embed_images(GmailCLIPModel.from_pretrained(trained), processor, [cells[row] for row in rows], "gen")
    np.testing.assert_allclose(embeds, wanted, atol=1e-6)


def test_adapters_alone_and_a_plain_clip(trained, clip_folder, processor, folder, tmp_path):
    GmailCLIPModel.from_pretrained(trained).save_adapters(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    _, whole = read(run(trained, tmp_path / "whole.parquet", "--images", folder, "--modality", "gen"))
    _, alone = read(run(tmp_path / "adapters", tmp_path / "alone.parquet", "--images", folder, "--modality", "gen"))
    np.testing.assert_array_equal(alone, whole)
    _, real = read(run(clip_folder, tmp_path / "real.parquet", "--images", folder))
    _, gen = read(run(clip_folder, tmp_path / "gen.parquet", "--images", folder, "--modality", "gen"))
    np.testing.assert_array_equal(real, gen)
    assert not np.allclose(gen, whole)


def interrupt(monkeypatch, after: int) -> list[int]:
    """Ctrl-C instead of batch `after`, in shards of one batch; returns the sizes of the batches before it."""
    sizes, real = [], embeddings._embed

    def stop(model, values, images, modality):
        if len(sizes) == after:
            raise KeyboardInterrupt
        sizes.append(len(images))
        return real(model, values, images, modality)

    monkeypatch.setattr(embeddings, "_embed", stop)
    monkeypatch.setattr(embeddings, "CACHE_SHARD_ROWS", 4)
    return sizes


@pytest.mark.parametrize("change", [None, "modality", "model", "images"])
def test_an_interrupted_run_continues_unless_something_changed(
    trained, clip_folder, processor, folder, tmp_path, monkeypatch, change
):
    output = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(trained, output, "--images", folder)
    assert not list(tmp_path.glob("*out*"))
    sizes = interrupt(monkeypatch, 99)
    modality, names = "real", sorted(NAMES)
    if change == "modality":
        modality = "gen"
    elif change == "model":
        make_model(clip_folder, trainable_modalities=["real", "gen"]).save_pretrained(trained)
    elif change == "images":
        picture(99).save(folder / names[0])
    run(trained, output, "--images", folder, "--modality", modality)
    assert sizes == ([4, 4, 3] if change else [3])
    wanted = expected(GmailCLIPModel.from_pretrained(trained), processor, folder, modality)
    np.testing.assert_allclose(read(output)[1], wanted, atol=1e-6)


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_a_finished_file_stays(trained, folder, tmp_path, monkeypatch, suffix):
    output = run(trained, tmp_path / f"out{suffix}", "--images", folder)
    content = output.read_bytes()
    sizes = interrupt(monkeypatch, 0)
    run(trained, output, "--images", folder)
    with pytest.raises(FileExistsError, match=r"modality: real -> gen; key: "):
        run(trained, output, "--images", folder, "--modality", "gen")
    assert not sizes and output.read_bytes() == content


def test_a_file_of_somebody_else_stays(trained, folder, tmp_path):
    make_pairs(1).to_parquet(tmp_path / "out.parquet")
    with pytest.raises(FileExistsError, match="model: None -> "):
        run(trained, tmp_path / "out.parquet", "--images", folder)


def test_unreadable_images_are_named(trained, processor, folder, tmp_path, caplog):
    (folder / "deep" / "broken.jpeg").write_bytes(b"no image")
    content = (folder / NAMES[2]).read_bytes()
    (folder / NAMES[2]).write_bytes(content[: len(content) // 2])
    caplog.set_level("INFO", logger="gmail_hf")
    names, embeds = read(run(trained, tmp_path / "out.parquet", "--images", folder))
    kept = sorted(set(NAMES) - {NAMES[2]})
    assert names == kept
    wanted = expected(GmailCLIPModel.from_pretrained(trained), processor, folder, "real", kept)
    np.testing.assert_allclose(embeds, wanted, atol=1e-6)
    for name in ("deep/broken.jpeg", NAMES[2]):
        assert sum(f"{name} cannot be read" in record.getMessage() for record in caplog.records) == 1
    assert "10 embeddings are in" in caplog.text and "2 images could not be read" in caplog.text
    for cached in ("cached", "fresh"):
        with pytest.raises(ValueError, match=f"{NAMES[2]} cannot be read"):
            run(trained, tmp_path / "error.parquet", "--images", folder, "--on_bad_image", "error")
        if cached == "cached":
            picture(77).save(folder / NAMES[0])
    assert not (tmp_path / "error.parquet").exists()


def test_a_file_of_another_run_is_not_overwritten(trained, folder, tmp_path, monkeypatch):
    """A run that finishes while this one embeds."""
    output, real = tmp_path / "out.parquet", embeddings._embed
    finished = run(trained, tmp_path / "finished.parquet", "--images", folder).read_bytes()
    picture(99).save(folder / NAMES[0])

    def meanwhile(*args):
        output.write_bytes(finished)
        return real(*args)

    monkeypatch.setattr(embeddings, "_embed", meanwhile)
    with pytest.raises(FileExistsError, match="key: "):
        run(trained, output, "--images", folder)
    assert output.read_bytes() == finished and not list(tmp_path.glob(".*out*"))


def test_no_readable_image(trained, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        run(trained, tmp_path / "out.parquet", "--images", tmp_path / "images")
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
        run(trained, tmp_path / "out.parquet", "--images", tmp_path / "images")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("output", "options", "error", "message"),
    [
        ("out.parquet", [], ValueError, "either --images or --dataset"),
        ("out.parquet", ["--images", "a", "--dataset", "b"], ValueError, "either --images or --dataset"),
        ("out.parquet", ["--images", "nowhere"], FileNotFoundError, "Folder 'nowhere' does not exist"),
        ("out.parquet", ["--images", __file__], ValueError, "takes a folder of images"),
        ("out.parquet", ["--images", "{folder}", "--device", "tpu9"], ValueError, "--device 'tpu9' cannot be used"),
        ("out.parquet", ["--images", "{folder}", "--model", "{folder}/no"], FileNotFoundError, "does not exist"),
        ("out.npy", ["--images", "a"], ValueError, "must end in .parquet or .safetensors, got '.*out.npy'"),
        ("out.parquet", ["--images", "a", "--on_bad_image", "ignore"], ValueError, "invalid choice: 'ignore'"),
        ("out.parquet", ["--images", "a", "--batch_size", "0"], ValueError, "at least 1"),
        ("out.parquet", ["--images", "a", "--dtype", "int8"], ValueError, "--dtype: invalid choice: 'int8'"),
        ("out.parquet", ["--dataset", "{pairs}"], ValueError, r"\['real_image', 'generated_image'\]"),
        ("out.parquet", ["--dataset", "{pairs}", "--column", "caption"], ValueError, "Pass the column of"),
        ("out.parquet", ["--images", "{folder}", "--modality", "fake"], ValueError, "no branch 'fake'"),
    ],
)
def test_mistakes(trained, folder, tmp_path, output, options, error, message):
    make_pairs(2).save_to_disk(tmp_path / "pairs")
    places = {"pairs": tmp_path / "pairs", "folder": folder}
    with pytest.raises(error, match=message):
        run(trained, tmp_path / output, *(option.format(**places) for option in options))
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))


@pytest.mark.parametrize("name", ["there.parquet", "there.safetensors"])
def test_another_file_is_not_overwritten(trained, folder, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name}' exists and cannot be read"):
        run(trained, tmp_path / name, "--images", folder)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.integration
def test_the_key_is_the_same_in_another_process(trained, folder, tmp_path):
    """Otherwise no run would ever continue."""
    output = run(trained, tmp_path / "out.parquet", "--images", folder)
    command = [sys.executable, "-m", "gmail_hf.commands.embed", "--model", trained, "--images", str(folder)]
    done = subprocess.run([*command, "--output_file", str(output)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and f"{output} is finished." in done.stderr, done.stderr


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_images_of_unknown_origin(trained, processor, folder, tmp_path, monkeypatch, suffix):
    model = GmailCLIPModel.from_pretrained(trained)
    fit_detector(model, processor, make_pairs(24))
    images = [str(folder / name) for name in sorted(NAMES)]
    values = processor(images=[decode_image(image) for image in images], return_tensors="pt")["pixel_values"]
    threshold = float(model.detect_modality(values).generated_probability.median())  # noise: all are near 0.5
    model.save_pretrained(trained)
    options = ["--images", folder, "--modality", "auto", "--threshold", threshold]
    output = run(trained, tmp_path / f"out{suffix}", *options)
    if suffix == ".parquet":
        table = pq.read_table(output)
        names, embeds, probabilities, branches = (column.to_pylist() for column in table.columns)
        assert table.column_names == ["file_name", "embedding", "generated_probability", "modality"]
    else:
        with safe_open(output, "np") as file:
            embeds, probabilities = file.get_tensor("embedding"), file.get_tensor("generated_probability")
        branches = ["gen" if value >= threshold else "real" for value in probabilities]
    assert 2 <= branches.count("gen") <= 9
    both = {name: expected(model, processor, folder, name) for name in ("real", "gen")}
    wanted = [both[branch][row] for row, branch in enumerate(branches)]
    np.testing.assert_allclose(embeds, wanted, atol=1e-6)
    np.testing.assert_allclose(probabilities, model.detect_modality(values).generated_probability, atol=1e-6)
    run(trained, output, *options)  # finished
    with pytest.raises(FileExistsError, match="threshold: "):
        run(trained, output, *options[:-1], 0.25)


def test_auto_needs_a_detector(trained, folder, tmp_path):
    with pytest.raises(ValueError, match="none was fitted"):
        run(trained, tmp_path / "out.parquet", "--images", folder, "--modality", "auto")
    with pytest.raises(ValueError, match="--threshold needs --modality auto"):
        run(trained, tmp_path / "out.parquet", "--images", folder, "--threshold", "0.5")
