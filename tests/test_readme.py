"""The README's Python runs as it stands, on a small model in place of the ids of the Hub."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Image
from PIL import ImageFilter
from transformers import AutoProcessor

from gmail_hf import GmailCLIPModel
from gmail_hf.digits import clip_path, load_digits

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory) -> dict:
    """What the snippets take as given: a trained model's folder, two images, some pairs."""
    folder = tmp_path_factory.mktemp("readme")
    processor = AutoProcessor.from_pretrained(clip_path())
    model = GmailCLIPModel.from_clip(clip_path())
    torch.manual_seed(0)
    for _, parameter in model.adapter_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "trained")
    processor.save_pretrained(folder / "trained")
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
    code = snippet.replace("org/gmail-coco", str(namespace["folder"] / "trained"))
    code = code.replace("openai/clip-vit-base-patch32", clip_path())
    code = code.replace('"gmail-coco"', repr(str(namespace["folder"] / "own")))
    variables = dict(namespace)
    exec(compile(code, str(README), "exec"), variables)
    if "all_generated" in variables:
        features = variables["features"]
        assert features.shape == (2, 64)
        torch.testing.assert_close(features[1], variables["all_generated"][1])
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
    assert len(SNIPPETS) == 4
