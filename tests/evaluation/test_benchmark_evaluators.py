"""Each evaluator against what is computed by hand, one item at a time."""

import numpy as np
import pytest
import torch
from benchmark_data import (
    CLASS_NAMES,
    TEMPLATES,
    png_cell,
    question,
    webp,
    write_captions,
    write_classes,
    write_webdataset,
)
from datasets import Dataset, Image
from tiny import make_pairs, picture

from gmail_hf.digits.benchmark import digit_prompts
from gmail_hf.digits.scenes import caption_of
from gmail_hf.evaluation import (
    LoadedModel,
    Settings,
    alignment,
    captioning,
    evaluate_alignment,
    evaluate_captioning,
    evaluate_retrieval,
    evaluate_vqa,
    evaluate_zero_shot,
    vqa,
)
from gmail_hf.evaluation.answering import write
from gmail_hf.evaluation.embedding import image_embeds, text_embeds
from gmail_hf.metrics import alignment_metrics, bootstrap_interval, separability

SETTINGS = Settings(batch_size=4, num_beams=2)
CAPTIONS = [
    ["a red one", "a red one and a blue two"],
    ["a green three"],
    ["a pink four", "a white five and a red six", "a pink four"],
    ["a blue seven"],
    ["a white eight"],
]


@torch.no_grad()
def embed_image(loaded: LoadedModel, image, modality: str = "real") -> np.ndarray:
    """One image, as the model's own methods give it."""
    pixel_values = loaded.processor(images=[image], return_tensors="pt")["pixel_values"]
    return loaded.model.embed_images(pixel_values, modality)[0].numpy()


@torch.no_grad()
def embed_text(loaded: LoadedModel, text: str) -> np.ndarray:
    tokens = loaded.processor(text=[text], truncation=True, max_length=16, return_tensors="pt")  # all that it reads
    return loaded.model.embed_text(**tokens)[0].numpy()


def position(similarities: np.ndarray, right: set[int]) -> int:
    """Where the first right answer stands among all, from 1 on."""
    order = np.argsort(-similarities, kind="stable")
    return 1 + next(i for i, target in enumerate(order) if target in right)


@pytest.mark.parametrize("modality", ["real", "gen"])
def test_retrieval_of_several_captions_an_image(loaded, source, tmp_path, modality):
    gmail = loaded["gmail"]
    found = source("coco", write_captions(tmp_path, CAPTIONS))
    measured = evaluate_retrieval(gmail.model, gmail.processor, found, Settings(modality, batch_size=2))
    images = np.stack([embed_image(gmail, picture(i), modality) for i in range(5)])
    texts = [(i, caption) for i, captions in enumerate(CAPTIONS) for caption in dict.fromkeys(captions)]
    similarity = images @ np.stack([embed_text(gmail, caption) for _, caption in texts]).T
    to_text = [position(similarity[i], {j for j, (k, _) in enumerate(texts) if k == i}) for i in range(5)]
    to_image = [position(similarity[:, j], {i}) for j, (i, _) in enumerate(texts)]
    for way, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            hits = np.array(ranks) <= k
            assert measured.scores[f"{way}_R@{k}"] == pytest.approx(hits.mean())
            assert measured.intervals[f"{way}_R@{k}"] == pytest.approx(bootstrap_interval(hits, 0.95, 0))
        assert measured.scores[f"{way}_median_rank"] == np.median(ranks)
    assert measured.counts == {"images": 5, "captions": 7, "truncated captions": 0}
    assert 1 < max(to_text) and 1 < max(to_image)  # something to get wrong


def test_retrieval_of_pairs_knows_an_image_by_its_id_and_equal_captions(loaded, source, tmp_path):
    """One caption an image: equal captions are right for each other. Several pairs of an image are one image."""
    gmail = loaded["gmail"]
    captions = ["a red one", "a blue two", "a red one", "a pink six"]
    make_pairs(4, captions=captions).to_parquet(tmp_path / "p.parquet")
    found = source("coco", tmp_path / "p.parquet")
    measured = evaluate_retrieval(gmail.model, gmail.processor, found, SETTINGS)
    images = np.stack([embed_image(gmail, picture(2 * i)) for i in range(4)])
    texts = np.stack(
        [embed_text(gmail, caption) for caption in ("a red one", "a blue two", "a red one", "a pink six")]
    )
    same = [{0, 2}, {1}, {0, 2}, {3}]
    # A tie of the two equal captions is no tie with a wrong answer.
    ranks = [position((images @ texts.T)[i], same[i]) for i in range(4)]
    assert measured.scores["image_to_text_R@1"] == np.mean(np.array(ranks) == 1)
    twice = [*make_pairs(3), *make_pairs(3, seed=0)]  # a second generated image of each
    Dataset.from_list(twice, make_pairs(1).features).to_parquet(tmp_path / "twice.parquet")
    doubled = evaluate_retrieval(gmail.model, gmail.processor, source("coco", tmp_path / "twice.parquet"), SETTINGS)
    make_pairs(3).to_parquet(tmp_path / "once.parquet")
    once = evaluate_retrieval(gmail.model, gmail.processor, source("coco", tmp_path / "once.parquet"), SETTINGS)
    assert doubled.scores == once.scores and doubled.counts["images"] == 3


def test_long_captions_are_cut_and_counted(loaded, source, tmp_path):
    gmail = loaded["gmail"]
    found = source("coco", write_captions(tmp_path, [["a red one " * 20], ["a blue two"]]))
    assert evaluate_retrieval(gmail.model, gmail.processor, found, SETTINGS).counts["truncated captions"] == 1


def test_zero_shot_by_ensembles_of_the_repository(loaded, source, tmp_path):
    gmail, labels = loaded["gmail"], [0, 1, 2, 0, 1, 0]
    found = source("dtd", write_classes(tmp_path, labels))
    measured = evaluate_zero_shot(gmail.model, gmail.processor, found, SETTINGS)
    classes = []
    for name in CLASS_NAMES:
        mean = np.mean([embed_text(gmail, template.replace("{c}", name)) for template in TEMPLATES], axis=0)
        classes.append(mean / np.linalg.norm(mean))
    predicted = [int(np.argmax(np.stack(classes) @ embed_image(gmail, picture(i)))) for i in range(6)]
    hits = np.equal(predicted, labels)
    assert measured.scores["top1"] == pytest.approx(hits.mean())
    means = [hits[np.equal(labels, label)].mean() for label in range(3)]
    assert measured.scores["mean_per_class"] == pytest.approx(np.mean(means))
    assert measured.intervals == {"top1": pytest.approx(bootstrap_interval(hits, 0.95, 0))}
    assert measured.counts == {"images": 6, "classes": 3, "prompts per class": 2}
    first = evaluate_zero_shot(gmail.model, gmail.processor, source("dtd", tmp_path, limit=2), SETTINGS)
    assert first.counts["images"] == 2 and first.scores["top1"] == pytest.approx(hits[:2].mean())


def test_zero_shot_refuses_labels_and_templates_that_do_not_fit(loaded, source, tmp_path):
    gmail = loaded["gmail"]
    found = source("dtd", write_classes(tmp_path, [0, 1, 3]))
    with pytest.raises(ValueError, match="Image 2 of .* has class 3, but there are 3 classes"):
        evaluate_zero_shot(gmail.model, gmail.processor, found, SETTINGS)
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\na photo\n")
    with pytest.raises(ValueError, match=r"templates without {c}, the place of the class: \['a photo'\]"):
        evaluate_zero_shot(gmail.model, gmail.processor, found, SETTINGS)


def test_zero_shot_of_digits_asks_for_left_and_right(loaded, source):
    gmail = loaded["gmail"]
    found = source("digits", limit=12)
    rows = list(found.read())
    measured = evaluate_zero_shot(gmail.model, gmail.processor, found, Settings(batch_size=700))
    left, right = digit_prompts()
    assert len(left) == len(right) == 10 and len(left[3]) == len(right[3]) == 300
    assert caption_of([3, 7], ["red", "green"]) in left[3] and caption_of([3, 7], ["red", "green"]) in right[7]
    hits = []
    for side, prompts in enumerate((left, right)):
        embeds = text_embeds(gmail.model, gmail.processor, sum(prompts, []), Settings(batch_size=500), None)
        means = embeds.reshape(10, 300, -1).mean(axis=1)
        classes = means / np.linalg.norm(means, axis=1, keepdims=True)
        images = image_embeds(
            gmail.model, gmail.processor, [row["real_image"] for row in rows], "real", SETTINGS, "images"
        )
        hits.append(np.argmax(images @ classes.T, axis=1) == [row["digits"][side] for row in rows])
    assert measured.scores["top1"] == pytest.approx(np.mean(hits))
    assert 0.1 < measured.scores["top1"]  # the digits CLIP knows them, bent adapters do not hide it: `real` has none


def test_alignment_before_and_after(loaded, source):
    gmail, found = loaded["gmail"], source("digits", limit=12)
    measured = evaluate_alignment(gmail.model, gmail.processor, found, Settings(batch_size=5, seed=3))
    rows = list(found.read())
    cells = {side: [Image().decode_example(row[f"{side}_image"]) for row in rows] for side in ("real", "generated")}
    real = np.stack([embed_image(gmail, image) for image in cells["real"]])
    captions, ids = [row["caption"] for row in rows], [row["image_id"] for row in rows]
    for when, modality in (("before", "real"), ("after", "gen")):
        embeds = np.stack([embed_image(gmail, image, modality) for image in cells["generated"]])
        for name, value in alignment_metrics(embeds, real, captions, ids).items():
            assert measured.scores[f"{name}_{when}"] == pytest.approx(value, abs=1e-6)
        assert measured.scores[f"separability_{when}"] == pytest.approx(separability(embeds, real, seed=3), abs=0.1)
        cosines = (embeds * real).sum(axis=1)
        assert measured.intervals[f"paired_cosine_{when}"] == pytest.approx(bootstrap_interval(cosines, 0.95, 3))
        hits = alignment_metrics(embeds, real, captions, ids)["gen_to_real_R@1"]
        low, high = measured.intervals[f"gen_to_real_R@1_{when}"]
        assert low <= hits <= high
    assert measured.scores["paired_cosine_before"] != measured.scores["paired_cosine_after"]
    assert list(measured.figures.values())[0].startswith(b"\x89PNG")
    assert [example.text for example in measured.examples] == captions
    assert measured.examples[1].images[0].tobytes() == cells["real"][1].tobytes()
    assert measured.examples[1].images[1].tobytes() == cells["generated"][1].tobytes()


def test_alignment_of_a_model_without_gen_is_told_before_only(loaded, source):
    gmail, found = loaded["gmail"], source("digits", limit=12)
    plain = gmail.model.to_clip("real")
    measured = evaluate_alignment(plain, gmail.processor, found, SETTINGS)
    both = evaluate_alignment(gmail.model, gmail.processor, found, SETTINGS)
    assert {name for name in measured.scores if not name.endswith("_before")} == set()
    assert measured.scores["paired_cosine_before"] == pytest.approx(both.scores["paired_cosine_before"], abs=1e-6)
    with pytest.raises(ValueError, match="at least 10 pairs .* 'digits' has 3"):
        evaluate_alignment(plain, gmail.processor, source("digits", limit=3), SETTINGS)


def test_alignment_keeps_the_pairs_of_a_real_image_in_one_fold(loaded, source, tmp_path, monkeypatch):
    gmail, given = loaded["gmail"], []
    monkeypatch.setattr(alignment, "separability", lambda *args, image_ids: given.append(list(image_ids)) or 0.5)
    for images in (5, 4):
        pairs = [{**row, "image_id": f"id-{i % images}"} for i, row in enumerate(make_pairs(10))]
        Dataset.from_list(pairs, make_pairs(1).features).to_parquet(tmp_path / f"{images}.parquet")
    evaluate_alignment(gmail.model, gmail.processor, source("coco", tmp_path / "5.parquet"), SETTINGS)
    assert given == [[f"id-{i % 5}" for i in range(10)]] * 2  # before and after
    with pytest.raises(ValueError, match="with 5 different real images; .* has 10 pairs with 4 real images"):
        evaluate_alignment(gmail.model, gmail.processor, source("coco", tmp_path / "4.parquet"), SETTINGS)


@pytest.mark.integration
def test_captioning_scores_what_the_captioner_writes(loaded, source, tmp_path, monkeypatch):
    clipcap = loaded["clipcap"]
    scored = []

    def caption_metrics(captions, references, metrics, word_vectors):
        scored.append((captions, references))
        return {metric: None if metric == "SPICE" else 0.5 for metric in metrics}

    monkeypatch.setattr(captioning, "caption_metrics", caption_metrics)  # a Java machine takes seconds
    monkeypatch.setattr(captioning, "missing_metrics", lambda metrics, vectors: {"SPICE": "get it"})
    found = source("coco", write_captions(tmp_path, CAPTIONS))
    for modality in ("real", "gen"):
        settings = Settings(modality, batch_size=2, num_beams=2)
        measured = evaluate_captioning(clipcap.model, clipcap.processor, found, settings)
        one_by_one = []
        for i in range(5):
            inputs = clipcap.processor([picture(i)], return_tensors="pt")
            with torch.no_grad():
                tokens = clipcap.model.generate(**inputs, modality=modality, num_beams=2, max_new_tokens=64)
            one_by_one.append(clipcap.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
        assert scored.pop() == (one_by_one, [list(dict.fromkeys(captions)) for captions in CAPTIONS])
        assert [line["caption"] for line in measured.predictions] == one_by_one
        assert measured.scores["BLEU@4"] == 0.5 and measured.scores["SPICE"] is None
        without = dict.fromkeys(("clip_score", "ref_clip_score"), captioning.NO_SCORER)
        assert measured.missing == {"SPICE": "get it"} | without and measured.scores["clip_score"] is None
        assert measured.counts == {"images": 5, "references": 7}
        assert measured.examples[3].images[0].tobytes() == picture(3).tobytes()
    # Where it writes a reference, it is right.
    found = source("coco", write_captions(tmp_path / "own", [[one_by_one[0]], ["else"], [one_by_one[2], "else"]]))
    measured = evaluate_captioning(clipcap.model, clipcap.processor, found, settings)
    assert measured.scores["exact_match"] == pytest.approx(2 / 3)
    assert [example.right for example in measured.examples] == [True, False, True]


def test_clip_scores_by_hand(loaded, source, tmp_path, monkeypatch):
    """2.5 times the cosine of image and caption; with it the harmonic mean of the largest cosine to a reference."""
    monkeypatch.setattr(captioning, "caption_metrics", lambda *args: {})
    monkeypatch.setattr(captioning, "missing_metrics", lambda *args: {})
    captions = iter(["a red one", "a blue two", "a pink four", "a white eight", ""])
    monkeypatch.setattr(captioning, "write", lambda model, processor, images, *args, **kwargs: [
        next(captions) for _ in images
    ])  # fmt: skip
    gmail, clipcap = loaded["gmail"], loaded["clipcap"]
    found = source("coco", write_captions(tmp_path, CAPTIONS))
    settings = Settings(batch_size=2, num_beams=1, clip_scorer=gmail)
    measured = evaluate_captioning(clipcap.model, clipcap.processor, found, settings)
    plain, with_references = [], []
    for i, line in enumerate(measured.predictions):
        caption = embed_text(gmail, f"A photo depicts {line['caption']}")
        score = 2.5 * max(float(embed_image(gmail, picture(i)) @ caption), 0)
        nearest = max(float(embed_text(gmail, f"A photo depicts {text}") @ caption) for text in line["references"])
        plain.append(score)
        with_references.append(2 * score * nearest / (score + nearest) if score and nearest > 0 else 0)
    for name, values in (("clip_score", plain), ("ref_clip_score", with_references)):
        assert measured.scores[name] == pytest.approx(np.mean(values), abs=1e-5)
        low, high = measured.intervals[name]
        assert low <= measured.scores[name] <= high
    assert 0 < measured.scores["ref_clip_score"] and not measured.missing
    assert captioning.sees_through(clipcap.model, gmail.model)  # the captioner is made of it
    other = type(gmail.model.to_clip("real"))(gmail.model.to_clip("real").config)
    assert not captioning.sees_through(clipcap.model, other)


def test_vqa_asks_by_the_chat_template_and_parses_the_answer(loaded, source, tmp_path, monkeypatch):
    llava = loaded["llava"]
    rows = [question(0), question(1, blind=True), question(2, subject="social science"), question(3)]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(tmp_path / "test.parquet")
    found = source("scienceqa", tmp_path / "test.parquet")
    measured = evaluate_vqa(llava.model, llava.processor, found, SETTINGS)
    # What it writes in a batch is what it writes one by one, by its own template.
    texts = []
    for seed in (0, 2, 3):
        content = [{"type": "image"}, {"type": "text", "text": (
            f"Which letter has number {seed}?\n(A) one\n(B) two\n(C) three\n"
            "Answer with the option's letter from the given choices directly."
        )}]  # fmt: skip
        prompt = llava.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = llava.processor(images=[picture(seed)], text=[prompt], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            tokens = llava.model.generate(**inputs, modality="real", max_new_tokens=32, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts.append(llava.processor.batch_decode(new, skip_special_tokens=True)[0].strip())
    assert [line["answer"] for line in measured.predictions] == texts
    assert measured.counts == {"questions": 3, "left out, open": 0, "left out, without image": 1}

    monkeypatch.setattr(vqa, "write", lambda *args, **kwargs: ["A", "The answer is B.", "dunno"])
    measured = evaluate_vqa(llava.model, llava.processor, found, SETTINGS)
    assert measured.scores == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy, natural science": 0.5,
        "accuracy, social science": 0.0,
        "unparsed": pytest.approx(1 / 3),
    }
    assert [line["choice"] for line in measured.predictions] == ["one", "two", None]
    assert [example.right for example in measured.examples] == [True, False, False]


def test_vqa_of_several_images_a_question(loaded, source, tmp_path, monkeypatch):
    """MMMU's images stand where the text marks them; open questions are left out."""
    llava = loaded["llava"]
    shared = {"options": "['<image 2>', 'none']", "answer": "B", "question_type": "multiple-choice"}
    rows = [
        {"id": "validation_Art_1", "question": "Is <image 1> like", **shared},
        {"id": "validation_Art_2", "question": "Why <image 1>?", **shared, "options": "[]", "question_type": "open"},
        {"id": "validation_Math_1", "question": "<image 1> or <image 2>?", **shared, "options": "['a', 'b']"},
    ]
    rows = [
        {**row, "image_1": png_cell(picture(i)), "image_2": png_cell(picture(10 + i))} for i, row in enumerate(rows)
    ]
    pictures = Dataset.from_list(rows).cast_column("image_1", Image()).cast_column("image_2", Image())
    pictures.to_parquet(tmp_path / "validation.parquet")
    asked = []

    def spy(model, processor, images, messages, *args, **kwargs):
        asked.extend(zip(images, messages, strict=True))
        return write(model, processor, images, messages, *args, **kwargs)

    monkeypatch.setattr(vqa, "write", spy)
    found = source("mmmu", tmp_path / "validation.parquet")
    measured = evaluate_vqa(llava.model, llava.processor, found, SETTINGS)
    assert measured.counts == {"questions": 2, "left out, open": 1, "left out, without image": 0}
    assert {"accuracy, Art and Design", "accuracy, Science"} < set(measured.scores)
    for (images, messages), seed in zip(asked, (0, 2), strict=True):
        assert [image.tobytes() for image in images] == [picture(seed).tobytes(), picture(10 + seed).tobytes()]
        assert [item["type"] for item in messages[0]["content"]].count("image") == 2


def test_pope_has_scores_of_each_category(loaded, source, tmp_path, monkeypatch):
    llava = loaded["llava"]
    facts = [("random", "yes"), ("random", "no"), ("popular", "yes"), ("popular", "no")]
    rows = [
        {"image": png_cell(picture(i)), "question": "Is there a two?", "answer": answer, "category": category}
        for i, (category, answer) in enumerate(facts)
    ]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(tmp_path / "test.parquet")
    found = source("pope", tmp_path / "test.parquet")
    asked = []

    def answers(model, processor, images, messages, *args, **kwargs):
        asked.extend(message[0]["content"][-1]["text"] for message in messages)
        return ["Yes, there is.", "No", "No.", "There is not"]

    monkeypatch.setattr(vqa, "write", answers)
    measured = evaluate_vqa(llava.model, llava.processor, found, SETTINGS)
    assert asked == ["Is there a two?\nAnswer the question using a single word or phrase."] * 4
    assert measured.scores["accuracy"] == 3 / 4 and measured.scores["precision"] == 1.0
    assert measured.scores["recall"] == 1 / 2 and measured.scores["F1"] == pytest.approx(2 / 3)
    assert measured.scores["yes_ratio"] == 1 / 4 and "unparsed" not in measured.scores
    assert measured.scores["F1, random"] == 1.0 and measured.scores["F1, popular"] == 0.0
    assert measured.scores["yes_ratio, random"] == 1 / 2 and measured.scores["accuracy, popular"] == 1 / 2
    assert [line["choice"] for line in measured.predictions] == ["yes", "no", "no", "no"]


def test_branches_reach_a_model_that_chats(loaded):
    llava = loaded["llava"]
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    images = [[picture(i)] for i in range(4)]

    def describe(model, modality):
        messages = [[{"role": "user", "content": content}]] * 4
        return write(model, llava.processor, images, messages, modality, max_new_tokens=12, do_sample=False)

    generated = describe(llava.model, "gen")
    assert generated == describe(llava.model.to_llava("gen"), "real") != describe(llava.model, "real")


def test_bad_images_and_embeddings_are_named_by_their_row(loaded, source, tmp_path):
    gmail = loaded["gmail"]
    samples = [{"webp": webp(i), "txt": b"a caption"} for i in range(6)]
    samples[4]["webp"] = samples[4]["webp"][:20]
    found = source("coco", write_webdataset(tmp_path, samples))
    with pytest.raises(ValueError, match="image 4: .* cannot be read"):
        evaluate_retrieval(gmail.model, gmail.processor, found, SETTINGS)
    features = gmail.model.get_image_features
    try:
        calls = []

        def poisoned(*args, **kwargs):
            output = features(*args, **kwargs)
            calls.append(output)
            if len(calls) == 2:
                output.pooler_output[1] = float("nan")
            return output

        gmail.model.get_image_features = poisoned
        with pytest.raises(ValueError, match="the embedding of image 5 is not finite.*--dtype float32"):
            image_embeds(gmail.model, gmail.processor, [picture(i) for i in range(8)], "real", SETTINGS, "some images")
    finally:
        del gmail.model.get_image_features
