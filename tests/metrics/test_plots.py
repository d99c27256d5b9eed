import numpy as np
import pytest
from PIL import Image
from tiny import picture

from gmail_hf.metrics import plot_embeddings, plot_pairs
from gmail_hf.metrics.plots import GAP, LINE, SIDE


def test_embeddings_picture_is_a_png_of_use(tmp_path):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 6))
    plot_embeddings(tmp_path / "embeddings.png", real, real + 2.0, real + 0.1 * rng.normal(size=real.shape))
    drawn = Image.open(tmp_path / "embeddings.png")
    assert drawn.format == "PNG"
    assert drawn.width > 1500
    assert len(set(np.asarray(drawn.convert("L")).ravel())) > 50  # drawn upon, not blank


@pytest.mark.parametrize("count", [1, 6])
def test_contact_sheet_holds_every_pair(tmp_path, count):
    real = [Image.new("RGB", (8, 8), (0, 200, 40 * index)) for index in range(count)]
    generated = [Image.new("RGB", (8, 8), (200, 0, 40 * index)) for index in range(count)]
    plot_pairs(tmp_path / "pairs.png", real, generated, ["a caption that goes on and on " * 5] * count)
    pixels = np.asarray(Image.open(tmp_path / "pairs.png").convert("RGB")).reshape(-1, 3)
    seen = {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}
    for index in range(count):
        assert {(0, 200, 40 * index), (200, 0, 40 * index)} <= seen


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="at least 10"):
        plot_embeddings(tmp_path / "x.png", np.eye(4), np.eye(4), np.eye(4))
    with pytest.raises(ValueError, match="after and real must have the same number of rows"):
        plot_embeddings(tmp_path / "x.png", np.eye(12), np.eye(12), np.eye(12)[:11])
    with pytest.raises(ValueError, match="the same length"):
        plot_pairs(tmp_path / "x.png", [Image.new("RGB", (8, 8))], [], ["a"])
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        plot_pairs(tmp_path / "x.png", [Image.new("RGB", (8, 8))], None, ["a"], columns=0)


def test_one_real_image_beside_several_generated(tmp_path):
    real, generated = [picture(0), picture(1)], [[picture(2), picture(3)], [picture(4), picture(5)]]
    plot_pairs(tmp_path / "one.png", real, [row[0] for row in generated], ["a", "b"], columns=1)
    plot_pairs(tmp_path / "two.png", real, generated, ["a", "b"], columns=1)
    one, two = (Image.open(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert two.width - one.width == SIDE + GAP and two.height == one.height
    plot_pairs(tmp_path / "ragged.png", real, [generated[0], generated[1][:1]], ["a", "b"], columns=1)
    plot_pairs(tmp_path / "generated.png", None, generated, ["a", "b"], columns=1)
    assert Image.open(tmp_path / "ragged.png").size == two.size
    assert Image.open(tmp_path / "generated.png").size == one.size


def test_each_line_of_a_text_is_drawn(tmp_path):
    for name, text in (("short", "a"), ("two", "a\nb"), ("long", "word " * 100 + "\nb")):
        plot_pairs(tmp_path / f"{name}.png", [picture(0)], None, [text])
    heights = [Image.open(tmp_path / f"{name}.png").height for name in ("short", "two", "long")]
    assert [height - heights[0] for height in heights] == [0, LINE, 2 * LINE]
