"""The losses against numbers worked out by hand, and mini-batches against the whole batch."""

import math
from functools import partial

import pytest
import torch
from tiny import make_model, pair_losses, pixels, tokens
from torch.nn.functional import normalize

from gmail_hf import GmailLossConfig, alignment_loss, consistency_loss, contrastive_loss, token_alignment_loss
from gmail_hf.training.distributed import gather
from gmail_hf.training.losses import gmail_loss, same_pair_mask

# Cosines of the generated images (rows) with the real ones: identity, but for cos(g0, r1) = 0.6 and cos(g0, r0) = 0.8.
GEN = torch.tensor([[0.8, 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
REAL = torch.eye(3)


def log_share(partner, *negatives, tau=1.0):
    """-log of the partner's share among exponentials, as Eq. 1 sums it."""
    return -math.log(math.exp(partner / tau) / sum(math.exp(value / tau) for value in (partner, *negatives)))


@pytest.mark.parametrize("tau", [1.0, 0.07])
def test_alignment_by_hand(tau):
    rows = [log_share(0.8, 0.6, 0.0, tau=tau), log_share(1.0, 0.0, 0.0, tau=tau), log_share(1.0, 0.0, 0.0, tau=tau)]
    assert alignment_loss(GEN, REAL, temperature=tau).item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_alignment_has_one_direction_unless_symmetric():
    forward = (log_share(0.8, 0.6, 0.0) + 2 * log_share(1.0, 0.0, 0.0)) / 3
    columns = [log_share(0.8, 0.0, 0.0), log_share(1.0, 0.6, 0.0), log_share(1.0, 0.0, 0.0)]
    assert alignment_loss(GEN, REAL, temperature=1.0).item() == pytest.approx(forward, rel=1e-5)
    symmetric = alignment_loss(GEN, REAL, temperature=1.0, symmetric=True).item()
    assert symmetric == pytest.approx((forward + sum(columns) / 3) / 2, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_images_without_a_partner_are_refused(rows):
    for pair in ((GEN, REAL[:rows]), (GEN[:rows], REAL)):
        for loss in (alignment_loss, partial(contrastive_loss, logit_scale=1.0)):
            with pytest.raises(ValueError, match="numbers of rows must be equal"):
                loss(*pair)


@pytest.mark.parametrize("ids", ["image_ids", "caption_ids"])
def test_pairs_that_share_an_id_are_no_negatives(ids):
    rows = [log_share(0.8, 0.0), log_share(1.0, 0.0), log_share(1.0, 0.0, 0.0)]
    loss = alignment_loss(GEN, REAL, temperature=1.0, **{ids: torch.tensor([7, 7, 3])})
    assert loss.item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_either_id_masks():
    mask = same_pair_mask(torch.tensor([1, 1, 2, 3]), torch.tensor([5, 6, 6, 7]))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = expected[1, 2] = expected[2, 1] = True
    assert torch.equal(mask, expected)
    assert same_pair_mask(None, None) is None


def test_nothing_but_positives_costs_nothing():
    gen = GEN.clone().requires_grad_()
    loss = alignment_loss(gen, REAL, caption_ids=torch.tensor([1, 1, 1]))
    loss.backward()
    assert loss.item() == 0 and gen.grad.isfinite().all()


def test_consistency_by_hand():
    assert consistency_loss(GEN, REAL).item() == pytest.approx((0.2 + 0 + 0) / 3, rel=1e-5)
    assert consistency_loss(-REAL, REAL).item() == 2


def test_token_alignment_by_hand():
    # Real tokens: mean (1, 0), variances (4, 1), no covariance. Generated: mean (3, 0), variances (4, 0).
    real = torch.tensor([[[3.0, 1.0], [3.0, -1.0]], [[-1.0, 1.0], [-1.0, -1.0]]])
    generated = torch.tensor([[[5.0, 0.0], [5.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    # Over the real deviations (2, 1): means differ by (1, 0), covariances by diag(0, 1) against diag(1, 1).
    assert token_alignment_loss(generated, real).item() == pytest.approx(1 / 2 + 1 / 2, rel=1e-6)
    shuffled = real[:, [1, 0]][[1, 0]]
    assert token_alignment_loss(shuffled, real).item() == pytest.approx(0.0, abs=1e-6)
    assert token_alignment_loss(3 * generated + 7, 3 * real + 7).item() == pytest.approx(1.0, rel=1e-5)


def test_contrastive_by_hand():
    images, texts = GEN[:2, :2], REAL[:2, :2]  # cosines [[.8, .6], [0, 1]]
    rows = [log_share(1.6, 1.2), log_share(2.0, 0.0)]
    columns = [log_share(1.6, 0.0), log_share(2.0, 1.2)]
    loss = contrastive_loss(images, texts, logit_scale=2.0)
    assert loss.item() == pytest.approx((sum(rows) / 2 + sum(columns) / 2) / 2, rel=1e-5)
    assert contrastive_loss(images, texts, 2.0, caption_ids=torch.tensor([4, 4])).item() == 0


def test_gather_is_identity_in_one_process():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert gather(tensor) is tensor and gather(None) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -0.07}, "temperature"),
        ({"align_weight": 0.0}, "align_weight"),
        ({"consistency_weight": -1.0}, "consistency_weight"),
        ({"gen_text_weight": -1.0}, "gen_text_weight"),
        ({"temperature": float("nan")}, "temperature"),
        ({"align_weight": float("nan")}, "align_weight"),
        ({"align_weight": 0.0, "token_weight": 1.0}, "`token_weight` needs another loss"),
        ({"token_loss": "energy"}, "`token_loss` must be one of .'coral', 'sliced_wasserstein'., got 'energy'"),
    ],
    ids=str,
)
def test_invalid_loss_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GmailLossConfig(**fields)


ALL_LOSSES = GmailLossConfig(
    align_weight=0.5, consistency_weight=2.0, gen_text_weight=0.25, real_text_weight=3.0, symmetric=True
)


def embeddings(seed):
    return normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def named(gen, real, text):
    return {"gen_embeds": gen, "real_embeds": real, "text_embeds": text}


def test_total_is_the_weighted_sum_of_named_terms():
    gen, real, text = embeddings(0), embeddings(1), embeddings(2)
    ids, captions = torch.tensor([1, 1, 2, 3, 4, 5]), torch.tensor([1, 2, 3, 4, 4, 6])
    losses = gmail_loss(named(gen, real, text), ids, captions, 5.0, ALL_LOSSES)
    expected = {
        "align": alignment_loss(gen, real, ids, captions, 0.07, symmetric=True),
        "consistency": consistency_loss(gen, real),
        "gen_text": contrastive_loss(gen, text, 5.0, ids, captions),
        "real_text": contrastive_loss(real, text, 5.0, ids, captions),
    }
    total = losses.pop("loss")
    assert losses == expected
    weights = {"align": 0.5, "consistency": 2.0, "gen_text": 0.25, "real_text": 3.0}
    torch.testing.assert_close(total, sum(weights[name] * loss for name, loss in expected.items()))


def test_autocast_leaves_the_loss_in_float32():
    embeds = named(embeddings(0), embeddings(1), embeddings(2))
    plain = gmail_loss(embeds, logit_scale=5.0, config=ALL_LOSSES)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = gmail_loss(embeds, logit_scale=5.0, config=ALL_LOSSES)
        assert (embeds["gen_embeds"] @ embeds["real_embeds"].t()).dtype == torch.bfloat16
    assert plain == under_autocast


@pytest.mark.parametrize(
    ("changed", "config", "message"),
    [
        ({"real_embeds": None}, {}, "compare `real_embeds`: pass `real_pixel_values`"),
        ({"gen_embeds": None}, {"align_weight": 0.0, "gen_text_weight": 1.0}, "`gen_embeds`: pass `generated_pixel"),
        ({"text_embeds": None}, {"real_text_weight": 1.0}, "`text_embeds`: pass `input_ids`"),
        ({}, {"token_weight": 1.0}, "`gen_tokens`: pass `generated_pixel_values` and `token_layer`"),
        ({}, {"real_text_weight": 1.0}, "logit_scale"),
        ({"real_embeds": embeddings(1)[:5]}, {}, "'gen_embeds': 6, 'real_embeds': 5"),
        ({"image_ids": torch.zeros(1, dtype=torch.long)}, {}, "'image_ids': 1"),
        ({"caption_ids": torch.zeros(7, dtype=torch.long)}, {}, "'caption_ids': 7"),
    ],
    ids=str,
)
def test_what_the_losses_lack_is_named(changed, config, message):
    given = {**named(embeddings(0), embeddings(1), embeddings(2)), "image_ids": None, "caption_ids": None, **changed}
    ids = {name: given.pop(name) for name in ("image_ids", "caption_ids")}
    with pytest.raises(ValueError, match=message):
        gmail_loss(given, **ids, config=GmailLossConfig(**config))


# In the model


def pair_batch(count=8, text=True):
    batch = {
        "generated_pixel_values": pixels(count),
        "real_pixel_values": pixels(count, seed=1),
        "image_ids": torch.arange(count),
        "caption_ids": torch.arange(count) // 2,
    }
    return {**batch, "input_ids": tokens(count)} if text else batch


def step(model, batch, config=None, **options):
    model.zero_grad()
    _, losses = pair_losses(model, batch, config, **options)
    losses["loss"].backward()
    gradients = {n: p.grad.clone() for n, p in model.adapter_parameters() if p.grad is not None}
    return losses["loss"], gradients


def test_output_holds_the_embeddings_of_what_was_given(clip_folder):
    model = make_model(clip_folder)
    batch = pair_batch()
    output, losses = pair_losses(model, batch, ALL_LOSSES)
    assert list(losses) == ["loss", "align", "consistency", "gen_text", "real_text"]
    torch.testing.assert_close(output.gen_embeds, model.embed_images(batch["generated_pixel_values"], "gen"))
    torch.testing.assert_close(output.real_embeds, model.embed_images(batch["real_pixel_values"], "real"))
    torch.testing.assert_close(output.text_embeds, model.embed_text(batch["input_ids"]))
    torch.testing.assert_close(output.gen_embeds.norm(dim=-1), torch.ones(8))
    assert not output.real_embeds.requires_grad and output.gen_embeds.requires_grad
    assert output.gen_tokens is None and output.real_tokens is None
    one = model(generated_pixel_values=batch["generated_pixel_values"], generated_modality="real")
    torch.testing.assert_close(one.gen_embeds, model.embed_images(batch["generated_pixel_values"], "real"))
    assert list(one) == ["gen_embeds"] and not one.gen_embeds.requires_grad
    assert list(model(input_ids=batch["input_ids"])) == ["text_embeds"]


def test_the_papers_loss_is_the_default(clip_folder):
    model, batch = make_model(clip_folder), pair_batch(text=False)
    output, losses = pair_losses(model, batch)
    assert list(losses) == ["loss", "align"] and torch.equal(losses["loss"], losses["align"])
    assert gmail_loss(output, batch["image_ids"], batch["caption_ids"]) == losses


@pytest.mark.parametrize("trainable", [["gen"], ["real", "gen"]], ids=str)
@pytest.mark.parametrize(
    ("size", "token_loss"), [(1, "coral"), (3, "sliced_wasserstein"), (8, "coral"), (100, "sliced_wasserstein")]
)
def test_mini_batches_give_the_plain_gradient(clip_folder, trainable, size, token_loss):
    model = make_model(clip_folder, trainable_modalities=trainable, text_lora=True).train()
    config = GmailLossConfig(**{**vars(ALL_LOSSES), "token_weight": 0.5, "token_loss": token_loss})
    plain, plain_gradients = step(model, pair_batch(), config)
    small, small_gradients = step(model, pair_batch(), config, mini_batch_size=size)
    torch.testing.assert_close(small, plain, rtol=1e-5, atol=1e-6)
    assert len(plain_gradients) == sum(1 for _ in model.adapter_parameters())
    torch.testing.assert_close(small_gradients, plain_gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_token_loss_reads_patch_tokens_of_its_layer(clip_folder, layer):
    model, batch = make_model(clip_folder), pair_batch(text=False)
    output, losses = pair_losses(model, batch, GmailLossConfig(token_weight=2.0), token_layer=layer)
    tokens = [
        model.vision_model(batch[f"{side}_pixel_values"], modality=modality, output_hidden_states=True)
        for side, modality in (("generated", "gen"), ("real", "real"))
    ]
    tokens = [outputs.hidden_states[layer][:, 1:] for outputs in tokens]
    torch.testing.assert_close([output.gen_tokens, output.real_tokens], tokens)
    expected = token_alignment_loss(*tokens)
    torch.testing.assert_close(losses["token"], expected)
    torch.testing.assert_close(losses["loss"], losses["align"] + 2 * expected)


def test_mini_batches_draw_dropout_once(clip_folder):
    """A mini-batch computed again sees its first pass's dropout: the gradient belongs to the loss returned."""
    model = make_model(clip_folder, lora_dropout=0.5).train()
    batch = pair_batch(text=False)
    torch.manual_seed(0)
    _, gradients = step(model, batch, mini_batch_size=4)
    torch.manual_seed(0)
    model.zero_grad()
    # The same two mini-batches in the same order, kept instead of computed again.
    images = batch["generated_pixel_values"]
    gen = torch.cat([model.embed_images(images[:4], "gen"), model.embed_images(images[4:], "gen")])
    real = model.embed_images(batch["real_pixel_values"], "real")
    alignment_loss(gen, real, batch["image_ids"], batch["caption_ids"]).backward()
    kept = {name: parameter.grad for name, parameter in model.adapter_parameters()}
    torch.testing.assert_close(gradients, kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_eight_bit_pixels_give_the_same_loss_and_gradient(clip_folder, mini_batch_size):
    model, batch = make_model(clip_folder).train(), pair_batch(text=False)
    generator = torch.Generator().manual_seed(0)
    scale = {"pixel_mean": torch.tensor([120.0, 110.0, 100.0]), "pixel_std": torch.tensor([60.0, 70.0, 80.0])}
    mean, std = (values[:, None, None] for values in scale.values())
    sides = ("generated_pixel_values", "real_pixel_values")
    small = {side: torch.randint(256, batch[side].shape, generator=generator, dtype=torch.uint8) for side in sides}
    whole = {side: (values - mean) / std for side, values in small.items()}
    expected, gradients = step(model, {**batch, **whole}, mini_batch_size=mini_batch_size)
    loss, found = step(model, {**batch, **small, **scale}, mini_batch_size=mini_batch_size)
    assert torch.equal(loss, expected) and all(torch.equal(found[n], gradients[n]) for n in gradients)
    for wrong in (small, {**whole, **scale}, {**small, "pixel_mean": scale["pixel_mean"]}):
        with pytest.raises(ValueError, match="uint8 images need `pixel_mean` and `pixel_std`"):
            pair_losses(model, {**batch, **wrong}, mini_batch_size=mini_batch_size)


def saved_bytes(model, batch, **options):
    """Bytes that autograd keeps between forward and backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = [*model.parameters(), *batch.values()]
    given = {tensor.untyped_storage().data_ptr() for tensor in given}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = pair_losses(model, batch, **options)[1]["loss"]
    loss.backward()
    return sum(size for pointer, size in kept.items() if pointer not in given)


def test_mini_batches_keep_few_activations(clip_folder):
    model = make_model(clip_folder).train()
    batch = pair_batch(32, text=False)
    plain = saved_bytes(model, batch)
    small = saved_bytes(model, batch, mini_batch_size=4)
    assert small < plain / 4
