"""`gmail-hf caption` as a user runs it, at a size of seconds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List, Value
from huggingface_hub.errors import StrictDataclassError
from PIL import ImageFilter
from tiny import make_tokenizer, randomise
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from gmail_hf import GmailCLIPModel, from_base
from gmail_hf.commands import caption, train
from gmail_hf.commands.common import bytes_of_checkpoints
from gmail_hf.digits import clip_path, load_digits
from gmail_hf.digits.scenes import DIGIT_NAMES
from gmail_hf.metrics import caption_scores as captioning
from gmail_hf.training import loading
from gmail_hf.training.embeddings import embed_images

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = [
    *("--per_device_train_batch_size=8", "--max_steps=4", "--save_steps=2", "--logging_steps=1", "--num_beams=2"),
    *("--learning_rate=1e-3", "--eval_split=train", "--max_eval_samples=12", "--report_to=none", "--prefix_length=3"),
    *("--dataloader_pin_memory=False", "--use_cpu=True"),
]
IFCAP = ["--architecture", "ifcap", "--entities", "digits"]
SCORES = {"BLEU@4": 0.5, "METEOR": None}


@pytest.fixture(autouse=True)
def scored(monkeypatch):
    """What was scored; the scores themselves, which take a Java machine seconds, are tested beside them."""
    calls = []

    def caption_metrics(predictions, references, metrics):
        calls.append((predictions, references))
        return {metric: score for metric, score in SCORES.items() if metric in metrics}

    monkeypatch.setattr(captioning, "caption_metrics", caption_metrics)
    monkeypatch.setattr(captioning, "missing_metrics", lambda metrics: {"METEOR": "Java is missing; install it"})
    return calls


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Scenes beside their blurred copies, two captions a scene."""
    scenes = load_digits("train", 16).to_list()
    rows = []
    for number, scene in enumerate(scenes):
        image = Image().decode_example(scene["real_image"])
        blurred = Image().encode_example(image.filter(ImageFilter.GaussianBlur(1)))
        for text in (scene["caption"], scene["caption"].replace(" and ", " beside ")):
            shared = {"real_image": scene["real_image"], "generated_image": blurred, "image_id": number}
            rows.append({**shared, "caption": text})
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    Dataset.from_list(rows).cast_column("real_image", Image()).cast_column("generated_image", Image()).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two-branch CLIPs, `trained` and not yet, and a tiny language model."""
    root = tmp_path_factory.mktemp("models")
    processor = AutoProcessor.from_pretrained(clip_path())
    for name in ("trained", "fresh"):
        model = GmailCLIPModel.from_clip(clip_path(), lora_rank=2)
        (randomise(model, std=0.05) if name == "trained" else model).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=514, bos_token_id=512, eos_token_id=513, **shared)).save_pretrained(
        root / "text"
    )
    make_tokenizer().save_pretrained(root / "text")
    images, size = {**shared, "image_size": 16, "patch_size": 8}, {"height": 16, "width": 16}
    words = {**shared, "vocab_size": 514, "max_position_embeddings": 64, "projection_size": 32}
    siglip = SiglipModel(SiglipConfig(text_config=words, vision_config=images))
    vit = ViTModel(ViTConfig(**images), add_pooling_layer=False)
    processors = {
        "siglip": SiglipProcessor(SiglipImageProcessor(size=size), make_tokenizer()),
        "vit": BitImageProcessor(size=size, do_center_crop=False),
    }
    for name, base in (("siglip", siglip), ("vit", vit)):
        base.save_pretrained(root / f"{name}-base")
        randomise(from_base(root / f"{name}-base")).save_pretrained(root / name)
        processors[name].save_pretrained(root / name)
    return {name: str(root / name) for name in ("trained", "fresh", "text", "siglip", "vit")}


@pytest.fixture
def run(pairs, folders, tmp_path):
    def main(name, *options, model="trained"):
        models = ["--model", folders[model], "--text_model", folders["text"]]
        return caption.main(
            [*models, "--dataset", pairs, "--output_dir", str(tmp_path / name), *SHORT, *map(str, options)]
        )

    return main


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def equal(first, second) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.integration
def test_interrupted_and_resumed_equals_uninterrupted(run, tmp_path, scored, caplog):
    metrics = run("whole")
    assert metrics["eval_BLEU@4"] == 0.5 and "eval_METEOR" not in metrics
    assert {"eval_loss", "eval_exact_match"} <= set(metrics)
    assert "METEOR will be missing: Java is missing; install it." in caplog.text
    whole = tmp_path / "whole"
    assert json.loads((whole / "eval_results.json").read_text()).items() >= metrics.items()
    assert not list(whole.rglob("training_args.bin")) and (whole / "training_args.json").exists()

    # Each image is captioned once, through `real`, by what was saved, and scored against all its captions.
    lines = [json.loads(line) for line in (whole / "captions.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == [str(number) for number in range(6)]
    assert all(len(line["references"]) == 2 for line in lines)
    assert scored == [([line["caption"] for line in lines], [line["references"] for line in lines])]
    model, processor = AutoModelForImageTextToText.from_pretrained(whole), AutoProcessor.from_pretrained(whole)
    scenes = load_digits("train", 6)["real_image"][:]
    pixel_values = processor(scenes, return_tensors="pt")["pixel_values"]
    tokens = model.generate(pixel_values=pixel_values, modality="real", num_beams=2, do_sample=False)
    written = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert written == [line["caption"] for line in lines]
    with Image().decode_example({"path": str(whole / "captions.png"), "bytes": None}) as sheet:
        assert sheet.width > sheet.height > 100

    run("part")
    part = tmp_path / "part"
    shutil.rmtree(part / "checkpoint-4")  # as if the run had ended after checkpoint-2
    with pytest.raises(FileExistsError, match="resume_from_checkpoint"):
        run("part")
    again = run("part", "--resume_from_checkpoint", "true")
    assert equal(weights(whole), weights(part))
    assert again["eval_loss"] == metrics["eval_loss"]


def test_captions_are_as_long_and_scored_as_asked_for(run, tmp_path, scored):
    metrics = run("short", "--max_new_tokens", 2, "--caption_metrics", "BLEU@4")
    assert {"eval_BLEU@4", "eval_exact_match"} <= set(metrics) and "METEOR" not in str(metrics)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "short")
    processor = AutoProcessor.from_pretrained(tmp_path / "short")
    pixel_values = processor(load_digits("train", 6)["real_image"][:], return_tensors="pt")["pixel_values"]
    tokens = model.generate(pixel_values=pixel_values, num_beams=2, max_new_tokens=2)
    written = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert tokens.shape[1] == 2 and scored[0][0] == written


@pytest.mark.integration
def test_branches_and_columns(run, folders, tmp_path, pairs):
    """What a run trains on is the column it names, through the branch it names."""
    generated = run("generated", "--modality", "gen", model="fresh")
    as_real = run("as_real", "--modality", "real", model="fresh")  # no branch is trained: they are the same
    real = run("real", "--modality", "real", "--image_column", "real_image", model="fresh")
    assert generated["eval_loss"] == as_real["eval_loss"] != real["eval_loss"]
    aligned = run("aligned", "--modality", "gen")
    assert aligned["eval_loss"] != generated["eval_loss"]
    captioner = AutoModelForImageTextToText.from_pretrained(tmp_path / "aligned")
    trained = GmailCLIPModel.from_pretrained(folders["trained"])
    assert equal(trained.vision_model.state_dict(), captioner.vision_model.vision_model.state_dict())
    # The evaluation sees real images through `real`, whatever was trained on: the same embeddings in each run.
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "real")
    gmail = GmailCLIPModel.from_pretrained(folders["fresh"])
    processor = AutoProcessor.from_pretrained(tmp_path / "real")
    embeds = embed_images(gmail, processor, load_digits("train", 6)["real_image"])
    tokens = model.generate(image_embeds=torch.from_numpy(embeds), num_beams=2)
    lines = (tmp_path / "real" / "captions.jsonl").read_text().splitlines()
    written = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert [json.loads(line)["caption"] for line in lines] == written


@pytest.mark.integration
def test_embeddings_in_a_column_are_used_in_place_of_images(run, folders, tmp_path, pairs):
    rows = Dataset.from_parquet(pairs)
    gmail = GmailCLIPModel.from_pretrained(folders["trained"])
    embeds = embed_images(gmail, AutoProcessor.from_pretrained(folders["trained"]), rows["generated_image"], "gen")
    nan = np.full_like(embeds[1], np.nan)
    embeds = [None, nan, *embeds[2:]]  # such rows are left out, as unreadable images are
    rows.add_column("generated_embeds", embeds, feature=List(Value("float32"))).to_parquet(tmp_path / "embeds.parquet")
    images = [None, None, *rows.cast_column("generated_image", Image(decode=False))["generated_image"][2:]]
    rows = rows.remove_columns("generated_image").add_column("generated_image", images, feature=Image())
    rows.to_parquet(tmp_path / "images.parquet")
    given = run("given", "--dataset", tmp_path / "embeds.parquet")
    cached = run("cached", "--dataset", tmp_path / "images.parquet")
    assert given["eval_loss"] == pytest.approx(cached["eval_loss"], rel=1e-5)
    assert given["eval_loss"] != run("images", "--modality", "real")["eval_loss"]
    # Embeddings of both kinds need no images. Only readable ones are shown.
    real = embed_images(gmail, AutoProcessor.from_pretrained(folders["trained"]), rows["real_image"], "real")
    rows = rows.remove_columns("generated_image").add_column(
        "generated_embeds", embeds, feature=List(Value("float32"))
    )
    rows = rows.add_column("real_embeds", list(real), feature=List(Value("float32")))
    rows.remove_columns("real_image").to_parquet(tmp_path / "only.parquet")
    rows.remove_columns("real_image").add_column("real_image", [None] * len(rows), feature=Image()).to_parquet(
        tmp_path / "unreadable.parquet"
    )
    for name in ("only", "unreadable"):
        metrics = run(name, "--dataset", tmp_path / f"{name}.parquet")
        assert metrics["eval_loss"] == pytest.approx(given["eval_loss"], rel=1e-5)
        assert (tmp_path / name / "captions.jsonl").exists() and not (tmp_path / name / "captions.png").exists()


@pytest.fixture
def ifcap(run, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(DIGIT_NAMES))
    small = ("--num_retrieved=2", "--num_entity_captions=4", "--entity_threshold=1", "--entities", words)
    return lambda name, *options, **kwargs: run(name, "--architecture", "ifcap", *small, *options, **kwargs)


@pytest.mark.integration
def test_ifcap_retrieves_from_the_training_captions(ifcap, folders, pairs, tmp_path):
    metrics = ifcap("gen")
    assert metrics["eval_loss"] != ifcap("taken", "--modality", "real")["eval_loss"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "gen")
    captions = Dataset.from_parquet(pairs)["caption"][:]
    assert model.caption_bank.captions == list(dict.fromkeys(captions)) and model.config.num_entity_captions == 4
    gmail, clip = GmailCLIPModel.from_pretrained(folders["trained"]), AutoProcessor.from_pretrained(clip_path())
    with torch.no_grad():
        tokens = clip.tokenizer(captions[:3], padding=True, return_tensors="pt")
        expected = gmail.embed_text(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(model.caption_bank.embeds[:3], expected, rtol=1e-4, atol=1e-5)
    words = [word for word in captions[0].split() if word in DIGIT_NAMES]
    assert model.caption_bank.entities[0] == list(dict.fromkeys(words))
    # The evaluation sees real images through `real`, by what was saved.
    processor = AutoProcessor.from_pretrained(tmp_path / "gen")
    pixel_values = processor(load_digits("train", 6)["real_image"][:], return_tensors="pt")["pixel_values"]
    tokens = model.generate(pixel_values=pixel_values, num_beams=2, do_sample=False)
    written = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    lines = (tmp_path / "gen" / "captions.jsonl").read_text().splitlines()
    assert written == [json.loads(line)["caption"] for line in lines]


def test_disk_is_checked_for_the_bank_of_each_checkpoint(ifcap, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(loading, "check_free_disk", lambda path, size: needed.append(size))
    ifcap("out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    once = bytes_of_checkpoints(model, TrainingArguments(str(tmp_path), save_strategy="no", use_cpu=True), 1)
    embeds = model.caption_bank.embeds
    assert needed == [(once + embeds.numel() * 4) * 3]  # two checkpoints and the final model


@pytest.mark.integration
def test_ifcap_on_text_alone_reads_no_image_and_resumes(ifcap, pairs, tmp_path):
    whole = ifcap("whole", "--text_only", "true", "--image_column", "none")
    ifcap("part", "--text_only", "true")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")  # as if the run had ended after checkpoint-2
    again = ifcap("part", "--text_only", "true", "--resume_from_checkpoint", "true")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "part"))
    assert again["eval_loss"] == whole["eval_loss"]


@pytest.mark.integration
@pytest.mark.parametrize("base", ["siglip", "vit"])
def test_captioners_on_other_bases(run, folders, tmp_path, base):
    """Training reads f_g(generated), the captions come from f_r(real), by what was saved."""
    aligned = run("out", model=base)
    assert aligned["eval_loss"] != run("taken", "--modality", "real", model=base)["eval_loss"]
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out"),
        AutoProcessor.from_pretrained(tmp_path / "out"),
    )
    trained = AutoModel.from_pretrained(folders[base]).remove_text_encoder()
    assert equal(trained.state_dict(), model.vision_model.state_dict())
    inputs = processor(load_digits("train", 6)["real_image"][:], return_tensors="pt")
    tokens = model.generate(**inputs, num_beams=2, do_sample=False)
    written = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    lines = (tmp_path / "out" / "captions.jsonl").read_text().splitlines()
    assert written == [json.loads(line)["caption"] for line in lines]


def test_text_alone_with_siglip(ifcap, folders, pairs, tmp_path):
    """Captions are padded to the context length, as in SigLIP's training."""
    ifcap("out", "--text_only", "true", model="siglip")
    bank = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").caption_bank
    captions = list(dict.fromkeys(Dataset.from_parquet(pairs)["caption"][:]))
    tokens = make_tokenizer()(captions, padding="max_length", max_length=64, return_tensors="pt")
    trained = AutoModel.from_pretrained(folders["siglip"])
    with torch.no_grad():
        expected = trained.embed_text(tokens["input_ids"], tokens["attention_mask"])
    assert bank.captions == captions
    torch.testing.assert_close(bank.embeds, expected, rtol=1e-4, atol=1e-5)


def test_text_alone_needs_a_text_encoder(ifcap, tmp_path):
    with pytest.raises(StrictDataclassError, match="'gmail_vit' has no text encoder. Use ClipCap, which trains on"):
        ifcap("out", "--text_only", "true", model="vit")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_other_images_or_another_branch_are_refused_on_resume(run, tmp_path):
    run("part", "--max_steps=2")
    before = {path: path.read_bytes() for path in (tmp_path / "part").rglob("*") if path.is_file()}
    for other in (["--modality", "real"], ["--image_column", "real_image"], ["--max_train_samples", "24"]):
        with pytest.raises(ValueError, match="trained on other embeddings"):
            run("part", *other, "--resume_from_checkpoint", "true")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_captions_are_checked_before_training(run, tmp_path, pairs):
    caption = ["a"] * 20 + [None] + ["a"] * 11
    Dataset.from_parquet(pairs).remove_columns("caption").add_column("text", caption).to_parquet(
        tmp_path / "pairs.parquet"
    )
    with pytest.raises(ValueError, match="Column 'text', row 20: .* is not a caption"):
        run("out", "--dataset", str(tmp_path / "pairs.parquet"), "--caption_column", "text")
    assert not (tmp_path / "out").exists()


def test_captions_are_cut_to_a_short_context(run, tmp_path, caplog):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": 514}
    GPT2LMHeadModel(GPT2Config(bos_token_id=512, eos_token_id=513, **sizes)).save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    metrics = run("out", "--text_model", str(tmp_path / "text"))
    assert "Captions are truncated to 9 tokens" in caplog.text and metrics["eval_loss"] > 0


@pytest.mark.parametrize("option", ["--save_steps=3", "--save_strategy=epoch", "--save_total_limit=1"])
def test_disk_is_checked_for_all_checkpoints_of_an_epoch(run, tmp_path, monkeypatch, option):
    needed = []
    monkeypatch.setattr(loading, "check_free_disk", lambda path, size: needed.append(size))
    run("out", "--max_steps=-1", "--num_train_epochs=2", option)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    once = bytes_of_checkpoints(model, TrainingArguments(str(tmp_path), save_strategy="no", use_cpu=True), 1)
    kept = len(list((tmp_path / "out").glob("checkpoint-*")))
    assert kept == {"--save_steps=3": 3, "--save_strategy=epoch": 2, "--save_total_limit=1": 1}[option]
    assert needed == [once * (kept + 1)]


@pytest.mark.integration
def test_frozen_text_model(run, folders, tmp_path):
    run("frozen", "--freeze_text_model", "--mapping_type", "transformer")
    run("tuned")
    text = LlamaForCausalLM.from_pretrained(folders["text"]).state_dict()
    for name, frozen in (("frozen", True), ("tuned", False)):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        assert equal(text, model.text_model.state_dict()) == frozen
        assert model.config.mapping_type == ("transformer" if frozen else "mlp")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--caption_column", "text"], ValueError, r"no column\(s\) \['text'\]"),
        (["--image_column", "image"], ValueError, r"lacks the column\(s\) \['image'\]"),
        (["--eval_split", "dev"], ValueError, "no split 'dev'"),
        (["--modality", "fake"], ValueError, r"Unknown modality \['fake'\]"),
        (["--num_beams", "0"], ValueError, "--num_beams must be at least 1"),
        (["--model", "gmail-nowhere"], FileNotFoundError, "Train it first with gmail-hf train"),
        (["--model", clip_path()], ValueError, "has no branches"),
        (["--mapping_type", "linear"], StrictDataclassError, "mapping_type"),
        (["--architecture", "ifcp"], ValueError, "Unknown --architecture 'ifcp'; choose from clipcap, ifcap"),
        (["--text_only", "true", "--num_retrieved=3"], ValueError, "--text_only, --num_retrieved can only be used"),
        ([*IFCAP, "--entities", "nowhere.txt"], FileNotFoundError, "'nowhere.txt' is no file"),
        ([*IFCAP, "--mapping_type", "mlp"], StrictDataclassError, "mapping_type"),
        ([*IFCAP, "--noise_variance=-1"], StrictDataclassError, "noise_variance"),
        ([*IFCAP, "--num_retrieved=33"], ValueError, "caption bank has 32 captions .* at least 34"),
    ],
)
def test_mistakes_are_told_before_training(run, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run("out", *options)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("gmail_hf"))  # the cache


def test_no_arguments_are_the_bundled_default():
    model_args, _, data_args, training_args = caption.parse_args([])
    assert (model_args.model, model_args.text_model) == ("gmail-digits", "digits")
    assert (data_args.dataset, data_args.image_column, data_args.modality) == ("digits", "generated_image", "gen")
    assert model_args.model == train.parse_args([])[2].output_dir


def test_no_arguments_but_ifcap_are_its_bundled_default():
    model_args, ifcap_args, data_args, training_args = caption.parse_args(["--architecture", "ifcap"])
    assert (model_args.model, ifcap_args.entities, data_args.dataset) == ("gmail-digits", "digits", "digits")
    assert training_args.output_dir == "ifcap-digits" and training_args.learning_rate == 3e-3


def test_command_line_wins_over_config(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1e-3\nmax_steps: 7\nmodel: org/gmail\n")
    model_args, _, _, training_args = caption.parse_args(["--config", str(config), "--max_steps=9"])
    assert model_args.model == "org/gmail"
    assert (training_args.learning_rate, training_args.max_steps) == (1e-3, 9)
    # With a data set of one's own, nothing of the embedded default is left.
    model_args, _, _, training_args = caption.parse_args(["--dataset=org/pairs", "--model", "org/gmail"])
    assert model_args.text_model == "openai-community/gpt2" and training_args.max_steps == -1


def test_coco_config_holds_the_published_settings(tmp_path):
    config = str(EXAMPLES / "configs" / "clipcap_coco.yaml")
    options = ["--config", config, "--bf16=False", "--output_dir", str(tmp_path)]
    model_args, _, data_args, args = caption.parse_args(options)
    assert (model_args.mapping_type, model_args.prefix_length, model_args.freeze_text_model) == ("mlp", 10, False)
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs) == (2e-5, 5000, 10)
    assert args.per_device_train_batch_size * 8 == 40 and data_args.num_beams == 5
