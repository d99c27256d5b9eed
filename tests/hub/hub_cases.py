"""
What people do with a Hub, each in a process of its own: `python hub_cases.py CASE FOLDER`, in the environment of a
`HubServer`. A case leaves CASE.safetensors and CASE.json in the folder. Imports are in the cases, because one of them
does without gmail_hf.
"""

import json
import sys
import urllib.request
from pathlib import Path
from unittest import mock

MODALITIES = ("real", "gen")
LABELS = {"candidate_labels": ["a cat", "a dog"]}


def publish(folder, answers):
    """A base; of a model on it the whole, a merged branch, and the adapters alone; pairs; a push that is cut."""
    import numpy as np
    import torch
    from huggingface_hub import constants
    from tiny import make_clip, make_model, make_pairs, make_processor, picture, pixels, randomise, tokens

    from gmail_hf import GmailCLIPModel, GmailTrainer, GmailTrainingArguments
    from gmail_hf.branches.detector import Detector

    make_clip().push_to_hub("org/clip")
    model = make_model("org/clip", text_lora=True)
    answers["base_revision"] = model.config.base_model_revision
    model.detector = Detector(torch.ones(24), torch.tensor(-0.5))
    for left in ("runs/day/events", "checkpoint-1/config.json", "optimizer.pt"):  # of a training, nor these
        (folder / "adapters" / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / "adapters" / left).write_text("{}")
    model.save_adapters(folder / "adapters", push_to_hub=True, repo_id="org/gmail-adapters", private=True)
    model.push_to_hub("org/gmail-coco")
    onto_whole = dict(push_to_hub=True, repo_id="org/gmail-coco")
    answers["onto_whole"] = error_of(lambda: model.save_adapters(folder / "onto_whole", **onto_whole))
    for repo_id in ("org/gmail-coco", "org/gmail-adapters", "org/gmail-coco-gen"):
        make_processor().push_to_hub(repo_id)
    model.to_clip("gen").push_to_hub("org/gmail-coco-gen")
    make_pairs(6).push_to_hub("org/coco-sd2")

    def allow_uploads(count):
        urllib.request.urlopen(f"{constants.ENDPOINT}/test/uploads-left/{count}", data=b"")

    other = make_model("org/clip", lora_rank=2)
    allow_uploads(1)
    with mock.patch("time.sleep"):  # between attempts
        answers["cut"] = error_of(lambda: other.push_to_hub("org/cut"))
    allow_uploads("inf")
    answers["after_cut"] = error_of(lambda: GmailCLIPModel.from_pretrained("org/cut"))
    other.push_to_hub("org/cut")
    answers["after_retry"] = error_of(lambda: GmailCLIPModel.from_pretrained("org/cut"))

    # The base moves on, and is not what these adapters say it is.
    make_clip(seed=9).push_to_hub("org/clip")
    wrong = randomise(GmailCLIPModel.from_clip("org/clip"))
    for repo_id, revision in (("org/wrong-base", answers["base_revision"]), ("org/lost-base", "f" * 40)):
        wrong.config.base_model_revision = revision
        wrong.save_adapters(folder / repo_id, push_to_hub=True, repo_id=repo_id)

    args = GmailTrainingArguments(
        output_dir=str(folder / "run"),
        hub_model_id="org/trained",
        push_to_hub=True,
        hub_strategy="every_save",
        max_steps=2,
        learning_rate=0.1,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        report_to="tensorboard",
        use_cpu=True,
    )
    make_clip().save_pretrained(folder / "base")
    model_to_train = make_model(folder / "base")
    pairs = make_pairs(4)
    trainer = GmailTrainer(model_to_train, args, pairs, eval_dataset=pairs, processing_class=make_processor())
    trainer.train()
    (folder / "run" / ".config.json.0123.part").touch()  # of a run that was killed
    trainer.push_to_hub()
    model_to_train.push_to_hub("org/on-local-base")

    inputs = {"pixel_values": pixels(4), "input_ids": tokens(3), "image": torch.from_numpy(np.array(picture(0)))}
    return inputs | outputs(model, inputs) | prefixed("trained.", outputs(model_to_train.eval(), inputs))


def read(folder, answers):
    """All of it back, in a process that has nothing in its cache."""
    import datasets
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, CLIPModel, pipeline

    from gmail_hf import GmailCLIPModel

    def load(name, **keywords):
        return error_of(lambda: GmailCLIPModel.from_pretrained(name, **keywords))

    answers["errors"] = {
        "private": load("org/gmail-adapters", token=False),
        "nowhere": load("org/nowhere"),
        "revision": load("org/gmail-coco", revision="v9"),
        "adapters_revision": load("org/gmail-adapters", revision="v9"),
        "wrong_base": load("org/wrong-base"),
        "lost_base": load("org/lost-base"),
        "clip_revision": error_of(lambda: GmailCLIPModel.from_clip("org/clip", revision="v9")),
    }
    inputs = load_tensors(folder, "publish")
    whole = GmailCLIPModel.from_pretrained("org/gmail-coco")
    adapters, info = GmailCLIPModel.from_pretrained("org/gmail-adapters", output_loading_info=True)
    assert not any(info.values())
    answers["adapters"] = {
        "base": [adapters.config.base_model_name_or_path, adapters.config.base_model_revision],
        "name_or_path": adapters.name_or_path,
        "trained": sorted(name for name, parameter in adapters.named_parameters() if parameter.requires_grad)
        == sorted(name for name, _ in adapters.adapter_parameters()),
    }
    by_hand = GmailCLIPModel.from_clip("org/clip", revision=answers["adapters"]["base"][1], text_lora=True)
    by_hand.load_adapters("org/gmail-coco")
    trained = GmailCLIPModel.from_pretrained("org/trained")
    tensors = {}
    for name, model in {"whole": whole, "adapters": adapters, "by_hand": by_hand, "trained": trained}.items():
        tensors |= prefixed(f"{name}.", outputs(model, inputs))

    clip = CLIPModel.from_pretrained("org/gmail-coco")
    tensors["clip.real"] = clip.get_image_features(inputs["pixel_values"]).pooler_output
    gen = PeftModel.from_pretrained(clip, "org/gmail-coco", subfolder="gen").eval()
    tensors["peft.gen"] = gen.get_image_features(inputs["pixel_values"]).pooler_output

    with mock.patch("builtins.input", side_effect=AssertionError("asked whether to run code")):
        for repo_id in ("org/gmail-coco", "org/gmail-adapters"):
            classifier = pipeline("zero-shot-image-classification", model=repo_id)
            assert type(classifier.model) is GmailCLIPModel
            answers[repo_id] = classifier(picture_of(inputs), **LABELS)
            for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
                options = {"trust_remote_code": True, "attn_implementation": "eager", "default_modality": "gen"}
                model = auto_class.from_pretrained(repo_id, **options)
                assert type(model) is GmailCLIPModel
                assert (model.config._attn_implementation, model.modality) == ("eager", "gen")
        for repo_id in ("org/gmail-coco", "org/trained"):
            AutoProcessor.from_pretrained(repo_id)
    pairs = datasets.load_dataset("org/coco-sd2", split="train")
    pairs.save_to_disk(folder / "pairs")
    return tensors


def offline(folder, answers):
    """Again what [`read`] read, from its cache, without a Hub."""
    from transformers import pipeline

    from gmail_hf import GmailCLIPModel

    inputs, tensors = load_tensors(folder, "publish"), {}
    for name, repo_id in (("whole", "org/gmail-coco"), ("adapters", "org/gmail-adapters")):
        tensors |= prefixed(f"{name}.", outputs(GmailCLIPModel.from_pretrained(repo_id), inputs))
        answers[repo_id] = pipeline("zero-shot-image-classification", model=repo_id)(picture_of(inputs), **LABELS)
    answers["unseen"] = error_of(lambda: GmailCLIPModel.from_pretrained("org/cut"))
    return tensors


def converted(folder, answers):
    """A base whose weights are a pickle, and safetensors in a pull request; adapters on it."""
    from huggingface_hub import HfApi, constants
    from tiny import make_clip, make_processor, pixels, randomise, tokens

    from gmail_hf import GmailCLIPModel
    from gmail_hf.evaluation.load_model import load_model

    make_clip().save_pretrained(folder / "converted")
    make_processor().save_pretrained(folder / "converted")
    (folder / "converted" / "pytorch_model.bin").write_bytes(b"nobody reads this")
    api, repo_id = HfApi(), "org/pickle"
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=folder / "converted", ignore_patterns="*.safetensors")
    api.upload_folder(repo_id=repo_id, folder_path=folder / "converted", allow_patterns="*.safetensors")
    urllib.request.urlopen(f"{constants.ENDPOINT}/test/converted/{repo_id}", data=b"")

    model = randomise(GmailCLIPModel.from_clip(repo_id, revision=None)).eval()
    answers["revision"] = model.config.base_model_revision
    answers["evaluated"] = load_model(repo_id).revision
    answers["pickle"] = error_of(lambda: GmailCLIPModel.from_clip(repo_id, revision=f"{1:040x}"))
    model.save_adapters(folder / "on_pickle", push_to_hub=True, repo_id="org/on-pickle")
    again = GmailCLIPModel.from_pretrained("org/on-pickle")
    inputs = {"pixel_values": pixels(2), "input_ids": tokens(2)}
    return outputs(model, inputs) | prefixed("again.", outputs(again, inputs))


def without_gmail_hf(folder, answers):
    """What is left to those who have transformers and PEFT alone."""

    class Uninstalled:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "gmail_hf":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    sys.meta_path.insert(0, Uninstalled())
    answers["import"] = error_of(lambda: __import__("gmail_hf"))

    from peft import PeftModel
    from transformers import CLIPModel, CLIPProcessor, pipeline

    inputs = load_tensors(folder, "publish")
    clip = CLIPModel.from_pretrained("org/gmail-coco")
    tensors = {"clip.real": clip.get_image_features(inputs["pixel_values"]).pooler_output}
    gen = PeftModel.from_pretrained(clip, "org/gmail-coco", subfolder="gen").eval()
    tensors["peft.gen"] = gen.get_image_features(inputs["pixel_values"]).pooler_output

    with mock.patch("builtins.input", side_effect=AssertionError("asked whether to run code")):
        merged = CLIPModel.from_pretrained("org/gmail-coco-gen")
        tensors["merged.gen"] = merged.get_image_features(inputs["pixel_values"]).pooler_output
        tensors["merged.logits_gen"] = merged(inputs["input_ids"], inputs["pixel_values"]).logits_per_image
        classifier = pipeline("zero-shot-image-classification", model="org/gmail-coco-gen")
        answers["merged"] = classifier(picture_of(inputs), **LABELS)
        CLIPProcessor.from_pretrained("org/gmail-adapters")
    answers["imported"] = [name for name in sys.modules if name.partition(".")[0] == "gmail_hf"]
    return tensors


def outputs(model, inputs):
    """Everything a model tells of the inputs, by either branch."""
    tensors = {"text": model.get_text_features(inputs["input_ids"]).pooler_output}
    for name in MODALITIES:
        tensors[name] = model.get_image_features(inputs["pixel_values"], modality=name).pooler_output
        logits = model(inputs["input_ids"], inputs["pixel_values"], modality=name).logits_per_image
        tensors[f"logits_{name}"] = logits
    if model.detector is not None:
        auto = model.get_image_features(inputs["pixel_values"], modality="auto")
        tensors |= {"auto": auto.pooler_output, "generated_probability": auto.generated_probability}
    return tensors


def picture_of(inputs):
    from PIL import Image

    return Image.fromarray(inputs["image"].numpy())


def benchmarks(folder, answers):
    """Own benchmarks by Hub id: images with labels, and images with captions."""
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from tiny import picture

    from gmail_hf.commands.bundled import get_benchmark
    from gmail_hf.evaluation import open_source
    from gmail_hf.evaluation.sources import captions_of
    from gmail_hf.evaluation.zero_shot import class_question
    from gmail_hf.training.data import decode_image

    images = [picture(i) for i in range(3)]
    features = Features(image=Image(), label=ClassLabel(names=["cat", "red_fox"]))
    Dataset.from_dict({"image": images, "label": [1, 0, 1]}, features).push_to_hub("org/labels", split="validation")
    features = Features(image=Image(), text=Value("string"))
    texts = ["a cat", "a dog", "a fox"]
    Dataset.from_dict({"image": images, "text": texts}, features).push_to_hub("org/captions", split="test")
    labels, captions = (open_source(get_benchmark("mine", name), name) for name in ("org/labels", "org/captions"))
    rows = list(labels.read())
    answers["labels"] = [row["cls"] for row in rows]
    answers["same"] = [
        decode_image(row["image"]).tobytes() == image.tobytes() for row, image in zip(rows, images, strict=True)
    ]
    answers["prompts"] = class_question(labels).prompts
    answers["revision"] = labels.revision
    answers["captions"] = [captions_of(row, captions)[1] for row in captions.read()]
    return {}


def addresses(folder, answers):
    """Images at addresses, read one by one, from columns of rows, and copied into captions' rows."""
    import threading
    import zipfile
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    from huggingface_hub import HfApi
    from tiny import make_processor, picture

    from gmail_hf.generation import SynthesisArguments
    from gmail_hf.generation.captions import load_captions
    from gmail_hf.training.data import GmailCollator, decode_image
    from gmail_hf.training.sources import load_rows

    there = folder / "pictures"
    (there / "some").mkdir(parents=True)
    picture(0).save(there / "some" / "0.png")
    (there / "some" / "text.png").write_text("no image")
    with zipfile.ZipFile(there / "all.zip", "w") as archive:
        archive.write(there / "some" / "0.png", "0.png")
    HfApi().create_repo("org/pictures", repo_type="dataset")
    HfApi().upload_folder(repo_id="org/pictures", repo_type="dataset", folder_path=there)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=there))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hf, http = "hf://datasets/org/pictures", f"http://127.0.0.1:{server.server_port}"
    good = [f"{hf}/some/0.png", f"{hf}@main/some/0.png", f"{http}/some/0.png", f"zip://0.png::{there}/all.zip"]
    good += [f"zip://0.png::{hf}/all.zip"]
    bad = [f"{hf}/some/1.png", f"{http}/some/1.png", f"zip://1.png::{hf}/all.zip", "hf://datasets/org/none/0.png"]
    bad += [f"{hf}/some/text.png", f"{http}/some/text.png"]
    content = (there / "some" / "0.png").read_bytes()
    answers["decoded"] = [decode_image(address).tobytes() == picture(0).tobytes() for address in good]
    answers["errors"] = [error_of(lambda address=address: decode_image(address)) or "" for address in bad]
    rows = [{"image": address, "caption": f"picture {i}"} for i, address in enumerate([*good, *bad])]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = SynthesisArguments(dataset=str(folder / "rows.jsonl"), output_dir="none", allow_paths_outside=True)
    captions = load_captions(args)
    cells = [captions.real_image(row) for row in range(len(rows))]
    answers["kept"] = [cell["bytes"] == content for cell in cells[: len(good)]]
    answers["left_out"] = [cell is None for cell in cells[len(good) :]]
    answers["paths"] = [cell["path"] for cell in cells[: len(good)]]
    args.real_images = "reference"
    answers["referenced"] = load_captions(args).real_image(0)["path"] == good[0]
    loaded = load_rows(str(folder / "rows.jsonl"), "train", any_split=True)
    answers["columns"] = str(loaded.features["image"])
    batch = GmailCollator(make_processor())(
        [{"real_image": row["image"], "caption": row["caption"], "image_id": row["caption"]} for row in rows]
    )
    answers["batch"] = [len(batch["real_pixel_values"]), int(batch["skipped_pairs"])]
    return {}


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def error_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def load_tensors(folder, case):
    from safetensors.torch import load_file

    return load_file(Path(folder, f"{case}.safetensors"))


def main(case, folder):
    answers = {}
    tensors = globals()[case](Path(folder), answers)

    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, Path(folder, f"{case}.safetensors"))
    Path(folder, f"{case}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(*sys.argv[1:])
