"""Files that were cut or altered after a run had written them."""

from pathlib import Path

import pytest
from tiny import assert_equal, make_model, make_pairs, weights
from tiny_pipeline import command_line, make_pipeline

from gmail_hf import GmailCLIPModel
from gmail_hf.commands import cli
from gmail_hf.training import embeddings
from gmail_hf.training.embeddings import cached_embeds, embeds_array
from gmail_hf.training.resuming import checkpoints, damage


def refused(capsys, *argv) -> str:
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(map(str, argv)))
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.integration
def test_training_resumes_from_the_last_whole_checkpoint(train, tmp_path, caplog):
    whole = train(max_steps=6, save_strategy="steps", save_steps=2)
    run = tmp_path / "run"
    whole_state = weights(whole)
    newest = run / "checkpoint-6"
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.name != "README.md"]
    names = {path.name for path in files}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"} <= names
    assert {"trainer_state.json", "adapter_model.safetensors", "training_args.json", "files.json"} <= names
    for file in files:
        content = file.read_bytes()
        for torn in (b"", content[: len(content) // 2], content[:-2]):
            file.write_bytes(torn)
            assert damage(newest) is not None, file
        file.write_bytes(content)
    assert damage(newest) is None
    finished = train(max_steps=6, save_strategy="steps", save_steps=2, resume=True)  # killed before its last save
    assert finished.state.global_step == 6
    assert_equal(weights(finished), whole_state)
    for name in ("checkpoint-6/optimizer.pt", "checkpoint-4/trainer_state.json"):
        (run / name).write_bytes((run / name).read_bytes()[:10])
    resumed = train(max_steps=6, save_strategy="steps", save_steps=2, resume=True)
    assert "checkpoint-6': optimizer.pt has 10 instead of" in caplog.text
    assert "checkpoint-4': trainer_state.json has 10 instead of" in caplog.text
    assert [damage(path) for path in checkpoints(run)] == [None] * 3
    assert_equal(weights(resumed), whole_state)


@pytest.mark.parametrize("size", [0, 100, -2])
def test_a_model_whose_saving_was_killed_is_refused(train, tmp_path, size):
    train(max_steps=1).save_model()
    file = tmp_path / "run" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(OSError, match=r"model.safetensors is incomplete .*--resume_from_checkpoint true"):
        GmailCLIPModel.from_pretrained(tmp_path / "run")


def test_a_shard_that_was_changed_is_named_and_can_be_restored(pairs_file, tmp_path, capsys, caplog):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    options = {"dataset": pairs_file, "generator": tmp_path / "pipeline", "num_inference_steps": 1}
    options |= {"num_captions": 16, "shard_size": 8, "output_dir": tmp_path / "out"}
    generate = ["generate", *command_line(options)]
    cli.main(generate)
    shard = tmp_path / "out" / "data" / "train-00001-of-00002.parquet"
    content = shard.read_bytes()

    shard.write_bytes(content[:-10])
    line = refused(capsys, *generate)
    assert f"1 shards in '{tmp_path / 'out'}' were changed after they were written" in line
    assert f"{shard.name} has {len(content) - 10} instead of {len(content)} bytes. Delete them" in line
    assert f"{shard.name} has" in refused(capsys, "push", tmp_path / "out", "org/pairs")

    shard.write_bytes(content[:100] + b"?" + content[101:])
    cli.main(generate)
    assert "Nothing to do" in caplog.text
    assert f"{shard.name} has other content. Delete them" in refused(capsys, *generate, "--verify")

    shard.unlink()
    cli.main([*generate, "--verify"])
    assert "1 finished shards are unchanged." in caplog.text and shard.read_bytes() == content


@pytest.mark.parametrize("size", [0, 100, -20, None])
def test_cached_embeddings_that_were_cut_are_computed_again(clip_folder, processor, monkeypatch, caplog, size):
    monkeypatch.setattr(embeddings, "CACHE_SHARD_ROWS", 4)
    pairs, model = make_pairs(8), make_model(clip_folder)
    cached = cached_embeds(pairs, "real_image", model, processor)
    expected, files = embeds_array(cached), [file["filename"] for file in cached.cache_files]
    del cached
    with open(files[1], "rb") as file:
        content = file.read()
    if size is None:  # a whole file of fewer rows
        embeddings._write_arrow(Path(files[1]), embeddings.datasets.Dataset.from_file(files[0]).select(range(2)))
    else:
        Path(files[1]).write_bytes(content[:size])
    again = embeds_array(cached_embeds(pairs, "real_image", model, processor))
    assert (again == expected).all() and f"'{files[1]}' is damaged" in caplog.text
    with open(files[1], "rb") as file:
        assert file.read() == content
