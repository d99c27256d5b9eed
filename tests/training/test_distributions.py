"""Energy and sliced Wasserstein distance by hand, and against loops and optimal assignment."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import make_model, make_pairs, pair_losses, pixels
from torch.nn.functional import normalize

from gmail_hf import (
    GmailLossConfig,
    energy_distance_loss,
    sliced_wasserstein_loss,
    token_sliced_wasserstein_loss,
)
from gmail_hf.training.distributions import random_directions
from gmail_hf.training.losses import gmail_loss

LINE = torch.ones(1, 1)  # the only direction in one dimension
CONFIG = GmailLossConfig(align_weight=0.0, sliced_wasserstein_weight=1.0)
BOTH = GmailLossConfig(align_weight=0.0, sliced_wasserstein_weight=20.0, energy_weight=1.0)


def column(*values):
    return torch.tensor(values).unsqueeze(1)


def rows(count, seed, dim=6):
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_assignment(generated, real, directions):
    """The squared distance by an assignment of copies, as many of each image as make both sets equally large."""
    size = math.lcm(len(generated), len(real))
    distances = []
    for direction in directions.T.double().numpy():
        first, second = (
            (embeds.double().numpy() @ direction).repeat(size // len(embeds)) for embeds in (generated, real)
        )
        cost = (first[:, None] - second) ** 2
        distances.append(cost[linear_sum_assignment(cost)].mean())
    return np.mean(distances)


def test_equal_numbers_by_hand():
    # Sorted 0 1 2 against 1 3 5: (1 + 4 + 9) / 3.
    assert sliced_wasserstein_loss(column(2.0, 0.0, 1.0), column(3.0, 1.0, 5.0), LINE).item() == pytest.approx(14 / 3)


def test_unequal_numbers_by_hand():
    # 0 and 6 for half of the mass each, 1 2 3 for a third each: 0-1 for 1/3, 0-2 and 6-2 for 1/6 each, 6-3 for 1/3.
    loss = sliced_wasserstein_loss(column(6.0, 0.0), column(3.0, 1.0, 2.0), LINE)
    assert loss.item() == pytest.approx(1 / 3 + 4 / 6 + 16 / 6 + 9 / 3)


def test_tokens_by_hand():
    # Real tokens 0 and 4 of both images have a standard deviation of 2: they become 0 and 2.
    real = torch.tensor([[[0.0], [4.0]], [[4.0], [0.0]]])
    generated = torch.tensor([[[6.0], [2.0]], [[-6.0], [-2.0]]])
    # 1 3 and -3 -1 against 0 2, image by image; as one caption, -3 -1 1 3 against 0 0 2 2.
    ids = torch.tensor([7, 4])
    assert token_sliced_wasserstein_loss(generated, real, LINE, ids).item() == pytest.approx((1 + 1 + 9 + 9) / 4)
    assert token_sliced_wasserstein_loss(generated, real, LINE).item() == pytest.approx((9 + 1 + 1 + 1) / 4)
    assert token_sliced_wasserstein_loss(real.flip(1), real, LINE, ids).item() == 0
    assert token_sliced_wasserstein_loss(3 * generated + 7, 3 * real + 7, LINE, ids).item() == pytest.approx(5)


def test_captions_by_hand():
    # Caption 7 has 0 2 against 1 3, caption 4 has 5 against 8. The only image of caption 1 has nothing to meet.
    ids, real_ids = torch.tensor([7, 4, 7, 1]), torch.tensor([4, 7, 7])
    loss = sliced_wasserstein_loss(column(2.0, 5.0, 0.0, 9.0), column(8.0, 1.0, 3.0), LINE, ids, real_ids)
    assert loss.item() == pytest.approx(2 / 3 * 1 + 1 / 3 * 9)
    nothing = sliced_wasserstein_loss(column(1.0), column(2.0), LINE, torch.tensor([1]), torch.tensor([2]))
    assert nothing.item() == 0


@pytest.mark.parametrize(("generated", "real"), [(5, 5), (1, 4), (4, 6), (7, 3)])
def test_agrees_with_optimal_assignment(generated, real):
    gen, other, directions = rows(generated, 0), rows(real, 1), random_directions(6, 9, seed=2)
    expected = by_assignment(gen, other, directions)
    assert sliced_wasserstein_loss(gen, other, directions).item() == pytest.approx(expected, rel=1e-5)


def test_captions_are_weighted_by_their_generated_images():
    gen, real, directions = rows(9, 0), rows(8, 1), random_directions(6, 9, seed=2)
    ids, real_ids = torch.tensor([3, 1, 3, 2, 3, 1, 2, 3, 5]), torch.tensor([2, 1, 1, 3, 2, 1, 3, 6])
    counts = {1: 2, 2: 2, 3: 4}
    terms = [n / 8 * by_assignment(gen[ids == c], real[real_ids == c], directions) for c, n in counts.items()]
    loss = sliced_wasserstein_loss(gen, real, directions, ids, real_ids)
    assert loss.item() == pytest.approx(sum(terms), rel=1e-5)


def test_partners_within_a_caption_do_not_matter():
    gen, real, directions = rows(6, 0), rows(6, 1), random_directions(6, 9, seed=2)
    ids, swapped = torch.tensor([1, 1, 1, 2, 2, 2]), [2, 0, 1, 4, 5, 3]
    loss = sliced_wasserstein_loss(gen, real, directions, ids)
    assert sliced_wasserstein_loss(gen, real[swapped], directions, ids) == loss
    assert sliced_wasserstein_loss(gen, real.flip(0), directions, ids) != loss


def test_one_image_per_modality_gives_the_pairs_distance():
    gen, real, directions = rows(5, 0), rows(5, 1), random_directions(6, 20_000, seed=2)
    loss = sliced_wasserstein_loss(gen, real, directions, torch.arange(5))
    assert loss.item() == pytest.approx((gen - real).square().sum(dim=1).mean().item() / 6, rel=0.02)


def test_directions_are_unit_and_drawn_from_the_seed():
    directions = random_directions(6, 9, seed=2)
    assert directions.shape == (6, 9)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(9))
    assert torch.equal(random_directions(6, 9, seed=2), directions)
    gen, real = rows(6, 0), rows(6, 1)
    embeds = {"gen_embeds": gen, "real_embeds": real}
    losses = [gmail_loss(embeds, config=CONFIG, seed=seed)["loss"] for seed in (3, 4)]
    assert losses[0] != losses[1]
    assert losses[0] == sliced_wasserstein_loss(gen, real, random_directions(6, 64, seed=3))


def test_energy_by_hand():
    # Generated 0 2, real 1 4 5: mean distances 2 * (1 + 4 + 5 + 1 + 2 + 3) / 6 - 2 - (3 + 4 + 1) / 3.
    loss = energy_distance_loss(column(0.0, 2.0), column(4.0, 1.0, 5.0))
    assert loss.item() == pytest.approx(16 / 3 - 2 - 8 / 3)


def test_energy_by_caption_agrees_with_loops():
    gen, real = rows(9, 0), rows(8, 1)
    ids, real_ids = torch.tensor([3, 1, 3, 2, 3, 1, 2, 3, 5]), torch.tensor([2, 1, 1, 3, 2, 1, 3, 6])

    def mean(first, second, different=False):
        pairs = [(a - b).norm() for i, a in enumerate(first) for j, b in enumerate(second) if i != j or not different]
        return sum(pairs) / len(pairs)

    total = 0
    for caption in (1, 2, 3):
        g, r = gen[ids == caption], real[real_ids == caption]
        total += len(g) / 8 * (2 * mean(g, r) - mean(g, g, different=True) - mean(r, r, different=True))
    assert energy_distance_loss(gen, real, ids, real_ids).item() == pytest.approx(total.item(), rel=1e-4)
    assert energy_distance_loss(gen, real, ids, real_ids + 10).item() == 0


def test_energy_of_one_image_per_modality_is_the_pairs_distance():
    gen, real = rows(5, 0), rows(5, 1)
    expected = 2 * (gen - real).norm(dim=1).mean()
    torch.testing.assert_close(energy_distance_loss(gen, real, torch.arange(5)), expected)


def test_energy_is_an_unbiased_estimate():
    """The mean over batches is the distance of the whole, which that of sliced Wasserstein exceeds."""
    gen, real = rows(400, 0), rows(400, 1) + 0.2
    directions = random_directions(6, 32, seed=2)
    whole = energy_distance_loss(gen, real).item()
    parts = [energy_distance_loss(gen[i : i + 4], real[i : i + 4]).item() for i in range(0, 400, 4)]
    assert np.mean(parts) == pytest.approx(whole, abs=0.03)
    sliced = [sliced_wasserstein_loss(gen[i : i + 4], real[i : i + 4], directions).item() for i in range(0, 400, 4)]
    assert np.mean(sliced) > 2 * sliced_wasserstein_loss(gen, real, directions).item()


def test_equal_images_have_a_finite_gradient():
    gen = rows(4, 0).requires_grad_()
    energy_distance_loss(gen, gen.detach().clone()).backward()
    assert gen.grad.isfinite().all()


def test_loss_is_float32_under_autocast():
    embeds = {"gen_embeds": rows(6, 0), "real_embeds": rows(6, 1)}
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = gmail_loss(embeds, config=BOTH)["loss"]
    assert torch.equal(under_autocast, gmail_loss(embeds, config=BOTH)["loss"])
    halves = {name: values.bfloat16() for name, values in embeds.items()}
    assert gmail_loss(halves, config=BOTH)["loss"].dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3])
def test_mini_batches_give_the_plain_gradient(clip_folder, size):
    batch = {
        "generated_pixel_values": pixels(8),
        "real_pixel_values": pixels(8, seed=1),
        "image_ids": torch.arange(8),
        "caption_ids": torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]),
    }
    gradients = []
    for options in ({}, {"mini_batch_size": size}):
        model = make_model(clip_folder).train()
        pair_losses(model, batch, BOTH, **options)[1]["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_training_draws_directions_from_the_seed_and_the_step(train):
    pairs = make_pairs(8, captions=["a cat", "a dog"] * 4)
    fields = {"align_weight": 0.0, "sliced_wasserstein_weight": 1.0, "sliced_wasserstein_projections": 2}
    fields |= {"per_device_train_batch_size": 8, "max_steps": 2, "logging_steps": 1, "learning_rate": 0.0}

    def losses(**more):
        log = train(pairs, **fields, **more).state.log_history
        return [entry["sliced_wasserstein_loss"] for entry in log if "sliced_wasserstein_loss" in entry]

    first = losses()
    # Without learning, the same images: only the directions differ from step to step.
    assert first[0] != pytest.approx(first[1], rel=1e-3)
    assert losses() == first
    assert losses(seed=1) != first
