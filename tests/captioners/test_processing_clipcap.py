import os
import subprocess
import sys

import pytest
import torch
from server import HubServer
from tiny import make_tokenizer, picture
from tiny_captioner import make_ifcap
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers import pipeline as make_pipeline

from gmail_hf.captioners import ClipCapConfig, ClipCapForConditionalGeneration, ClipCapProcessor


@pytest.fixture
def folder(gpt2_captioner, processor, tmp_path):
    gpt2_captioner.save_pretrained(tmp_path)
    ClipCapProcessor(processor.image_processor, make_tokenizer()).save_pretrained(tmp_path)
    return tmp_path


def test_one_folder_is_enough(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), ClipCapConfig)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), ClipCapForConditionalGeneration)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, ClipCapProcessor)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()
    images = [picture(0), picture(1)]
    pixel_values = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    inputs = processor(images, ["a cat", "two"], return_tensors="pt", padding=True)
    assert torch.equal(inputs["pixel_values"], pixel_values)
    plain = make_tokenizer()(["a cat", "two"], add_special_tokens=False)["input_ids"]
    for ids, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], plain, strict=True):
        assert ids[mask == 1].tolist() == expected
    assert set(processor(images, return_tensors="pt")) == {"pixel_values"}


def test_pipeline_captions_photographs(folder, gpt2_captioner, processor):
    images = [picture(0), picture(1)]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    tokens = gpt2_captioner.generate(pixel_values=pixel_values, modality="real", max_new_tokens=6)
    expected = make_tokenizer().batch_decode(tokens, skip_special_tokens=True)
    captioner = make_pipeline("image-text-to-text", model=str(folder))
    paths = [str(folder / "0.png"), str(folder / "1.png")]
    together = captioner(paths, text=["", ""], max_new_tokens=6)
    assert [answer["generated_text"] for answer in together] == expected
    (alone,) = captioner(paths[1], text="", max_new_tokens=6)
    assert alone["generated_text"] == expected[1]
    (begun,) = captioner(images[0], text="a cat", max_new_tokens=6)
    assert begun["generated_text"].startswith("a cat")
    captioner.model.modality = "gen"
    tokens = gpt2_captioner.generate(pixel_values=pixel_values, modality="gen", max_new_tokens=6)
    together = captioner(paths, text=["", ""], max_new_tokens=6)
    assert [answer["generated_text"] for answer in together] == make_tokenizer().batch_decode(
        tokens, skip_special_tokens=True
    )


def test_padding_token(processor):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert ClipCapProcessor(processor.image_processor, tokenizer).tokenizer.pad_token == tokenizer.eos_token
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no `eos_token`"):
        ClipCapProcessor(processor.image_processor, tokenizer)


@pytest.mark.integration
def test_pushed_and_loaded_by_id(folder, gmail_folder, text_folders, tmp_path):
    """A process of its own, because huggingface_hub reads where the Hub is when it is imported."""
    script = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
import gmail_hf.captioners
model, processor = AutoModelForImageTextToText.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])
model.push_to_hub("org/captioner")
processor.push_to_hub("org/captioner")
pulled = AutoModelForImageTextToText.from_pretrained("org/captioner")
tokenizer = AutoProcessor.from_pretrained("org/captioner").tokenizer
embeds = torch.randn(2, 24)
print(torch.equal(pulled.generate(image_embeds=embeds), model.generate(image_embeds=embeds)), len(tokenizer))
model = AutoModelForImageTextToText.from_pretrained(sys.argv[2])
model.push_to_hub("org/pushed")
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="org/saved")
for name in ("org/pushed", "org/saved"):
    pulled = AutoModelForImageTextToText.from_pretrained(name)
    print(torch.equal(pulled.generate(image_embeds=embeds), model.generate(image_embeds=embeds)))
"""
    make_ifcap(gmail_folder, text_folders["gpt2"]).save_pretrained(tmp_path / "ifcap")
    with HubServer() as server:
        environment = {**os.environ, **server.environment(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(tmp_path / "ifcap")],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.stdout.split()[-4:] == ["True", "514", "True", "True"], done.stderr
        files = server.files("org/captioner", "model")
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= set(files)
