"""The README's Python runs as it stands, on a small model in place of the ids of the Hub."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Image
from PIL import ImageFilter
from transformers import AutoProcessor

from gmail_hf import GmailCLIPModel, GmailLlavaForConditionalGeneration
from gmail_hf.digits import clip_path, llama_path, load_digits
from gmail_hf.llava import build_processor

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory) -> dict:
    """What the snippets take as given: a trained model's folder, a LLaVA's, two images, some pairs."""
    folder = tmp_path_factory.mktemp("readme")
    processor = AutoProcessor.from_pretrained(clip_path())
    model = GmailCLIPModel.from_clip(clip_path())
    torch.manual_seed(0)
    for _, parameter in model.adapter_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "trained")
    processor.save_pretrained(folder / "trained")
    llava_processor = build_processor(folder / "trained", llama_path())
    llava = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(
        folder / "trained", llama_path(), llava_processor
    )
    llava.to_llava("real").save_pretrained(folder / "llava")
    llava_processor.save_pretrained(folder / "llava")
    scenes = load_digits("train", 32)
    blurred = [image.filter(ImageFilter.GaussianBlur(1)) for image in scenes["real_image"]]
    pairs = scenes.add_column("generated_image", [Image().encode_example(i) for i in blurred], feature=Image())
    return {
        "photograph": scenes[0]["real_image"],
        "generated": blurred[0],
        "pairs": pairs,
        "processor": processor,
        "folder": folder,
    }


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.strip().splitlines()[-1][:40])
def test_snippet_runs(snippet, namespace):
    folder, code = namespace["folder"], snippet
    stand_ins = {
        "org/gmail-coco-336": folder / "trained",
        "org/gmail-coco": folder / "trained",
        "openai/clip-vit-base-patch32": clip_path(),
        "openai-community/gpt2": llama_path(),
        "meta-llama/Meta-Llama-3-8B-Instruct": llama_path(),
        "llava-hf/llava-1.5-7b-hf": folder / "llava",
        "gmail-coco-text": folder / "text",
        "gmail-coco": folder / "own",
        "clipcap-coco": folder / "clipcap",
    }
    for name, path in stand_ins.items():
        code = code.replace(f'"{name}"', repr(str(path)))
    variables = dict(namespace)
    exec(compile(code, str(README), "exec"), variables)
    if "all_generated" in variables:
        features = variables["features"]
        assert features.shape == (2, 64)
        torch.testing.assert_close(features[1], variables["all_generated"][1])
    if "captioner" in variables:
        assert variables["loss"].isfinite()
    if "llava" in variables:
        assert not hasattr(variables["llava"], "modality")
        assert not torch.equal(variables["output"][0], variables["output"][1])
    if "gen" in variables:
        trained = GmailCLIPModel.from_pretrained(namespace["folder"] / "trained")
        pixel_values = namespace["processor"](images=[namespace["photograph"]], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = trained.get_image_features(pixel_values, modality="gen").pooler_output
            torch.testing.assert_close(variables["gen"].get_image_features(pixel_values).pooler_output, expected)


def test_tree_names_every_file():
    text = README.read_text()
    root = README.parent
    listed = [*(root / "src" / "gmail_hf").glob("*.py"), *(root / "examples").glob("*.py")]
    assert not [path.name for path in listed if path.name != "__init__.py" and path.name not in text]
    assert len(SNIPPETS) == 8
