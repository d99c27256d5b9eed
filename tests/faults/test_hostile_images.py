"""Images from elsewhere: none reads another file, takes much memory, starts a program or blocks."""

import io
import json
import os
import struct
import sys
import types
import zlib

import app
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, PngImagePlugin
from pyarrow import parquet
from tiny import make_processor, picture

from gmail_hf import decode_image
from gmail_hf.commands import cli
from gmail_hf.digits import generator_path
from gmail_hf.generation.arguments import SynthesisArguments
from gmail_hf.generation.captions import load_captions
from gmail_hf.training.data import BadImageError, GmailCollator
from gmail_hf.training.images import raw_pixels


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_header() -> bytes:
    """A PNG whose header says 60,000 x 60,000."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "1 x 65500": encoded(Image.new("L", (1, 65500))),
    "6000 x 1": encoded(Image.new("RGB", (6000, 1))),
    "prepared 6000 x 1": b"P6 6000 1 255\n" + bytes(18000),
    "no width": b"P6 0 5 255\n",
    "no pixels": b"P6 0 0 255\n",
    "60000 x 60000": huge_header(),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n",
    "PDF": b"%PDF-1.4\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
    "text": b"a secret",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_image_is_left_out_of_a_batch(name):
    with pytest.raises(BadImageError):
        decode_image(BAD[name])
    assert raw_pixels(BAD[name]) is None
    rows = [
        {"real_image": {"bytes": content, "path": None}, "caption": f"a {i}", "image_id": str(i)}
        for i, content in enumerate((encoded(picture(0)), BAD[name], encoded(picture(1))))
    ]
    batch = GmailCollator(make_processor())(rows)
    assert len(batch["real_pixel_values"]) == 2 and batch["skipped_pairs"] == 1


def test_an_opened_file_of_another_format_is_refused_too():
    with pytest.raises(BadImageError, match="the format EPS is not one of"):
        decode_image(Image.open(io.BytesIO(BAD["PostScript"])))


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImageError, match="not a file"):
        decode_image(tmp_path / "pipe.png")


def test_odd_metadata_is_no_damage():
    image = picture(0)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2_000_000, zip=True)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"  # cut within an entry
    for content in (
        encoded(image, pnginfo=texts),
        encoded(image, icc_profile=b"no profile"),
        encoded(image, exif=exif),
    ):
        assert np.array_equal(decode_image(content), image)
    broken = bytearray(encoded(image, pnginfo=texts))
    broken[broken.index(b"zTXt") + 20] ^= 1  # its checksum is wrong
    assert np.array_equal(decode_image(bytes(broken)), image)
    with pytest.raises(BadImageError):
        decode_image(encoded(image)[:200])  # damaged pixels stay damage


@pytest.mark.parametrize("given", ["path", "bytes", "image", "array", "cell"])
def test_what_a_user_passes_is_taken(given, tmp_path):
    image = picture(0)
    image.save(tmp_path / "0.png")
    forms = {
        "path": str(tmp_path / "0.png"),
        "bytes": encoded(image),
        "image": image,
        "array": np.asarray(image),
        "cell": {"bytes": None, "path": str(tmp_path / "0.png")},
    }
    assert np.array_equal(decode_image(forms[given]), image)
    with pytest.raises(BadImageError, match="int is not an image; pass a path, bytes, a PIL.Image or an array"):
        decode_image(7)


@pytest.fixture
def shelf(tmp_path):
    """A data set's folder, and a picture and a token outside it."""
    folder = tmp_path / "set"
    folder.mkdir()
    picture(0).save(folder / "0.png")
    picture(1).save(tmp_path / "private.png")
    (tmp_path / "token").write_text("hf_secret")
    (folder / "token.png").write_text("hf_secret")
    os.symlink(tmp_path / "private.png", folder / "link.png")
    return folder


def args(shelf, path, kind="jsonl", **more):
    place = shelf / f"rows.{kind}"
    if kind == "parquet":
        features = Features(image=ImageFeature(decode=False), caption=Value("string"))
        rows = {"image": [{"bytes": None, "path": str(path)}], "caption": ["a cat"]}
        parquet.write_table(pa.table(rows, schema=features.arrow_schema), place)
    else:
        place.write_text(json.dumps({"image": str(path), "caption": "a cat"}))
    return SynthesisArguments(dataset=str(place), output_dir=str(shelf / "out"), **more)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "path", ["{outside}/private.png", "../private.png", "link.png", "file://{outside}/private.png"]
)
def test_images_outside_the_data_set_are_not_copied(path, kind, shelf):
    path = path.format(outside=shelf.parent)
    with pytest.raises(ValueError, match="outside '.*set'.*--allow_paths_outside"):
        load_captions(args(shelf, path, kind))
    kept = load_captions(args(shelf, path, kind, allow_paths_outside=True)).real_image(0)
    assert kept["bytes"] == (shelf.parent / "private.png").read_bytes()
    assert load_captions(args(shelf, "0.png", kind)).real_image(0)["bytes"] == (shelf / "0.png").read_bytes()


@pytest.mark.parametrize("column", ["image", "file_name"])
def test_a_hub_data_set_that_names_files_of_this_machine_is_refused(column, shelf, monkeypatch):
    private = shelf.parent / "private.png"
    rows = Dataset.from_dict({column: [str(private)], "caption": ["a cat"]})
    monkeypatch.setattr("gmail_hf.training.sources._from_hub", lambda *args: rows)
    hub = {"dataset": "someone/captions", "output_dir": str(shelf / "out")}
    with pytest.raises(ValueError, match="Row 0 of 'someone/captions' refers to the image .*--allow_paths_outside"):
        load_captions(SynthesisArguments(**hub))
    kept = load_captions(SynthesisArguments(**hub, allow_paths_outside=True)).real_image(0)
    assert kept["bytes"] == private.read_bytes()


def test_images_of_a_glob_are_next_to_its_files(shelf):
    args(shelf, "0.png")
    options = {"dataset": str(shelf / "*.jsonl"), "output_dir": str(shelf / "out")}
    assert load_captions(SynthesisArguments(**options)).real_image(0)["bytes"] == (shelf / "0.png").read_bytes()
    args(shelf, "../private.png")
    with pytest.raises(ValueError, match=r"private.png', which is outside '[^']*set'\. .*--allow_paths_outside"):
        load_captions(SynthesisArguments(**options))


def test_addresses_are_outside(shelf):
    for address in (
        "https://example.org/0.png",
        "zip://0.png::https://example.org/all.zip",
        "hf://datasets/a/b/0.png",
    ):
        with pytest.raises(ValueError, match="--allow_paths_outside"):
            load_captions(args(shelf, address))


def test_a_file_that_is_no_image_does_not_get_into_a_shard(shelf, caplog):
    assert load_captions(args(shelf, "token.png")).real_image(0) is None
    assert "is left out" in caplog.text
    options = ["--generator", generator_path(), "--num_inference_steps", "1", "--output_dir", str(shelf / "out")]
    cli.main(["generate", "--dataset", str(shelf / "rows.jsonl"), *options])
    (shard,) = (shelf / "out" / "data").glob("*.parquet")
    assert b"hf_secret" not in shard.read_bytes()


def test_the_demo_page_opens_uploads_only(tmp_path, monkeypatch):
    class Refused(Exception):
        def __init__(self, message, **_):
            super().__init__(message)

    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(Error=Refused))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    for place in ("uploads/0.png", "private.png"):
        picture(0).save(tmp_path / place)
    os.mkfifo(tmp_path / "uploads" / "pipe")
    assert np.array_equal(app.read_upload({"path": str(tmp_path / "uploads" / "0.png")}), picture(0))
    for path in (tmp_path / "private.png", tmp_path / "uploads" / ".." / "private.png", "/dev/zero", None):
        with pytest.raises(Refused, match="not an uploaded image"):
            app.read_upload({"path": path and str(path)})
    with pytest.raises(Refused, match="cannot be read"):
        app.read_upload({"path": str(tmp_path / "uploads" / "pipe")})
