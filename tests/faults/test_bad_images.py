"""Images that cannot be read: each is named, whichever process meets it, and the count survives a resume."""

import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset, Features, Image, Value
from tiny import logged, make_pairs, picture, png

from gmail_hf.commands.common import start
from gmail_hf.generation.prepare import prepare_pairs
from gmail_hf.training.data import GmailCollator
from gmail_hf.training.loading import load_pairs


def test_every_process_names_its_own(processor, tmp_path, caplog):
    replica = SimpleNamespace(
        should_log=False, should_save=False, seed=0, output_dir=str(tmp_path), resume_from_checkpoint=None
    )
    level = logging.getLogger("gmail_hf").level
    try:
        start(replica)
        GmailCollator(processor)(list(make_pairs(4, bad_real=(2,)).cast_column("real_image", Image(decode=False))))
    finally:
        logging.getLogger("gmail_hf").setLevel(level)
    assert "Pair with image_id id-2 is skipped" in caplog.text


def test_a_resumed_run_counts_on(train):
    pairs = make_pairs(20, bad_generated=range(0, 20, 3))
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 4}
    whole = train(pairs, **settings)
    assert whole.skipped_pairs > 8
    resumed = train(pairs, resume=f"{whole.args.output_dir}/checkpoint-3", **settings)
    assert resumed.skipped_pairs == whole.skipped_pairs
    assert logged(resumed, "skipped_pairs")[-1] == whole.skipped_pairs


@pytest.mark.slow
def test_two_processes_name_all(tmp_path):
    bad = set(range(0, 36, 2))
    make_pairs(36, bad_generated=tuple(bad)).to_parquet(tmp_path / "pairs.parquet")
    options = ["--dataset", str(tmp_path / "pairs.parquet"), "--model=digits", "--output_dir", str(tmp_path / "out")]
    options += ["--per_device_train_batch_size=9", "--max_steps=2", "--save_steps=1", "--report_to=none"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "gmail_hf.commands.train"]
    done = subprocess.run(
        [sys.executable, *launch, *options, "--use_cpu=True", "--dataloader_pin_memory=False"],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"image_id (id-\d+) is skipped", done.stderr)) == {f"id-{row}" for row in bad}
    assert "Pairs were skipped 18 times" in done.stderr


def test_preparation_passes_over_missing_and_damaged_files(processor, tmp_path):
    for row in range(4):
        picture(row).save(tmp_path / f"{row}.png")
    (tmp_path / "3.png").write_bytes(png(3, truncated=True)["bytes"])
    cells = [{"bytes": None, "path": str(tmp_path / f"{row}.png")} for row in range(4)]
    features = Features(real_image=Image(), generated_image=Image(), caption=Value("string"), image_id=Value("string"))
    columns = {
        "real_image": cells,
        "generated_image": cells[:1] * 4,
        "caption": list("abcd"),
        "image_id": list("0123"),
    }
    pairs = Dataset.from_dict(columns, features=features)
    (tmp_path / "1.png").unlink()
    prepare_pairs(pairs, processor, tmp_path / "prepared")
    prepared = load_pairs(str(tmp_path / "prepared"))
    rows = list(prepared.cast_column("real_image", Image(decode=False)))
    batch = GmailCollator(processor)(rows)
    assert batch["skipped_pairs"] == 2 and len(batch["real_pixel_values"]) == 2
    assert rows[1]["real_image"] == {"bytes": b"", "path": "1.png"}
