"""The README's and the site's Python runs as it stands, on a small model in place of the ids of the Hub."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Image
from PIL import ImageFilter
from transformers import AutoModel, AutoProcessor, IJepaConfig, IJepaModel, ViTConfig, ViTModel

from gmail_hf import GmailCLIPModel, GmailLlavaForConditionalGeneration
from gmail_hf.commands import cli
from gmail_hf.digits import clip_path, llama_path, load_digits
from gmail_hf.vlm import build_processor

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
SHELL = re.compile(r"```bash\n(.*?)```", flags=re.DOTALL)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL |= {"image_size": 32, "patch_size": 8}


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
    vision = ViTConfig(**SMALL)
    ViTModel(vision).save_pretrained(folder / "vision")
    return {
        "photograph": scenes[0]["real_image"],
        "generated": blurred[0],
        "pairs": pairs,
        "processor": processor,
        "folder": folder,
    }


def run(code: str, name: Path, namespace: dict) -> dict:
    folder = namespace["folder"]
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
        "org/some-vision-model": folder / "vision",
    }
    for stand_in, path in stand_ins.items():
        code = code.replace(f'"{stand_in}"', repr(str(path)))
    variables = dict(namespace)
    exec(compile(code, str(name), "exec"), variables)
    return variables


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.strip().splitlines()[-1][:40])
def test_snippet_runs(snippet, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variables = run(snippet, README, namespace)
    if "embeds" in variables:
        assert variables["embeds"].shape == (2, 64) and variables["model"].is_base("real")
        assert not variables["model"].is_base("gen")
    if "gen" in variables:
        trained = GmailCLIPModel.from_pretrained(namespace["folder"] / "trained")
        pixel_values = namespace["processor"](images=[namespace["photograph"]], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = trained.get_image_features(pixel_values, modality="gen").pooler_output
            torch.testing.assert_close(variables["gen"].get_image_features(pixel_values).pooler_output, expected)


def python_of(page: Path) -> str:
    """The page's Python alone, each line where it stands on the page, as a traceback tells it."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        inside = inside and line != "```"
        lines.append(line if inside else "")
        inside = inside or line == "```python"
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page).strip()], ids=lambda page: page.stem)
def test_page_runs(page, namespace, tmp_path, monkeypatch):
    """The snippets of a page, one after the other, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    variables = run(python_of(page), page, namespace)
    if page.stem == "concepts":
        with torch.no_grad(), variables["model"].using("gen"):
            expected = variables["model"].get_image_features(variables["pixel_values"]).pooler_output
        torch.testing.assert_close(variables["both"][1], expected[1])
    if page.stem == "clipcap":
        assert variables["loss"].isfinite()
    if page.stem == "any_vlm":
        assert not hasattr(variables["llava"], "modality")
    if page.stem == "publish":
        model, again = variables["model"].state_dict(), variables["again"].state_dict()
        assert all(torch.equal(again[name], weight) for name, weight in model.items())
    if page.stem == "own_script":
        pixel_values = namespace["processor"](images=namespace["pairs"]["generated_image"][:2], return_tensors="pt")
        with torch.no_grad():
            embeds = variables["clip_gen"].get_image_features(**pixel_values).pooler_output
        embeds = torch.nn.functional.normalize(embeds, dim=-1)
        torch.testing.assert_close(embeds, torch.from_numpy(variables["train_embeds"][:2]), atol=1e-5, rtol=0)
    if page.stem == "add_a_base":
        config = IJepaConfig(**SMALL)
        IJepaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
        model = variables["GmailIJepaModel"].from_base(tmp_path / "base").eval()
        plain = IJepaModel.from_pretrained(tmp_path / "base", add_pooling_layer=False).eval()
        pixel_values = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(pixel_values).last_hidden_state, plain(pixel_values).last_hidden_state)
        for _, parameter in model.adapter_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_adapters(tmp_path / "adapters")
        again = AutoModel.from_pretrained(tmp_path / "adapters")
        assert type(again) is variables["GmailIJepaModel"]
        assert torch.equal(again.embed_images(pixel_values, "gen"), model.embed_images(pixel_values, "gen"))
        assert not torch.allclose(model.embed_images(pixel_values, "gen"), model.embed_images(pixel_values, "real"))
    if page.stem == "your_data":
        for layout in ("table", "folders", "coco", "tars", "single"):
            assert len(variables[layout]) == 4
            for i, row in enumerate(variables[layout]):
                expected = namespace["pairs"][i]
                assert row["caption"] == expected["caption"] and int(row["image_id"]) == i
                for side in ("real_image", "generated_image")[: 1 if layout == "coco" else 2]:
                    assert row[side].convert("RGB").tobytes() == expected[side].tobytes(), (layout, side)
    if page.stem == "quickstart":
        assert not variables["trainer"].model.is_base("gen")


def commands() -> dict[str, set[str]]:
    """The options that README and site give to each command and script."""
    found: dict[str, set[str]] = {}
    for page in [README, *PAGES]:
        for block in SHELL.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                script = re.search(r"examples/\w+\.py|-m gmail_hf[.\w]+|^gmail-hf \w+", line)
                if script:
                    options = re.findall(r"--(\w+)", line[script.end() :].split("#")[0])
                    found.setdefault(script[0], set()).update(options)
    return found


@pytest.mark.parametrize("script", commands())
def test_commands_name_options_that_exist(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as exit:
        if script.startswith("gmail-hf"):
            cli.main([*script.split()[1:], "--help"])
        elif script.startswith("-m"):
            runpy.run_module(script.removeprefix("-m "), run_name="__main__")
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit.value.code == 0
    known = capsys.readouterr().out
    assert not [option for option in commands()[script] if not re.search(rf"--{option}\b", known)]


def test_files_that_commands_name_are_there():
    for page in [README, *PAGES]:
        for path in re.findall(r"(?:examples|benchmarks)/[\w/.]+\.(?:py|yaml)", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_public_name_is_on_the_site():
    entries = set(re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in PAGES), flags=re.MULTILINE))
    documented = set()
    for entry in entries:
        module, _, name = entry.rpartition(".")
        documented.add(id(getattr(importlib.import_module(module), name)))
    packages = ("", ".captioners", ".digits", ".evaluation", ".generation", ".metrics", ".publishing", ".vlm")
    for package in packages:
        module = importlib.import_module(f"gmail_hf{package}")
        public = {name: getattr(module, name) for name in module.__all__}
        assert not [name for name, value in public.items() if callable(value) and id(value) not in documented]


def test_tree_names_every_folder():
    text = README.read_text()
    package = ROOT / "src" / "gmail_hf"
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    files = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    assert not [name for name in [*folders, *files] if f"      {name}" not in text]
    assert len(SNIPPETS) == 2 and len(text.splitlines()) <= 160


# Words that the project's style excludes; quoted texts of tests and results are not looked at.
EXCLUDED = re.compile(
    r"\b(of which|beside|(is|are) told|stands|lies|goes on|comes along|anew|so many|who loads|of (its|their) own)\b",
    re.I,
)


def test_excluded_words_are_not_used():
    folders = [ROOT / name for name in ("docs", "src", "examples", "model_cards", "benchmarks")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".md", ".py", ".jinja", ".yaml")
    ]
    files = [path for path in files if "results" not in path.parts and ".egg-info" not in str(path)]
    found = []
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *files]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := EXCLUDED.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert len(files) > 150 and not found
