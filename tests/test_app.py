"""The demo page: its arithmetic without gradio, and the page itself in a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time

import app
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, make_model, make_pairs

from gmail_hf.digits import clip_path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


def test_scores_are_each_branch_alone(model, processor):
    row = make_pairs(1)[0]
    scores = app.score(model, processor, row["generated_image"], [*CAPTIONS, " ", CAPTIONS[0]])
    inputs = processor(text=list(CAPTIONS), images=row["generated_image"], return_tensors="pt", padding=True)
    for modality in ("real", "gen"):
        with torch.no_grad():
            expected = model(**inputs, modality=modality).logits_per_image.softmax(-1)[0]
        assert list(scores[modality]) == list(CAPTIONS)
        torch.testing.assert_close(torch.tensor(list(scores[modality].values())), expected)
    assert scores["real"] != scores["gen"]


def test_a_missing_gradio_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=r"gmail-hf\[app\]"):
        app.main([])


def test_texts_are_checked(model, processor):
    image = make_pairs(1)[0]["real_image"]
    with pytest.raises(ValueError, match="at least one text"):
        app.score(model, processor, image, ["", "  "])
    with pytest.raises(ValueError, match="'a catttt.*tokens; the limit of this model is 40"):
        app.score(model, processor, image, ["a dog", "a cat" + "t" * 50])


def test_similarities_are_of_the_branches(model, processor):
    row = make_pairs(1)[0]
    similarities = app.compare(model, processor, row["real_image"], row["generated_image"])
    pixels = processor(images=[row["real_image"], row["generated_image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        real, gen = model.embed_images(pixels, "real"), model.embed_images(pixels, "gen")
    assert similarities["real"] == pytest.approx(float(real[0] @ real[1]), abs=1e-5)
    assert similarities["gen"] == pytest.approx(float(real[0] @ gen[1]), abs=1e-5)
    assert f"{similarities['gen']:.3f}" in app.similarity_bars(similarities)


def test_a_page_without_a_trained_model_says_so(tmp_path, monkeypatch, clip_folder, processor):
    monkeypatch.chdir(tmp_path)
    model, _, note = app.load(app.DEFAULT_MODEL)
    assert model.config.base_model_name_or_path == clip_path() and model.is_base("gen")
    assert "Not trained yet" in note and "gmail-hf train`" in note
    assert "is not aligned" in app.load(str(clip_folder))[2]
    make_model(clip_folder).save_pretrained(app.DEFAULT_MODEL)
    processor.save_pretrained(app.DEFAULT_MODEL)
    model, _, note = app.load(app.DEFAULT_MODEL)
    assert not model.is_base("gen") and note == "Model: `gmail-digits`."


def test_examples_have_captions_of_their_own(tmp_path):
    make_pairs(12, captions=[*CAPTIONS] * 3).save_to_disk(tmp_path / "pairs")
    rows = app.examples(str(tmp_path / "pairs"), "train")
    make_pairs(2).remove_columns("real_image").save_to_disk(tmp_path / "generated")
    with pytest.raises(ValueError, match="lacks the columns .'real_image'."):
        app.examples(str(tmp_path / "generated"), "train")
    assert [row["caption"] for row in rows] == list(CAPTIONS)


def test_examples_are_those_that_can_be_read(tmp_path):
    make_pairs(4, bad_real=(0,), bad_generated=(2,)).save_to_disk(tmp_path / "some")
    rows, expected = app.examples(str(tmp_path / "some"), "train"), make_pairs(4)
    assert [row["caption"] for row in rows] == [expected[i]["caption"] for i in (1, 3)]
    for row, i in zip(rows, (1, 3), strict=True):
        for column in ("real_image", "generated_image"):
            assert row[column].tobytes() == expected[i][column].tobytes()
    make_pairs(1, bad_real=(0,)).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="None of the first 1 pairs"):
        app.examples(str(tmp_path / "none"), "train")


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    executable = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if executable is None:
        pytest.skip(f"no browser found; looked for {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def server(tmp_path, model, processor):
    """The address of the command, run on a model and pairs of its own."""
    pytest.importorskip("gradio", reason='needs gradio: pip install "gmail-hf[app]"')
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    make_pairs(4, captions=list(CAPTIONS)).save_to_disk(tmp_path / "pairs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", tmp_path / "model", "--dataset", tmp_path / "pairs", "--split", "train"]
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
    }
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, app.__file__, *options], stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 120
            while "Running on" not in (text := (tmp_path / "log").read_text()):
                assert process.poll() is None and time.monotonic() < deadline, text
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait()


@pytest.mark.slow
def test_page_in_a_browser(server, browser, model, processor, tmp_path):
    pairs = make_pairs(4, captions=list(CAPTIONS))
    first = (pairs[0]["generated_image"], pairs[0]["real_image"])
    expected = [app.score(model, processor, image, list(CAPTIONS)) for image in first]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    cut = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    strangers, problems = [], []
    own = (server, "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(own) or strangers.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server)
    error = page.get_by_test_id("toast-body").last

    def wait_for(scores):
        for branch, probabilities in scores.items():
            for text, probability in probabilities.items():
                row = page.locator(f"#{branch}-scores").get_by_test_id(f"{text}-confidence-set")
                row.filter(has_text=f"{100 * probability:.0f}%").wait_for()

    wait_for(expected[0])  # the first generated image, on opening
    page.locator("#images button").first.click()
    wait_for(expected[1])
    page.screenshot(path=tmp_path / "scores.png", full_page=True)
    assert Image.open(tmp_path / "scores.png").convert("L").entropy() > 1
    texts = page.locator("textarea").first
    texts.fill(" \n")
    page.get_by_role("button", name="Score", exact=True).click()
    error.filter(has_text="at least one text").wait_for()
    texts.fill("a cat")
    for path in (broken, cut):
        page.get_by_label("Remove").first.click()
        page.locator("input[type=file]").first.set_input_files(path)
        error.filter(has_text=f"{path.name} cannot be read").wait_for()
    page.get_by_label("Remove").first.click()
    page.get_by_role("button", name="Score", exact=True).click()
    error.filter(has_text="Choose an image first").wait_for()

    page.get_by_role("tab", name="Compare").click()
    page.locator("#pairs tbody tr").nth(1).click()
    similarities = app.compare(model, processor, pairs[1]["real_image"], pairs[1]["generated_image"])
    for value in similarities.values():
        page.locator("#bars").filter(has_text=f"{value:.3f}").wait_for()
    assert not strangers and not problems
