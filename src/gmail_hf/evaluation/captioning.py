"""Captions of images against references (the paper's Tables 1, 6, 8, 9, 11, 13, 16 and 17)."""

from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..metrics import CLIP_SCORE_PROMPT, clip_score, ref_clip_score
from ..metrics.caption_scores import (
    CAPTION_METRICS,
    EXTRA_CAPTION_METRICS,
    caption_metrics,
    exact_match,
    missing_metrics,
)
from ..training.embeddings import batches
from .answering import chats, write
from .embedding import embed_batch, text_embeds
from .measure import Example, Measured, Settings, interval
from .sources import Source, captioned_images, read_image

# LLaVA-1.5's prompt for captions. Captioners get no prompt.
PROMPT = "Provide a one-sentence caption for the provided image."
FAILED = "it failed; see the warning in the run's output"
MAX_NEW_TOKENS = 64
EXAMPLES = 12
METRICS = (*CAPTION_METRICS, *EXTRA_CAPTION_METRICS)  # the paper's
CLIP_SCORES = ("clip_score", "ref_clip_score")
NO_SCORER = "name a CLIP by --clip_score_model, such as openai/clip-vit-base-patch32, which published figures use"


def missing_caption_metrics(settings: Settings) -> dict[str, str]:
    """Return the caption scores that cannot be computed on this machine, each with a remedy."""
    by_clip = dict.fromkeys(CLIP_SCORES, NO_SCORER) if settings.clip_scorer is None else {}
    return {**missing_metrics(METRICS, settings.word_vectors), **by_clip}


def evaluate_captioning(model: Any, processor: Any, source: Source, settings: Settings) -> Measured:
    """
    Evaluate captions with COCO's scores, CLIPScore, RefCLIPScore and the share that equals a reference.

    Args:
        model: any model of `AutoModelForImageTextToText`, such as [`ClipCapForConditionalGeneration`], in evaluation
            mode, on its device. A chat model is prompted for a one-sentence caption.
        processor: its processor.
        source: captions or pairs. Rows with the same `image_id` are the same image.
        settings: see [`Settings`].

    Returns:
        Scores of [`metrics.caption_metrics`], `clip_score` and `ref_clip_score` by the CLIP `settings.clip_scorer`,
        and `exact_match`, with each caption as a prediction.

    Raises:
        ValueError: an image has no caption or is unreadable.
    """
    references: dict[Any, dict[str, None]] = {}
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    captions: list[str] = []
    thumbnails, embeds = [], []
    with tqdm(desc="Captions", unit="image", disable=not settings.progress) as bar:
        for batch in batches(captioned_images(source, references), settings.batch_size):
            images = [[read_image(cell, f"{source.name}: image {image_id}")] for image_id, cell in batch]
            captions += write(
                model,
                processor,
                images,
                [message] * len(batch) if chats(processor) else None,
                settings.modality,
                num_beams=settings.num_beams,
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            if (scorer := settings.clip_scorer) is not None:
                alone = [row[0] for row in images]
                embeds.append(embed_batch(scorer.model, scorer.processor, alone, "real", bar.n, "CLIPScore"))
            thumbnails += images[: EXAMPLES - len(thumbnails)]
            bar.update(len(batch))
    truths = [list(written) for written in references.values()]
    matches = [exact_match([caption], [truth]) for caption, truth in zip(captions, truths, strict=True)]
    telling = any(matches)  # free captions never equal a reference
    scores = caption_metrics(captions, truths, METRICS, settings.word_vectors)
    by_clip = _clip_scores(np.concatenate(embeds), captions, truths, settings) if embeds else {}
    scores |= {name: float(by_clip[name].mean()) if by_clip else None for name in CLIP_SCORES}
    remedies = missing_caption_metrics(settings)
    return Measured(
        scores={**scores, "exact_match": exact_match(captions, truths)},
        intervals={
            "exact_match": interval(matches, settings),
            **{name: interval(values, settings) for name, values in by_clip.items()},
        },
        counts={"images": len(captions), "references": sum(map(len, truths))},
        missing={name: remedies.get(name, FAILED) for name, score in scores.items() if score is None},
        predictions=[
            {"image_id": image_id, "caption": caption, "references": truth}
            for image_id, caption, truth in zip(references, captions, truths, strict=True)
        ],
        examples=[
            Example(images, caption, truth[0], bool(match) if telling else None)
            for images, caption, truth, match in zip(thumbnails, captions, truths, matches, strict=False)
        ],
    )


def _clip_scores(
    images: np.ndarray, captions: list[str], references: list[list[str]], settings: Settings
) -> dict[str, np.ndarray]:
    """Each caption's scores, from embeddings of the images."""
    scorer, counts = settings.clip_scorer, [len(written) for written in references]
    texts = [CLIP_SCORE_PROMPT + text for text in [*captions, *(text for written in references for text in written)]]
    embeds = text_embeds(scorer.model, scorer.processor, texts, settings, "CLIPScore")
    written, of_references = embeds[: len(captions)], embeds[len(captions) :]
    given = np.split(of_references, np.cumsum(counts)[:-1])
    return {
        "clip_score": clip_score(images, written),
        "ref_clip_score": ref_clip_score(images, written, given),
    }


def sees_through(model: Any, clip: Any) -> bool:
    """Whether a model has the vision tower of `clip`, by the weights of the patch embedding, which is not trained."""
    ours, theirs = (
        next((weight for name, weight in part.named_parameters() if name.endswith("patch_embedding.weight")), None)
        for part in (model, clip)
    )
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return False
    return torch.allclose(ours.detach().cpu().float(), theirs.detach().cpu().float(), rtol=0.01, atol=1e-5)
