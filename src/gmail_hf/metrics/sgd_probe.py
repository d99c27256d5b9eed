"""A linear classifier trained by SGD on frozen embeddings, for data sets that are too large for `tuned_probe`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .readout import TunedProbe, accuracies, check_splits

if TYPE_CHECKING:
    import torch

# For batches of 256 rows; scaled linearly with the batch size.
LEARNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
BATCH_SIZE = 1024


def sgd_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: np.ndarray | None = None,
    validation_labels: np.ndarray | None = None,
    per_class: bool = False,
    seed: int = 0,
    epochs: int = 90,
    device: str | torch.device = "cpu",
) -> TunedProbe:
    """Linear probe trained by SGD: the protocol of SynCLR's ImageNet probe, on embeddings that are computed once.

    A linear layer is trained on standardised embeddings with softmax cross-entropy and SGD (momentum 0.9, no weight
    decay) in batches of 1,024 rows, with a cosine schedule from one of ten learning rates. The learning rate with the
    best validation score (the lowest in a tie) is chosen. A final layer is trained with it on the train and validation
    rows and scored on the test rows.

    Source: Tian et al., "StableRep", 2023. SynCLR uses its released script for ImageNet, with batch normalisation. The
    script crops and flips the images in each epoch and chooses the learning rate on test images. Here the images are
    embedded once, so standardisation replaces batch normalisation.

    Args:
        train, train_labels, test, test_labels, validation, validation_labels, per_class, seed: as in `tuned_probe`.
            `seed` also draws the initial weights and the batches.
        epochs: passes over the training rows.
        device: device to train on.

    Returns:
        As `tuned_probe`; `chosen` is the learning rate.

    Raises:
        ValueError, ImportError: as `tuned_probe`.
    """
    rows = check_splits(train, train_labels, test, test_labels, validation, validation_labels, seed)
    train, train_labels, test, test_labels, validation, validation_labels = rows
    options = {"epochs": epochs, "seed": seed, "device": device}
    tried = _predictions(train, train_labels, validation, LEARNING_RATES, **options)
    scores = [accuracies(predicted, validation_labels)[per_class] for predicted in tried]
    best = int(np.argmax(scores))
    both, labels = np.concatenate([train, validation]), np.concatenate([train_labels, validation_labels])
    (predicted,) = _predictions(both, labels, test, LEARNING_RATES[best : best + 1], **options)
    return TunedProbe(*accuracies(predicted, test_labels), predicted, LEARNING_RATES[best], scores[best])


def _predictions(rows, labels, others, rates, epochs, seed, device):
    """Train one classifier per learning rate on `rows` and return the labels that each predicts for `others`."""
    import torch

    classes, codes = np.unique(labels, return_inverse=True)
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1)
    inputs, unseen = (torch.from_numpy((x - mean) / scale).float().to(device) for x in (rows, others))  # (n, dim)
    targets, batch = torch.from_numpy(codes).to(device), min(BATCH_SIZE, len(rows))
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.nn.Linear(rows.shape[1], len(classes)) for _ in rates]
    for head in heads:
        torch.nn.init.normal_(head.weight, std=0.01, generator=generator)
        torch.nn.init.zeros_(head.bias)
        head.to(device)
    groups = [{"params": head.parameters(), "lr": rate * batch / 256} for head, rate in zip(heads, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(rows) // batch))
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).to(device)
        for chosen in order[: len(rows) // batch * batch].split(batch):
            losses = [torch.nn.functional.cross_entropy(head(inputs[chosen]), targets[chosen]) for head in heads]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        return [classes[head(unseen).argmax(dim=1).cpu().numpy()] for head in heads]
