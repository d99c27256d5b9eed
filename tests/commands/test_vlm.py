"""`gmail-hf vlm` as a user runs it, at a size of seconds."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Image
from peft import PeftModel
from PIL import ImageFilter
from server import HubServer
from tiny import png, randomise
from transformers import AutoProcessor, LlavaProcessor, pipeline

from gmail_hf import GmailCLIPModel
from gmail_hf.branches.tower import is_adapter_weight
from gmail_hf.commands import vlm
from gmail_hf.digits import clip_path, llama_path, load_digits
from gmail_hf.evaluation import answering
from gmail_hf.training.data import undecoded
from gmail_hf.training.safe_trainer import SafeTrainer
from gmail_hf.vlm import GmailLlavaForConditionalGeneration, build_processor

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SHORT = [
    "--text_model=digits",
    "--per_device_train_batch_size=8",
    "--per_device_eval_batch_size=16",
    "--learning_rate=1e-2",
    "--max_steps=4",
    "--save_steps=2",
    "--logging_steps=1",
    "--max_new_tokens=4",
    "--report_to=none",
    "--dataloader_pin_memory=False",
    "--eval_split=train",
    "--max_eval_samples=4",
]


@pytest.fixture(scope="module")
def gmail(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gmail")
    randomise(GmailCLIPModel.from_clip(clip_path()), std=0.02).save_pretrained(folder)
    AutoProcessor.from_pretrained(clip_path()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Dataset:
    """Scenes beside their blurred copies."""
    scenes = load_digits("train", 24)
    blurred = [Image().encode_example(image.filter(ImageFilter.GaussianBlur(1))) for image in scenes["real_image"]]
    return scenes.add_column("generated_image", blurred, feature=Image())


@pytest.fixture(scope="module")
def common(gmail, pairs, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pairs.to_parquet(path)
    return ["--dataset", str(path), "--model", gmail, *SHORT]


def weights(folder) -> dict[str, torch.Tensor]:
    return GmailLlavaForConditionalGeneration.from_pretrained(folder).state_dict()


def without_text_model(options: list[str]) -> list[str]:
    return [option for option in options if not option.startswith("--text_model")]


def base(gmail) -> dict[str, torch.Tensor]:
    processor = build_processor(gmail, llama_path())
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail, llama_path(), processor)
    return model.state_dict()


def predictions(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "predictions.jsonl").read_text().splitlines()]


@pytest.mark.integration
def test_projector_resumed_equals_uninterrupted(common, gmail, pairs, tmp_path):
    metrics = vlm.main([*common, "--output_dir", str(tmp_path / "whole")])
    kinds = ["left_digit", "right_digit", "left_color", "right_color", "caption"]
    assert {f"eval_{kind}_exact_match" for kind in kinds} <= metrics.keys()
    assert json.loads((tmp_path / "whole" / "eval_results.json").read_text()) == metrics
    whole, untrained = weights(tmp_path / "whole"), base(gmail)
    changed = {name for name in whole if not torch.equal(whole[name], untrained[name])}
    projector = {name for name in whole if "multi_modal_projector" in name}
    # The rows of the new tokens are drawn at random.
    assert projector <= changed <= projector | {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    assert not list(tmp_path.rglob("*.bin"))

    part = tmp_path / "part"
    vlm.main([*common, "--output_dir", str(part)])
    shutil.rmtree(part / "checkpoint-4")  # as if the run had ended after checkpoint-2
    with pytest.raises(FileExistsError, match="resume_from_checkpoint"):
        vlm.main([*common, "--output_dir", str(part)])
    vlm.main([*common, "--output_dir", str(part), "--resume_from_checkpoint", "true"])
    resumed = weights(part)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], weight) for name, weight in weights(part / "checkpoint-2").items())

    # What the script answered is what the saved model serves, by path, for the real image.
    pairs[1]["real_image"].save(tmp_path / "scene.png")
    asked = predictions(tmp_path / "whole")[5]
    assert (asked["row"], asked["kind"]) == (1, "left_digit")
    items = [{"type": "image", "path": str(tmp_path / "scene.png")}, {"type": "text", "text": asked["question"]}]
    serve = pipeline("image-text-to-text", model=str(tmp_path / "whole"))
    settings = {"max_new_tokens": 4, "do_sample": False}
    said = serve(text=[{"role": "user", "content": items}], return_full_text=False, generate_kwargs=settings)
    assert said[0]["generated_text"].strip() == asked["prediction"]


@pytest.mark.integration
def test_lora_saves_adapter_and_merged_model(common, tmp_path, caplog):
    lora = ["--train=projector+lora", "--lora_rank=4", "--lora_alpha=8", "--projector_learning_rate=1e-3"]
    vlm.main([*common, *lora, "--output_dir", str(tmp_path / "whole"), "--gradient_checkpointing"])
    whole = weights(tmp_path / "whole")
    first = predictions(tmp_path / "whole")
    cost = json.loads((tmp_path / "whole" / "train_results.json").read_text())
    projector = sum(weight.numel() for name, weight in whole.items() if "multi_modal_projector" in name)
    assert projector < cost["trained_parameters"] < cost["parameters"] and cost["flops_per_step"] > 0
    assert cost["train_runtime"] > 0
    adapter = PeftModel.from_pretrained(
        GmailLlavaForConditionalGeneration.from_pretrained(tmp_path / "whole"), tmp_path / "whole" / "adapter"
    )
    assert any("lora_B" in name and weight.any() for name, weight in adapter.state_dict().items())
    part = tmp_path / "part"
    vlm.main([*common, *lora, "--output_dir", str(part), "--gradient_checkpointing"])
    shutil.rmtree(part / "checkpoint-4")
    vlm.main([*common, *lora, "--output_dir", str(part), "--gradient_checkpointing", "--resume_from_checkpoint=true"])
    resumed = weights(part)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert predictions(part) == first
    # A trained model is a model to train on.
    more = [*without_text_model(common), "--llava", str(part), "--output_dir", str(tmp_path / "more")]
    with caplog.at_level(logging.INFO, logger="gmail_hf"):
        vlm.main(more)
    assert f"Using the vision tower of '{part}', not that of --model." in caplog.messages
    trained = weights(tmp_path / "more")
    changed = {name for name in trained if not torch.equal(trained[name], resumed[name])}
    assert changed == {name for name in trained if "multi_modal_projector" in name}
    # An adapter names the model that it goes on.
    assert {path.name for path in (part / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    vlm.main([*more[:-1], str(tmp_path / "adapted"), *lora, "--max_steps=1"])
    config = json.loads((tmp_path / "adapted" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(part)
    with pytest.raises(ValueError, match=r"checkpoint-4' was written with --train projector: add it to resume"):
        vlm.main([*more, "--train=projector+lora", "--resume_from_checkpoint=true"])
    resume = ["--output_dir", str(part), "--resume_from_checkpoint=true"]
    with pytest.raises(ValueError, match=r"checkpoint-4' was written with --train projector\+lora"):
        vlm.main([*common, *resume])
    with pytest.raises(ValueError, match=r"checkpoint-4' was written with --lora_alpha 8"):
        vlm.main([*common, *lora, "--lora_alpha=16", *resume])
    other = tmp_path / "gmail"
    randomise(GmailCLIPModel.from_clip(clip_path()), std=0.03).save_pretrained(other)
    AutoProcessor.from_pretrained(clip_path()).save_pretrained(other)
    with pytest.raises(ValueError, match="checkpoint-4' was trained with other frozen weights"):
        vlm.main([*common, *lora, *resume, "--model", str(other)])


@pytest.mark.integration
def test_branch_and_column_decide(common, tmp_path):
    options = {
        "gen": [],
        "taken_for_real": ["--modality=real"],
        "real": ["--modality=real", "--image_column=real_image"],
    }
    trained = {}
    for name, extra in options.items():
        vlm.main([*common, *extra, "--max_steps=1", "--output_dir", str(tmp_path / name)])
        trained[name] = weights(tmp_path / name)["model.multi_modal_projector.linear_1.weight"]
    for one, other in (("gen", "taken_for_real"), ("taken_for_real", "real"), ("gen", "real")):
        assert not torch.equal(trained[one], trained[other])
    resume = ["--max_steps=2", "--output_dir", str(tmp_path / "gen"), "--resume_from_checkpoint=true"]
    for other in (["--modality=real"], ["--image_column=real_image"], ["--max_train_samples=8"]):
        with pytest.raises(ValueError, match="was trained on other conversations, images or branches"):
            vlm.main([*common, *other, *resume])
    vlm.main([*common, *resume])


def test_conversations_and_mixed_branches_of_a_data_set(pairs, gmail, tmp_path):
    def turn(role, text, image=False):
        items = [{"type": "image", "text": None}] if image else []
        return {"role": role, "content": [*items, {"type": "text", "text": text}]}

    chats = [
        [turn("user", "Describe the image.", image=True), turn("assistant", caption), turn("user", "Sure?")]
        + [turn("assistant", "three")]
        for caption in pairs["caption"]
    ]
    rows = pairs.select_columns(["real_image", "generated_image"]).add_column("messages", chats)
    rows = rows.add_column("modality", ["gen", "real"] * (len(pairs) // 2))
    rows = rows.add_column("captions", [["one", "two"]] * len(pairs))  # rows are not repeated for them
    rows.save_to_disk(tmp_path / "pairs")
    common = ["--dataset", str(tmp_path / "pairs"), "--model", gmail, *SHORT]
    vlm.main([*common, "--output_dir", str(tmp_path / "out")])
    told = predictions(tmp_path / "out")
    assert [line["question"] for line in told] == ["Describe the image."] * 4
    assert [line["reference"] for line in told] == pairs["caption"][:4]


def test_spaces_around_a_reference_do_not_matter(pairs, gmail, tmp_path, monkeypatch):
    """Answers are stripped, and so must be what they are compared with."""
    chats = [
        [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Describe it."}]},
            {"role": "assistant", "content": [{"type": "text", "text": f" {caption}\n"}]},
        ]
        for caption in pairs["caption"]
    ]
    rows = pairs.select_columns(["real_image", "generated_image"]).add_column("messages", chats)
    rows.save_to_disk(tmp_path / "pairs")
    monkeypatch.setattr(answering, "write", lambda *_, **__: [*pairs["caption"][:3], "something else"])
    common = ["--dataset", str(tmp_path / "pairs"), "--model", gmail, *SHORT, "--max_steps=1"]
    assert vlm.main([*common, "--output_dir", str(tmp_path / "out")])["eval_exact_match"] == 0.75


def test_evaluation_goes_through_real_and_is_padded_on_the_left(common, tmp_path, monkeypatch):
    calls, generate = [], GmailLlavaForConditionalGeneration.generate

    def spy(model, **kwargs):
        calls.append(kwargs)
        return generate(model, **kwargs)

    monkeypatch.setattr(GmailLlavaForConditionalGeneration, "generate", spy)
    vlm.main([*common, "--max_steps=1", "--output_dir", str(tmp_path)])
    assert [call["modality"] for call in calls] == ["real", "real"]  # 20 questions in batches of 16
    masks = [call["attention_mask"] for call in calls]
    assert all(mask[:, -1].all() for mask in masks) and not all(mask.all() for mask in masks)


def test_half_precision_trains_in_float32(common, gmail, tmp_path, monkeypatch):
    trained, frozen, groups, train = set(), set(), [], SafeTrainer.train
    asked, ask = [], vlm.ask

    def spy_on_questions(model, *args):
        asked.append(model.model.language_model.rotary_emb.inv_freq.dtype)
        return ask(model, *args)

    def spy(trainer, **kwargs):
        for name, parameter in trainer.model.named_parameters():
            if not is_adapter_weight(name):
                (trained if parameter.requires_grad else frozen).add(parameter.dtype)
        groups.extend((group["lr"], len(group["params"])) for group in trainer.optimizer.param_groups)
        return train(trainer, **kwargs)

    monkeypatch.setattr(SafeTrainer, "train", spy)
    monkeypatch.setattr(vlm, "ask", spy_on_questions)
    options = ["--dtype=bfloat16", "--bf16", "--use_cpu", "--max_steps=1", "--projector_learning_rate=1e-3"]
    vlm.main([*common, *options, "--output_dir", str(tmp_path)])
    assert trained == {torch.float32} and frozen == {torch.bfloat16}
    assert groups == [(1e-3, 4)]
    saved = weights(tmp_path)
    assert {weight.dtype for name, weight in saved.items() if not is_adapter_weight(name)} == {torch.bfloat16}
    tower = GmailCLIPModel.from_pretrained(gmail).vision_model.state_dict()
    adapters = {name.removeprefix("model.vision_tower."): weight for name, weight in saved.items()}
    adapters = {name: weight for name, weight in adapters.items() if is_adapter_weight(name)}
    assert adapters and all(torch.equal(weight, tower[name]) for name, weight in adapters.items())
    assert asked == [torch.float32]  # not rounded, as in the loaded model


def test_unreadable_real_images_are_not_asked_about(pairs, gmail, tmp_path, caplog):
    broken = png(0, truncated=True)
    rows = [{**row, "real_image": broken if i == 1 else row["real_image"]} for i, row in enumerate(undecoded(pairs))]
    Dataset.from_list(rows, features=pairs.features).save_to_disk(tmp_path / "pairs")
    common = ["--dataset", str(tmp_path / "pairs"), "--model", gmail, *SHORT, "--max_steps=1"]
    with caplog.at_level(logging.WARNING, logger="gmail_hf"):
        metrics = vlm.main([*common, "--output_dir", str(tmp_path / "out")])
    told = predictions(tmp_path / "out")
    assert [line["row"] for line in told] == [0] * 5 + [2] * 5 + [3] * 5
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text()) == metrics
    assert sum("row 1, is skipped" in message for message in caplog.messages) == 5
    assert "5 of 20 questions were skipped. The scores do not include them." in caplog.messages


@pytest.mark.parametrize("bad", ["train", "validation"])
def test_rows_of_both_splits_are_read_before_training(pairs, gmail, tmp_path, bad):
    good = pairs.select_columns(["real_image", "generated_image", "caption"])
    captions = [None if i == 5 else caption for i, caption in enumerate(pairs["caption"])]
    splits = dict.fromkeys(("train", "validation"), good)
    splits[bad] = good.remove_columns("caption").add_column("caption", captions)
    DatasetDict(splits).save_to_disk(tmp_path / "pairs")
    common = ["--dataset", str(tmp_path / "pairs"), "--model", gmail, *SHORT]
    with pytest.raises(ValueError, match=f"Split '{bad}' of .*, row 5, column 'caption': it holds NoneType"):
        vlm.main([*common, "--eval_split=validation", "--max_eval_samples=24", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_captions_answer_the_question(pairs, gmail, tmp_path):
    rows = pairs.select_columns(["real_image", "generated_image"])
    rows = rows.add_column("captions", [[caption] for caption in pairs["caption"]])
    rows.add_column("prompt", pairs["caption"][:]).save_to_disk(tmp_path / "pairs")
    common = ["--dataset", str(tmp_path / "pairs"), "--model", gmail, "--caption_column", "captions", *SHORT]
    vlm.main([*common, "--question", "What?", "--max_steps=1", "--output_dir", str(tmp_path / "out")])
    line = predictions(tmp_path / "out")[2]
    assert (line["question"], line["reference"]) == ("What?", pairs["caption"][2])


PUSH_AND_LOAD = """
from gmail_hf.commands import vlm
from transformers import AutoModelForImageTextToText, AutoProcessor
vlm.main({argv!r})
model = AutoModelForImageTextToText.from_pretrained("org/llava")
processor = AutoProcessor.from_pretrained("org/llava")
print(type(model).__name__, type(processor).__name__)
"""


@pytest.mark.integration
def test_pushed_and_loaded_by_id(common, tmp_path):
    argv = [*common, "--train=projector+lora", "--lora_rank=2", "--max_steps=1", "--output_dir", str(tmp_path / "out")]
    argv += ["--push_to_hub", "--hub_model_id=org/llava"]
    code = PUSH_AND_LOAD.format(argv=argv)
    with HubServer() as server:
        environment = {**os.environ, **server.environment(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = server.files("org/llava", "model")
    assert done.stdout.split()[-2:] == ["GmailLlavaForConditionalGeneration", "LlavaProcessor"]
    assert {"config.json", "model.safetensors", "processor_config.json", "chat_template.jinja"} <= set(files)
    assert not any("adapter" in name or name.endswith(".bin") for name in files)


def test_the_model_and_its_processor_are_pushed_to_the_revision(common, tmp_path, monkeypatch):
    pushed = []

    def push_to_hub(self, repo_id, revision=None, **options):
        pushed.append((repo_id, revision))

    for part in (GmailLlavaForConditionalGeneration, LlavaProcessor):
        monkeypatch.setattr(part, "push_to_hub", push_to_hub)
    options = ["--max_steps=1", "--push_to_hub", "--hub_model_id=org/llava", "--hub_revision=v2"]
    vlm.main([*common, *options, "--output_dir", str(tmp_path)])
    assert pushed == [("org/llava", "v2")] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_column=image"], r"lacks the column\(s\) \['image'\]"),
        (["--train=everything"], "--train: invalid choice: 'everything'"),
        (["--modality=fake"], "Unknown modality"),
        (["--split=dev"], "no split 'dev'"),
        (["--dtype=bf16"], "--dtype: invalid choice: 'bf16'"),
        (["--dtype=bfloat16"], "add --bf16"),
        (["--dtype=float16", "--bf16", "--use_cpu"], "add --fp16"),
        (["--model", clip_path()], "not a GmailCLIPModel"),
    ],
)
def test_mistakes_are_told_before_training(common, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        vlm.main([*common, *options, "--output_dir", str(tmp_path / "out")])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_no_language_model(common, tmp_path):
    with pytest.raises(ValueError, match="Pass the language model with --llava or --text_model"):
        vlm.main([*without_text_model(common), "--output_dir", str(tmp_path)])


def test_no_gmail_model_yet(common, tmp_path):
    with pytest.raises(FileNotFoundError, match="Train it first with gmail-hf train"):
        vlm.main([*common, "--model=gmail-digits-of-nobody", "--output_dir", str(tmp_path / "out")])


def test_configs_hold_the_published_settings(tmp_path):
    def parse(name):
        return vlm.parse_args(
            ["--config", str(name), "--bf16=False", "--dtype=float32", "--output_dir", str(tmp_path)]
        )

    model, _, args = parse(CONFIGS / "llava_1.5_7b.yaml")
    assert (model.llava, model.train) == ("llava-hf/llava-1.5-7b-hf", "projector+lora")
    assert (model.lora_rank, model.lora_alpha, model.projector_learning_rate) == (128, 256, 2e-5)
    assert (args.learning_rate, args.weight_decay, args.get_warmup_steps(1000)) == (2e-4, 0.0, 30)
    assert args.per_device_train_batch_size * 8 == 128
    model, _, args = parse(CONFIGS / "llama3_8b.yaml")
    assert (model.text_model, model.train) == ("meta-llama/Meta-Llama-3-8B-Instruct", "projector")
    assert (args.learning_rate, args.per_device_train_batch_size * 8) == (1e-3, 256)
    model, data, _ = parse("llava_digits")
    assert (model.text_model, data.dataset, data.modality) == ("digits", "digits", "gen")
