"""`gmail-hf train` as a user runs it, at a size of seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Image
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import ImageFilter
from tiny import make_pairs
from towers import make
from transformers import AutoProcessor, BitImageProcessor

from gmail_hf import GmailCLIPModel, fit_detector
from gmail_hf.commands import train
from gmail_hf.digits import clip_path, load_digits
from gmail_hf.training import loading
from gmail_hf.training.loading import load_pairs

SCRIPT = Path(__file__).parents[2] / "examples" / "train_gmail.py"
SHORT = [
    "--model=digits",
    "--per_device_train_batch_size=16",
    "--max_steps=4",
    "--save_steps=2",
    "--logging_steps=1",
    "--dataloader_pin_memory=False",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Scenes beside their blurred copies: a gap that needs no diffusion model."""
    scenes = load_digits("train", 48)
    blurred = [Image().encode_example(image.filter(ImageFilter.GaussianBlur(1))) for image in scenes["real_image"]]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    scenes.add_column("generated_image", blurred, feature=Image()).to_parquet(path)
    return str(path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return GmailCLIPModel.from_pretrained(folder).state_dict()


@pytest.mark.integration
def test_interrupted_and_resumed_equals_uninterrupted(pairs, tmp_path):
    common = ["--dataset", pairs, "--eval_split", "train", "--max_eval_samples", "16", *SHORT]
    metrics = train.main([*common, "--output_dir", str(tmp_path / "whole")])
    assert {"eval_loss", "eval_paired_cosine", "eval_gen_to_real_R@1"} <= set(metrics)
    log = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
    assert any("align_loss" in entry for entry in log)
    before = json.loads((tmp_path / "whole" / "before_results.json").read_text())
    assert before["before_paired_cosine"] != metrics["eval_paired_cosine"]
    assert (tmp_path / "whole" / "gen" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "whole").rglob("training_args.bin"))

    part = tmp_path / "part"
    train.main([*common, "--output_dir", str(part)])
    for leftover in (part / "checkpoint-4").iterdir():  # as if the run had ended after checkpoint-2
        if leftover.is_dir():
            for file in leftover.iterdir():
                file.unlink()
            leftover.rmdir()
        else:
            leftover.unlink()
    (part / "checkpoint-4").rmdir()
    with pytest.raises(FileExistsError, match="resume_from_checkpoint"):
        train.main([*common, "--output_dir", str(part)])
    train.main([*common, "--output_dir", str(part), "--resume_from_checkpoint", "true"])
    whole, resumed = weights(tmp_path / "whole"), weights(part)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for option in (["--lora_rank", "8"], ["--train_real"]):
        with pytest.raises(ValueError, match="has adapters with .* Leave out --"):
            train.main([*common, "--model", str(part), "--output_dir", str(tmp_path / "x"), *option])
    # A trained model is a model to train on.
    train.main([*common, "--model", str(part), "--output_dir", str(tmp_path / "more")])
    more = weights(tmp_path / "more")
    assert any(not torch.equal(more[key], resumed[key]) for key in more if ".adapters.gen." in key)
    assert all(torch.equal(more[key], resumed[key]) for key in more if ".gen" not in key)


def test_a_trained_model_is_pushed_once(pairs, tmp_path, monkeypatch):
    pushed = []

    def upload(self, message, *args, **options):
        pushed.append(message)

    monkeypatch.setattr("gmail_hf.training.safe_trainer.SafeTrainer._upload", upload)
    monkeypatch.setattr(
        "transformers.Trainer.init_hf_repo", lambda self, **options: setattr(self, "hub_model_id", "org/gmail")
    )
    monkeypatch.setattr("gmail_hf.publishing.model_cards.card_of_others", lambda *args, **options: None)
    options = ["--push_to_hub", "--save_strategy=no", "--output_dir", str(tmp_path / "out")]
    train.main(["--dataset", pairs, *SHORT, "--max_steps=1", *options])
    assert pushed == ["End of training"]


def test_disk_is_checked_for_the_checkpoints_of_all_epochs(pairs, tmp_path, monkeypatch):
    needed = []

    def check(path, size):
        needed.append(size)
        raise OSError("full")

    monkeypatch.setattr(loading, "check_free_disk", check)
    common = ["--dataset", pairs, "--output_dir", str(tmp_path / "x"), *SHORT]
    for option in ("--save_strategy=no", "--save_steps=2"):
        with pytest.raises(OSError, match="full"):
            train.main([*common, "--max_steps=-1", "--num_train_epochs=4", option])
    assert needed[1] == needed[0] * 7  # 12 steps: six checkpoints and the final model


@pytest.mark.integration
def test_accelerate_launch(pairs, tmp_path):
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(SCRIPT), *SHORT]
    command += ["--dataset", pairs, "--output_dir", str(tmp_path / "out"), "--train_real", "--text_lora"]
    command += ["--gen_text_weight", "0.5", "--attn_implementation", "eager"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "parameters (" in done.stderr  # how much is trained
    model = GmailCLIPModel.from_pretrained(tmp_path / "out")
    assert model.config.trainable_modalities == ["real", "gen"]
    assert (tmp_path / "out" / "text" / "adapter_config.json").exists()


@pytest.mark.integration
def test_text_stage_goes_on_from_an_aligned_model(pairs, tmp_path):
    common = ["--dataset", pairs, *SHORT]
    train.main([*common, "--output_dir", str(tmp_path / "aligned")])
    metrics = train.main(
        [*common, "--stage", "text", "--eval_split", "train", "--learning_rate", "1e-2"]
        + ["--model", str(tmp_path / "aligned"), "--output_dir", str(tmp_path / "text")]
    )
    before = json.loads((tmp_path / "text" / "before_results.json").read_text())
    assert {"eval_image_to_text_R@1", "eval_text_to_image_R@10"} <= set(metrics)
    assert metrics["eval_paired_cosine"] == before["before_paired_cosine"]
    aligned, text = weights(tmp_path / "aligned"), weights(tmp_path / "text")
    assert all(torch.equal(text[key], aligned[key]) for key in aligned)
    own = text.keys() - aligned.keys()
    assert all(".adapters.text." in key for key in own)
    assert all(text[key].any() for key in own)


def test_stage_sets_defaults_that_the_command_line_overrides(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("stage: text\n")
    model_args, _, args = train.parse_args(["--config", str(config)])
    assert (model_args.text_lora, args.align_weight, args.gen_text_weight) == (True, 0.0, 1.0)
    model_args, _, args = train.parse_args(["--config", str(config), "--stage", "joint", "--gen_text_weight", "0.3"])
    assert (model_args.text_lora, args.align_weight, args.gen_text_weight) == (True, 1.0, 0.3)
    with pytest.raises(ValueError, match=r"unknown stage 'texts'; choose from \['align', 'text', 'joint'\]"):
        train.parse_args(["--stage", "texts"])


def test_pairs_of_ones_own_need_a_model_by_name(tmp_path):
    """The CLIP that comes along knows digits of 32 pixels: not what somebody wants of COCO."""
    with pytest.raises(ValueError, match="Pass the model to train on 'org/coco-sd2'.*--model"):
        train.parse_args(["--dataset", "org/coco-sd2", "--output_dir", str(tmp_path)])
    assert train.parse_args(["--dataset", "digits", "--output_dir", str(tmp_path)])[0].model == "digits"


def test_command_line_wins_over_config(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1e-3\nmax_steps: 7\nmodel: org/clip\n")
    model_args, data_args, training_args = train.parse_args(["--config", str(config), "--max_steps", "9"])
    assert (model_args.model, training_args.learning_rate, training_args.max_steps) == (
        "org/clip",
        1e-3,
        9,
    )
    assert training_args.weight_decay == 0.01


def test_no_arguments_are_the_embedded_default():
    model_args, data_args, training_args = train.parse_args([])
    assert (model_args.model, data_args.dataset) == ("digits", "digits")
    assert training_args.max_steps < 50_000


@pytest.mark.parametrize("name", ["coco", "cc3m", "cc12m", "coco_llava"])
def test_configs_hold_the_papers_settings(name, tmp_path):
    config = str(SCRIPT.parent / "configs" / f"{name}.yaml")
    without_gpu = ["--bf16", "False", "--output_dir", str(tmp_path)]
    model_args, data_args, args = train.parse_args(["--config", config, *without_gpu])
    for_llava = name == "coco_llava"
    assert model_args.model == "openai/clip-vit-large-patch14" + "-336" * for_llava
    assert model_args.lora_rank == 4 and args.token_weight == (1.0 if for_llava else 0.0)
    assert (args.temperature, args.learning_rate, args.weight_decay) == (0.07, 1e-4, 0.01)
    assert (args.max_steps, args.per_device_train_batch_size * 8) == (50_000, 256)
    assert args.lr_scheduler_type == "cosine_with_restarts" and args.lr_scheduler_kwargs == {"num_cycles": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--caption_column", "text"], r"no column\(s\) \['text'\]"),
        (["--split", "dev"], "no split 'dev'"),
        (["--lora_rank", "0"], "`lora_rank` must be between 1 and 4096"),
        (["--gen_text_weight", "1", "--align_weight", "0"], "still equals the pretrained model"),
    ],
)
def test_mistakes_are_told_before_training(pairs, tmp_path, options, message):
    # transformers' configurations raise huggingface_hub's own validation error.
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        train.main(["--dataset", pairs, "--output_dir", str(tmp_path / "out"), *SHORT, *options])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_text_losses_need_a_text_encoder(tmp_path):
    make("dinov2").save_pretrained(tmp_path / "dino")
    BitImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(tmp_path / "dino")
    make_pairs(8).to_parquet(tmp_path / "pairs.parquet")
    options = ["--dataset", str(tmp_path / "pairs.parquet"), "--model", str(tmp_path / "dino"), "--stage", "joint"]
    with pytest.raises(ValueError, match="GmailDinov2Model has no text encoder"):
        train.main(["--output_dir", str(tmp_path / "out"), *SHORT, *options])


def test_image_size_that_the_model_does_not_take(pairs, tmp_path):
    """A processor that makes images of another size is told by the model's own error, at the first batch."""
    from transformers import CLIPModel, CLIPProcessor

    CLIPModel.from_pretrained(clip_path()).save_pretrained(tmp_path / "clip")
    processor = CLIPProcessor.from_pretrained(clip_path())
    processor.image_processor.size = {"height": 40, "width": 40}
    processor.image_processor.crop_size = {"height": 40, "width": 40}
    processor.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="image size"):
        train.main(
            ["--dataset", pairs, "--output_dir", str(tmp_path / "out"), *SHORT] + ["--model", str(tmp_path / "clip")]
        )


@pytest.mark.integration
def test_a_detector_comes_with_the_model(pairs, tmp_path):
    output = tmp_path / "out"
    train.main(["--dataset", pairs, *SHORT, "--output_dir", str(output), "--fit_detector", "--hub_model_id", "org/x"])
    model = GmailCLIPModel.from_pretrained(output)
    processor = AutoProcessor.from_pretrained(clip_path())
    fresh = GmailCLIPModel.from_clip(clip_path())  # the frozen branch, whatever was trained
    expected = fit_detector(fresh, processor, load_pairs(pairs), batch_size=16, seed=42)
    assert model.detector.scores == pytest.approx(expected) and expected["images"] == 20
    assert f"| accuracy | {model.detector.scores['accuracy']:.3f} |" in (output / "README.md").read_text()
    assert (output / "checkpoint-2" / "detector.safetensors").exists()
    scores = json.loads((output / "detector_results.json").read_text())
    assert scores["detector_images"] == model.detector.scores["images"]
    with pytest.raises(ValueError, match="this model trains that one"):
        train.main(["--dataset", pairs, *SHORT, "--output_dir", str(tmp_path / "x"), "--fit_detector", "--train_real"])
