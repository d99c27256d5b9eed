"""Scores of a CLIP on digits scenes, real or generated: retrieval of captions and linear probes of the content."""

import numpy as np
import torch
from datasets import Dataset
from PIL.Image import Image
from sklearn.linear_model import LogisticRegression
from transformers import CLIPModel, CLIPProcessor


@torch.no_grad()
def embed_images(model: CLIPModel, processor: CLIPProcessor, images: list[Image]) -> np.ndarray:
    """Unit-normalised image features, float32 `(n, projection_dim)`."""
    embeds = []
    for start in range(0, len(images), 500):
        inputs = processor(images=images[start : start + 500], return_tensors="pt")
        embeds.append(model.get_image_features(**inputs).pooler_output)
    return torch.nn.functional.normalize(torch.cat(embeds), dim=-1).numpy()


@torch.no_grad()
def embed_captions(model: CLIPModel, processor: CLIPProcessor, captions: list[str]) -> np.ndarray:
    """Unit-normalised text features, float32 `(n, projection_dim)`."""
    inputs = processor(text=captions, padding=True, return_tensors="pt")
    return torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1).numpy()


def caption_recall(
    model: CLIPModel, processor: CLIPProcessor, dataset: Dataset, column: str = "real_image"
) -> dict[str, float]:
    """Share of images whose caption is among the K nearest of the distinct captions of `dataset`, K = 1, 5."""
    captions = sorted(set(dataset["caption"]))
    similarity = (
        embed_images(model, processor, dataset[column][:]) @ embed_captions(model, processor, captions).T
    )  # (images, distinct captions)
    own = np.array([captions.index(caption) for caption in dataset["caption"]])
    own_similarity = similarity[np.arange(len(own)), own]
    rank = (similarity >= own_similarity[:, None]).sum(axis=1)  # 1 is best; ties count against the model
    return {f"R@{k}": float((rank <= k).mean()) for k in (1, 5)} | {"captions": len(captions)}


def probe_accuracy(
    train_embeds: np.ndarray, train_labels: np.ndarray, test_embeds: np.ndarray, test_labels: np.ndarray
) -> list[float]:
    """Accuracy of one logistic probe a label column, such as left and right digit.

    Args:
        train_embeds, test_embeds: `(n, dim)`.
        train_labels, test_labels: integers `(n, columns)`.
    """
    scores = []
    for train_column, test_column in zip(np.transpose(train_labels), np.transpose(test_labels), strict=True):
        probe = LogisticRegression(C=100.0, max_iter=2_000).fit(train_embeds, train_column)
        scores.append(float(probe.score(test_embeds, test_column)))
    return scores
