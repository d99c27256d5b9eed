"""Scores of a CLIP on digits scenes, real or generated: retrieval of captions and linear probes of the content."""

import numpy as np
from datasets import Dataset
from PIL.Image import Image
from sklearn.linear_model import LogisticRegression
from transformers import CLIPModel, CLIPProcessor

from gmail_hf.evaluation import Settings
from gmail_hf.evaluation.embedding import image_embeds, text_embeds
from gmail_hf.metrics import zero_shot_ranks

SETTINGS = Settings(batch_size=500)


def embed_images(model: CLIPModel, processor: CLIPProcessor, images: list[Image]) -> np.ndarray:
    """L2-normalised image features, float32 `(n, projection_dim)`."""
    return image_embeds(model, processor, images, "real", SETTINGS, "images")


def caption_recall(
    model: CLIPModel, processor: CLIPProcessor, dataset: Dataset, column: str = "real_image"
) -> dict[str, float]:
    """Share of images whose caption is among the K nearest of the distinct captions of `dataset`, K = 1, 5."""
    captions = sorted(set(dataset["caption"]))
    own = np.array([captions.index(caption) for caption in dataset["caption"]])
    texts = text_embeds(model, processor, captions, SETTINGS, None)
    ranks = zero_shot_ranks(embed_images(model, processor, dataset[column][:]), texts, own)
    return {f"R@{k}": float((ranks <= k).mean()) for k in (1, 5)} | {"captions": len(captions)}


def probe_accuracy(
    train_embeds: np.ndarray, train_labels: np.ndarray, test_embeds: np.ndarray, test_labels: np.ndarray
) -> list[float]:
    """Accuracy of one logistic probe per label column, such as left and right digit.

    Args:
        train_embeds, test_embeds: `(n, dim)`.
        train_labels, test_labels: integers `(n, columns)`.
    """
    scores = []
    for train_column, test_column in zip(np.transpose(train_labels), np.transpose(test_labels), strict=True):
        probe = LogisticRegression(C=100.0, max_iter=2_000).fit(train_embeds, train_column)
        scores.append(float(probe.score(test_embeds, test_column)))
    return scores
