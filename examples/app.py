"""
A demo page: score an image against texts with both branches, and compare a real image with a generated one.

The bundled digits, after `gmail-hf train` has written gmail-digits (needs `pip install "gmail-hf[app,digits]"`):

    python examples/app.py

Any model, with other example pairs:

    python examples/app.py --model org/gmail-coco --dataset org/coco-sd2 --split validation

`--model` may be a plain CLIP. Its two branches are equal, and the page says so. Without gmail-digits, the page uses
the bundled CLIP. The page loads nothing from other servers. Set the address with gradio's variables
(GRADIO_SERVER_NAME, GRADIO_SERVER_PORT, GRADIO_SHARE).
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmail_hf.commands.cli import run
from gmail_hf.commands.common import PAIRS, REVISION
from gmail_hf.commands.options import option, parse

if TYPE_CHECKING:
    from PIL.Image import Image

    from gmail_hf import GmailCLIPModel

DEFAULT_MODEL = "gmail-digits"
NUM_EXAMPLES = 6
BRANCHES = ("real", "gen")
TITLE = "GMAIL: one CLIP, two image branches"
INTRODUCTION = (
    "Photographs use the `real` branch, generated images use the `gen` branch. Training aligned the `gen` embeddings "
    "of generated images with the `real` embeddings of real images "
    "([Mo & Yun, ICML 2025](https://arxiv.org/abs/2602.15368))."
)
# Small images fill their frame without blur.
CSS = """
.pixels img { image-rendering: pixelated; }
.pixels .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.similarity { display: grid; grid-template-columns: 1fr auto; gap: .3em; margin: .9em 0; }
.similarity > i { grid-column: span 2; border-radius: 1em; background: var(--border-color-primary); }
.similarity i { display: block; height: .7em; border-radius: 1em; }
"""


@dataclass
class AppArguments:
    _argument_group_name = "page"

    model: str = option("Hub id or folder of a GmailCLIPModel or a CLIP.", DEFAULT_MODEL)
    model_revision: str | None = option(REVISION)
    dataset: str = option(PAIRS, "digits")
    split: str = option("Split of --dataset.", "test")


def load(name: str, revision: str | None = None) -> tuple["GmailCLIPModel", Any, str]:
    """
    Load a model and its processor, and describe it for visitors.

    A plain CLIP gets fresh branches, which are equal. If the default model does not exist, the bundled CLIP is loaded.
    """
    import torch

    from gmail_hf.commands.common import load_two_branches

    missing = name == DEFAULT_MODEL and not Path(name).is_dir()
    model, processor = load_two_branches("digits" if missing else name, None if missing else revision)
    if missing:
        note = (
            f"**Not trained yet: both branches are still the same CLIP, so every score is shown twice.** `{name}` "
            "does not exist here. `gmail-hf train` creates it in minutes. Then start this page again."
        )
    elif model.is_base("gen"):
        note = (
            f"**`{name}` is not aligned: both branches are the same CLIP, so every score is shown twice.** Align it "
            f"with `gmail-hf train --model {name} --dataset ...`."
        )
    else:
        note = f"Model: `{name}`."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), processor, note


def score(model: "GmailCLIPModel", processor: Any, image: "Image", texts: list[str]) -> dict[str, dict[str, float]]:
    """
    Zero-shot probabilities of texts for an image, with each branch.

    Returns:
        `{"real": {text: probability}, "gen": ...}`. The probabilities of a branch sum to one.

    Raises:
        ValueError: there is no text, or a text is too long for the model.
    """
    import torch

    from gmail_hf.models.base import text_options

    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not texts:
        raise ValueError("Write at least one text, one per line.")
    options = text_options(model)
    for text, ids in zip(texts, processor.tokenizer(texts)["input_ids"], strict=True):
        if len(ids) > options["max_length"]:
            limit = options["max_length"]
            raise ValueError(f"'{text[:40]}...' has {len(ids)} tokens; the limit of this model is {limit}.")
    inputs = processor(text=texts, images=[image] * len(BRANCHES), return_tensors="pt", **options)
    with torch.no_grad():
        logits = model(**inputs.to(model.device), modality=list(BRANCHES)).logits_per_image  # (branches, texts)
    scores = [dict(zip(texts, row, strict=True)) for row in logits.softmax(-1).tolist()]
    return dict(zip(BRANCHES, scores, strict=True))


def compare(model: "GmailCLIPModel", processor: Any, real: "Image", generated: "Image") -> dict[str, float]:
    """
    Cosine similarity of a real image through `real` and a generated image, through `real` like a photograph and
    through `gen`.
    """
    import torch

    pixel_values = processor(images=[real, generated, generated], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        photograph, *others = model.embed_images(pixel_values.to(model.device), ["real", "real", "gen"])
    return {name: float(photograph @ other) for name, other in zip(BRANCHES, others, strict=True)}


def examples(name: str, split: str) -> list[dict[str, Any]]:
    """
    The first readable pairs of a data set with different captions: `real_image`, `generated_image`, `caption`.

    Raises:
        ValueError: a column is missing, or no row can be read.
    """
    from gmail_hf.commands.bundled import load_pairs
    from gmail_hf.training.data import BadImageError, decode_image, undecoded

    pairs = load_pairs(name, split, max_samples=4 * NUM_EXAMPLES)
    missing = [column for column in ("real_image", "generated_image", "caption") if column not in pairs.column_names]
    if missing or not len(pairs):
        raise ValueError(f"The page needs pairs; '{name}' has {len(pairs)} rows and lacks the columns {missing}.")
    rows = {}
    for row in undecoded(pairs):
        try:
            images = {column: decode_image(row[column]) for column in ("real_image", "generated_image")}
        except BadImageError:
            continue
        rows[row["caption"]] = {**images, "caption": row["caption"]}
    if not rows:
        raise ValueError(f"None of the first {len(pairs)} pairs of '{name}' can be read.")
    return list(rows.values())[:NUM_EXAMPLES]


def read_upload(upload: dict[str, Any] | None) -> "Image":
    """Read an uploaded image. It is checked here, so that the message has the file name and the remedy."""
    import gradio as gr

    from gmail_hf.training.data import BadImageError, decode_image

    if upload is None:
        raise gr.Error("Choose an image first: drop one in, or click on an example.", print_exception=False)
    # Callers of the endpoint can send any path. Gradio keeps uploads and examples in this folder.
    uploads = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir(), "gradio"))
    if not Path(str(upload.get("path"))).resolve().is_relative_to(uploads.resolve()):
        raise gr.Error("This is not an uploaded image.", print_exception=False)
    try:
        return decode_image({"bytes": None, "path": upload["path"]})
    except BadImageError as error:
        name = upload.get("orig_name") or "This file"
        raise gr.Error(f"{name} cannot be read; try a PNG, JPEG or WebP.", print_exception=False) from error


def similarity_bars(similarities: dict[str, float]) -> str:
    """Two bars, in the colours of the page's theme."""
    titles = {"real": "taken for real", "gen": "through <b>gen</b>"}
    colors = {"real": "neutral-400", "gen": "primary-500"}
    rows = [
        f'<div class="similarity"><span>{titles[name]}</span><b>{value:.3f}</b><i><i style="width:'
        f'{100 * max(0.0, value):.1f}%;background:var(--{colors[name]})"></i></i></div>'
        for name, value in similarities.items()
    ]
    return "<p>Cosine similarity of the generated image to the real one</p>" + "".join(rows)


def build(model: "GmailCLIPModel", processor: Any, note: str, pairs: list[dict[str, Any]]) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    def on_score(upload, text):
        image = read_upload(upload)
        try:
            return list(score(model, processor, image, text.splitlines()).values())
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def on_image(upload, text):
        return on_score(upload, text) if upload else [None] * len(BRANCHES)

    def on_pair(*uploads):
        if None in uploads:
            return "Choose both images, or click on a pair below."
        return similarity_bars(compare(model, processor, *(read_upload(upload) for upload in uploads)))

    def picture(value, label):
        # Take the unchanged file. Otherwise gradio decodes it before this page can report an error.
        how = {"type": "filepath", "image_mode": None, "format": "png", "sources": ["upload", "clipboard"]}
        return gr.Image(value, label=label, height=280, min_width=220, elem_classes=look, **how)

    first = pairs[0]
    look = ["pixels"] if max(first["real_image"].size) <= 64 else []
    singles = [[pair[f"{side}_image"]] for pair in pairs[: NUM_EXAMPLES // 2] for side in ("real", "generated")]
    couples = [[pair["real_image"], pair["generated_image"]] for pair in pairs]
    captions = "\n".join(pair["caption"] for pair in pairs)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n{INTRODUCTION}\n\n{note}")
        with gr.Tab("Score an image"), gr.Row():
            with gr.Column():
                image = picture(first["generated_image"], "Image")
                gr.Examples(singles, [image], label="Real and generated images in turn", elem_id="images")
                text = gr.Textbox(captions, label="Texts, one per line", lines=NUM_EXAMPLES)
                button = gr.Button("Score", variant="primary")
            with gr.Column(scale=2):
                gr.Markdown("Read `real` for a photograph, and `gen` for a generated image.")
                with gr.Row():
                    look_of_scores = {"min_width": 280, "show_heading": False}
                    labels = [gr.Label(label=name, elem_id=f"{name}-scores", **look_of_scores) for name in BRANCHES]
        with gr.Tab("Compare a pair"), gr.Row():
            with gr.Column(scale=2):
                with gr.Row():
                    couple = [picture(first["real_image"], "Real"), picture(first["generated_image"], "Generated")]
                bars = gr.HTML(elem_id="bars")
            with gr.Column():
                gr.Examples(couples, couple, label="Pairs with the same caption", elem_id="pairs")
        button.click(on_score, [image, text], labels, preprocess=False)
        gr.on([page.load, image.change], on_image, [image, text], labels, preprocess=False)
        gr.on([page.load, *(upload.change for upload in couple)], on_pair, couple, bars, preprocess=False)
    return page


def launch(page: Any, **options: Any) -> tuple[Any, str, str]:
    """Serve the page with the visitor's own fonts and without resources from other servers."""
    import gradio as gr

    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(theme=theme, css=CSS, ssr_mode=False, footer_links=[], max_file_size="20mb", **options)


def main(argv: Sequence[str]) -> None:
    (args,) = parse(argv, "app", __doc__, (AppArguments,))
    if find_spec("gradio") is None:
        raise ImportError('The page needs gradio: install it with `pip install "gmail-hf[app]"`.')
    page = build(*load(args.model, args.model_revision), examples(args.dataset, args.split))
    launch(page)


if __name__ == "__main__":
    run(main)
