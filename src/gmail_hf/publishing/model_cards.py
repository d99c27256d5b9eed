"""Model cards, written from the files in a model's folder or from a configuration that has not been run."""

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..branches.configuration import ATTACHED
from ..branches.peft_folders import outer_prefix
from ..files import write_file
from ..metrics.scores import escaped, label, number
from .detectors import detector_section, update_detector
from .marker import MARKER, card_of_others, own_card, read_card, signed, written_here
from .provenance import CITATION, PAPER, PROVENANCE, of_other_weights, source, weights_digest
from .results import END, NOT_RUN, START, read_json, read_metrics, trainer_results

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# The settings in a card, with their names in config.json, provenance.json and training_args.json.
MODEL_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "trainable_modalities", "text_lora")
LOSS_SETTINGS = (
    *("align_weight", "consistency_weight", "energy_weight", "sliced_wasserstein_weight"),
    *("sliced_wasserstein_projections", "gen_text_weight", "real_text_weight", "token_weight", "token_loss"),
    *("temperature", "images_per_caption", "symmetric", "pairing", "generated_modality", "gather_negatives"),
    "contrastive_mini_batch_size",
)
TRAINING_SETTINGS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "processes"),
    *("learning_rate", "weight_decay", "optim", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("max_grad_norm", "bf16", "fp16", "seed"),
)
# Usual spellings of bases, by class. Other bases are named after their class.
KINDS = {
    "MetaClip2": "MetaCLIP 2",
    "Siglip": "SigLIP",
    "Siglip2": "SigLIP 2",
    "Dinov2": "DINOv2",
    "Dinov2WithRegisters": "DINOv2 with registers",
    "DINOv3ViT": "DINOv3",
}
# The module that computes the pooled embedding, by kind of base.
OWN_HEADS = {"CLIP": "projection", "MetaCLIP 2": "projection"}
COSTS = {
    "train_runtime": "seconds",
    "train_loss": "mean training loss",
    "trained_parameters": "parameters trained",
    "parameters": "all parameters",
    "flops_per_step": "FLOPs per forward and backward pass",
    "peak_memory_bytes": "peak memory, bytes",
}


def model_card(
    folder: str | os.PathLike,
    model_id: str | None = None,
    name: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
) -> ModelCard:
    """
    Write the card of a [`GmailCLIPModel`] from the files in its folder: `config.json`, and the training's
    `training_args.json`, `provenance.json`, `trainer_state.json` and `all_results.json`. The training's files are
    ignored if the folder's adapters differ from the ones recorded in `provenance.json`. A
    detector is described from its own file.

    Args:
        folder: folder of the saved model.
        model_id: id on the Hub. Defaults to the folder's name.
        name: title. Defaults to the last part of the id.
        language, tags: metadata for the Hub.
        license: licence of the model. Defaults to that of its base.

    Raises:
        FileNotFoundError: the folder has no model with branches.
    """
    folder = Path(folder)
    config, known = read_json(folder, "config.json"), read_json(folder, PROVENANCE)
    if "trainable_modalities" not in config:
        raise FileNotFoundError(f"'{folder}' has no config.json of a GmailCLIPModel: save the model first.")
    args, metrics = read_json(folder, "training_args.json"), read_metrics(folder)
    if of_other_weights(folder, known):
        known, args, metrics = {}, {}, {}
    if known.get("resumed"):  # training metrics only cover the last part of a resumed run
        metrics = {name: value for name, value in metrics.items() if not name.startswith("train_")}
    base = known.get("base") or source(
        config["base_model_name_or_path"], config["base_model_revision"], licensed=False
    )
    whole = _whole_class(folder, config)
    # Branches of `attach_branches`, and a folder with only adapters, need the base's repository.
    needs_base = whole or (base["on_hub"] and not any(folder.glob("model*.safetensors")))
    return render_card(
        model_id or folder.absolute().name,
        config,
        {**args, "processes": known.get("processes")},
        base,
        known.get("datasets", {}),
        metrics=metrics,
        environment=known.get("environment"),
        detector=detector_section(folder),
        clip=base if needs_base else None,
        whole=whole,
        name=name,
        language=language,
        license=license,
        tags=tags,
    )


def add_card(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """
    Write the [`model_card`] of a folder without a README.md, or with one that gmail-hf wrote for other weights. In
    another one that gmail-hf wrote, replace what it says about the detector.
    """
    path = Path(folder, "README.md")
    about_others = not own_card(folder) and of_other_weights(folder, read_json(folder, PROVENANCE))
    if about_others or not path.exists():
        write_file(path, str(model_card(folder, repo_id)))
    elif not own_card(folder):
        update_detector(path, folder)


def write_card(folder: str | os.PathLike, repo_id: str | None = None, token: str | None = None, **fields: Any) -> None:
    """
    Write the [`model_card`] of a folder as its README.md, unless a user wrote one.

    Args:
        folder: folder of the saved model.
        repo_id, token: see [`keep_card`].
        fields: `name`, `language`, `license`, `tags`, see [`model_card`].
    """
    if not keep_card(folder, repo_id, token):
        content = str(model_card(folder, repo_id, **fields))
        write_file(Path(folder, "README.md"), content.encode(errors="surrogateescape"))


def keep_card(folder: str | os.PathLike, repo_id: str | None = None, token: str | None = None) -> bool:
    """
    Return whether a user wrote the card of a folder or of a repository.

    Args:
        folder: folder of a model.
        repo_id: repository to which the folder will be pushed. If it has a card that a user wrote, that card is
            downloaded, so that the push does not replace it.
        token: Hub token.
    """
    if own_card(folder):
        return True
    theirs = card_of_others(repo_id, token=token) if repo_id is not None else None
    if theirs is not None:
        write_file(Path(folder, "README.md"), theirs.encode(errors="surrogateescape"))
    return theirs is not None


def take_card(
    folder: str | os.PathLike, repo_id: str, token: str | bool | None = None, tags: list[str] | None = None
) -> bool:
    """
    Download the card of a repository into a folder if it was written after the training of the folder's weights,
    whose files the folder may lack. Return whether this was done.

    Args:
        folder: folder of the saved model, whose detector the card then describes.
        repo_id: the repository.
        token: Hub token.
        tags: further tags.
    """
    try:
        card, known = (hf_hub_download(repo_id, name, token=token) for name in ("README.md", PROVENANCE))
    except EntryNotFoundError:
        return False
    content, known = read_card(card), json.loads(Path(known).read_text(encoding="utf-8"))
    if not written_here(content) or "weights" not in known or weights_digest(folder) != known["weights"]:
        return False
    if tags:
        loaded = ModelCard(content)
        loaded.data.tags = list(dict.fromkeys([*(loaded.data.tags or []), *tags]))
        content = signed(str(loaded))
    path = Path(folder, "README.md")
    write_file(path, content.encode(errors="surrogateescape"))
    update_detector(path, folder)
    return True


def render_card(
    model_id: str,
    config: dict[str, Any],
    args: dict[str, Any],
    base: dict[str, Any],
    datasets: dict[str, dict[str, Any]],
    metrics: dict[str, float] | None = None,
    environment: dict[str, Any] | None = None,
    plan: dict[str, str] | None = None,
    detector: str = "",
    clip: dict[str, Any] | None = None,
    whole: str | None = None,
    name: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
) -> ModelCard:
    """
    Fill the card's template.

    Args:
        model_id: the model's id on the Hub.
        config: contents of `config.json`.
        args: contents of `training_args.json`, and `processes`.
        base: the base model, see [`provenance.source`].
        datasets: data sets by role, as in `provenance.json`.
        metrics: metrics of the training, by the Trainer's names.
        environment: environment of the training, see [`metrics.environment.environment`].
        plan: for a recipe that has not been run: `config` (file name), `comment`, `output_dir`.
        detector: the section about it, see [`detector_section`].
        clip: the base, if the snippets load it from its own repository.
        whole: for branches of [`attach_branches`], the class of transformers that loads the base.
        name, language, license, tags: see [`model_card`].
    """
    metrics = metrics or {}
    name = name or model_id.split("/")[-1]
    trained = "train_dataset" in datasets and plan is None
    eval_results = _eval_results(metrics, datasets)
    base_class = (config.get("architectures") or ["GmailCLIPModel"])[0].removeprefix("Gmail")
    short, has_text = base_class.removesuffix("Model"), "text_lora" in config
    kind = KINDS.get(short, short)
    data = ModelCardData(
        language=language,
        license=license or base["license"],
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if has_text else "image-feature-extraction",
        tags=[
            "gmail",
            short.lower(),
            "lora",
            "synthetic-data",
            *([tags] if isinstance(tags, str) else tags or []),
        ],
        base_model=base["name"] if base["on_hub"] else None,
        datasets=list(dict.fromkeys(pairs["name"] for pairs in datasets.values() if pairs["on_hub"])) or None,
        model_name=name if eval_results else None,
        eval_results=eval_results or None,
    )
    before, after = (
        {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        for prefix in ("before_", "eval_")
    )
    technical = re.compile(r"(.+_)?(runtime|samples_per_second|steps_per_second|model_preparation_time)")
    scores = [
        [label(key)] + ["–" if value is None else number(key, value) for value in (before.get(key), after[key])]
        for key in after
        if not technical.fullmatch(key)
    ]
    gen = next((name for name in config["trainable_modalities"] if name != config["default_modality"]), None)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        name=name,
        model_id=model_id,
        paper=PAPER,
        citation=CITATION,
        base=escaped(base),
        clip=escaped(clip) or {"name": model_id, "revision": None},
        whole=whole,
        pairs=escaped(datasets),
        trained=trained,
        plan=plan,
        unknown="not run yet" if plan else "not recorded",
        real=config["default_modality"],
        gen=gen or config["default_modality"],
        real_is_frozen=config["default_modality"] not in config["trainable_modalities"],
        text_lora=config.get("text_lora", False),
        kind=kind,
        base_class=base_class,
        has_text=has_text,
        own_head=OWN_HEADS.get(kind, "pooling head") if has_text and config.get("head", "own") == "own" else None,
        settings=[
            (key, escaped(values[key]))
            for values, keys in ((config, MODEL_SETTINGS), (args, LOSS_SETTINGS), (args, TRAINING_SETTINGS))
            for key in keys
            if values.get(key) not in (None, "None")
        ],
        scores=scores,
        costs=[(COSTS[key], _rounded(metrics[key])) for key in COSTS if key in metrics],
        environment=escaped(environment),
        detector=detector,
        start=START,
        end=END,
        not_run=NOT_RUN,
    )
    return ModelCard(signed(str(card)))


def _whole_class(folder: Path, config: dict[str, Any]) -> str | None:
    """The class that loads the base of branches of `attach_branches`; None for a model with a class of gmail-hf."""
    if not config["model_type"].startswith(ATTACHED):
        return None
    prefix = outer_prefix(folder / config["modalities"][0] / "adapter_model.safetensors")
    if prefix.startswith("model."):
        return "AutoModelForImageTextToText"
    return "AutoModel" if prefix else config["architectures"][0].removeprefix("Gmail")


def _eval_results(metrics: dict[str, float], datasets: dict[str, dict[str, Any]]) -> list[EvalResult]:
    pairs = datasets.get("eval_dataset")
    return trainer_results(metrics, pairs) if pairs and pairs["name"] else []


def _rounded(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
