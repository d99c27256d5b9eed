"""Which checkpoints count, which one a run resumes from, and which ones are deleted."""

import json
import os

import pytest

from gmail_hf import GmailTrainer
from gmail_hf.training.resuming import check_output_dir, checkpoints, damage, rotate, seal


def make(folder, *steps):
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        (checkpoint / "gen").mkdir(parents=True)
        for name in ("model.safetensors", "trainer_state.json", "gen/adapter_model.safetensors", "README.md"):
            (checkpoint / name).write_text("content")
        seal(checkpoint)


def steps(folder):
    return [int(path.name.split("-")[1]) for path in checkpoints(folder)]


def test_output_dir_of_another_run_is_refused(tmp_path):
    assert check_output_dir(tmp_path) is None
    assert check_output_dir(tmp_path / "new") is None
    (tmp_path / "model.safetensors.index.json").touch()  # of a sharded model
    with pytest.raises(FileExistsError, match="contains a trained model. Choose another"):
        check_output_dir(tmp_path)
    make(tmp_path, 5)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint true"):
        check_output_dir(tmp_path)


def test_a_run_killed_in_its_first_save_starts_again(tmp_path, caplog):
    make(tmp_path, 5)
    (tmp_path / "checkpoint-5" / "files.json").unlink()
    assert check_output_dir(tmp_path) is None
    assert "checkpoint-5': it was not written completely." in caplog.text
    with pytest.raises(FileNotFoundError, match="Run without --resume_from_checkpoint to start again"):
        check_output_dir(tmp_path, "true")
    with pytest.raises(FileNotFoundError, match="is not a complete checkpoint: it is not a folder"):
        check_output_dir(tmp_path, __file__)


def test_the_last_whole_checkpoint_is_found(tmp_path, caplog):
    make(tmp_path, 5, 10)
    (tmp_path / "checkpoint-best").mkdir()
    assert check_output_dir(tmp_path, True) == check_output_dir(tmp_path, "true") == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-15").mkdir()  # interrupted while it was written
    assert check_output_dir(tmp_path, "true") == str(tmp_path / "checkpoint-10")
    assert check_output_dir(tmp_path, str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    assert "also contains checkpoint-10, checkpoint-15. Delete" in caplog.text
    with pytest.raises(FileNotFoundError, match="checkpoint-15' is not a complete checkpoint: it was not written"):
        check_output_dir(tmp_path, str(tmp_path / "checkpoint-15"))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("trainer_state.json", "", "trainer_state.json has 0 instead of 7 bytes"),
        ("gen/adapter_model.safetensors", "cont", "gen/adapter_model.safetensors has 4 instead of 7 bytes"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("files.json", "", "files.json cannot be read"),
        ("files.json", "[]", "files.json cannot be read"),
        ("README.md", "edited by hand", None),
    ],
)
def test_damage_is_named_and_an_older_checkpoint_taken(tmp_path, caplog, name, content, found):
    make(tmp_path, 5, 10)
    file = tmp_path / "checkpoint-10" / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert damage(tmp_path / "checkpoint-10") == found
    assert check_output_dir(tmp_path, True) == str(tmp_path / f"checkpoint-{5 if found else 10}")
    assert (f"checkpoint-10': {found}." in caplog.text) == bool(found)


def test_rotation_goes_by_step(tmp_path):
    make(tmp_path, 5, 10, 15, 20)
    for step in (5, 10):  # the clock was set back before 15
        os.utime(tmp_path / f"checkpoint-{step}", (2e9, 2e9))
    rotate(tmp_path, 20, None)
    assert steps(tmp_path) == [5, 10, 15, 20]
    rotate(tmp_path, 20, 3)
    assert steps(tmp_path) == [10, 15, 20]
    rotate(tmp_path, 20, 2, best=str(tmp_path / "checkpoint-10"))
    assert steps(tmp_path) == [10, 20]
    rotate(tmp_path, 20, 1, best=str(tmp_path / "checkpoint-10"))
    assert steps(tmp_path) == [10, 20]


class SetBack(GmailTrainer):
    """The clock is set back after each save."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        future = 2e9 - 1000 * self.state.global_step
        os.utime(f"{self.args.output_dir}/checkpoint-{self.state.global_step}", (future, future))


def test_training_keeps_its_newest_checkpoints(train, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = train(trainer=SetBack, **settings)
    assert steps(tmp_path / "run") == [3, 4] and trainer.args.save_total_limit == 2
    assert [damage(path) for path in checkpoints(tmp_path / "run")] == [None, None]
    written = json.loads((tmp_path / "run" / "checkpoint-4" / "training_args.json").read_text())
    assert written["save_total_limit"] == 2


def test_rotation_deletes_damaged_and_abandoned_checkpoints_first(tmp_path):
    make(tmp_path, 5, 10, 15, 20, 30)
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("")
    rotate(tmp_path, 15, 4)
    assert steps(tmp_path) == [5, 15, 20, 30]
    rotate(tmp_path, 15, 2)  # the run was resumed from 5 or 10: 20 and 30 are not its own
    assert steps(tmp_path) == [5, 15]


def test_a_seal_lists_the_files(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        "gmail_hf.files.os.fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    make(tmp_path, 5)
    assert len(synced) == 5 and synced[-1].endswith(".part")  # four files, then the seal
    sizes = json.loads((tmp_path / "checkpoint-5" / "files.json").read_text())
    assert sizes == {"gen/adapter_model.safetensors": 7, "model.safetensors": 7, "trainer_state.json": 7}
