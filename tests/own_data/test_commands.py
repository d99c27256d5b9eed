"""The installed commands on data of one's own: generation, training, stage 2."""

import json

import pytest
from pyarrow import parquet
from tiny import make_clip, make_processor, picture

from gmail_hf.commands import cli
from gmail_hf.digits import clip_path, generator_path, load_digits


@pytest.fixture(scope="module")
def scenes():
    return load_digits("train", 4)


@pytest.fixture
def photographs(scenes, tmp_path):
    """`photos/0.png`, ... with captions in several formats, the paths relative to the files."""
    folder = tmp_path / "run[v2]"
    (folder / "photos").mkdir(parents=True)
    for i, image in enumerate(scenes["real_image"]):
        image.save(folder / "photos" / f"{i}.png")
    rows = [
        {"image": f"photos/{i}.png", "text": text, "image_id": f"0{i}"} for i, text in enumerate(scenes["caption"])
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [",".join(row.values()) for row in rows]
    (folder / "rows.csv").write_text("\n".join(["image,text,image_id", *lines]))
    return folder


def run(*options):
    cli.main(list(map(str, options)))


def generate(dataset, out):
    run("generate", "--dataset", dataset, "--generator", generator_path(), "--num_inference_steps", 2,
        "--batch_size", 4, "--output_dir", out)  # fmt: skip
    (shard,) = (out / "data").glob("*.parquet")
    return parquet.read_table(shard).to_pylist()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_from_a_table_to_a_trained_model(kind, photographs, scenes, tmp_path):
    made = generate(photographs / f"rows.{kind}", tmp_path / "made")
    assert [row["caption"] for row in made] == scenes["caption"][:]
    assert [row["image_id"] for row in made] == ["00", "01", "02", "03"]
    for i, row in enumerate(made):
        assert row["real_image"]["bytes"] == (photographs / "photos" / f"{i}.png").read_bytes()
        (photographs / "generated").mkdir(exist_ok=True)
        (photographs / "generated" / f"{i}.png").write_bytes(row["generated_image"]["bytes"])
    pairs = [f"photos/{i}.png,generated/{i}.png,{text},0{i}" for i, text in enumerate(scenes["caption"])]
    (photographs / "pairs.csv").write_text("\n".join(["photo,generated,prompt,image_id", *pairs]))
    run("train", "--dataset", photographs / "pairs.csv", "--model", clip_path(), "--output_dir", tmp_path / "model",
        "--max_steps", 2, "--per_device_train_batch_size", 4, "--use_cpu", "--report_to", "none")  # fmt: skip
    assert (tmp_path / "model" / "gen" / "adapter_model.safetensors").exists()


def test_a_missing_photograph_stops_generation_before_it_starts(photographs, tmp_path, capsys):
    (photographs / "photos" / "2.png").unlink()
    with pytest.raises(SystemExit) as exit:
        generate(photographs / "rows.jsonl", tmp_path / "made")
    assert exit.value.code == 2 and "Row 2 of" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_missing_table_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_clip().save_pretrained("clip")
    make_processor().save_pretrained("clip")
    picture(0).save("0.png")
    with pytest.raises(SystemExit):
        run("train", "--dataset", "t/pairs.csv", "--model", "clip", "--output_dir", "out", "--report_to", "none")
    assert "No data set at 't/pairs.csv': this path does not exist." in capsys.readouterr().err


def test_shards_in_the_folder_of_the_captions_are_refused(photographs, monkeypatch, capsys):
    """The next run would read them instead of the captions, and could not continue."""
    monkeypatch.chdir(photographs)
    with pytest.raises(SystemExit):
        generate(".", photographs / "out")
    assert "is inside '.', which this command reads" in capsys.readouterr().err
    assert not (photographs / "out").exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["--output_dir", "model"]),
        ("caption", ["--output_dir", "model", "--text_model", "x"]),
        ("vlm", ["--output_dir", "model", "--text_model", "x"]),
        ("prepare", ["--output_dir", "prepared"]),
        ("embed", ["--output_file", "embeds.parquet"]),
    ],
)
def test_output_in_a_folder_of_loose_files_is_refused(command, options, photographs, monkeypatch, capsys):
    """Its train_results.json, or its Arrow and parquet files, would be the data of the next command."""
    monkeypatch.chdir(photographs)
    before = sorted(photographs.iterdir())
    with pytest.raises(SystemExit):
        run(command, "--dataset", ".", "--model", clip_path(), *options)
    assert "is inside '.', which this command reads" in capsys.readouterr().err
    assert sorted(photographs.iterdir()) == before
