"""Files that are not quite as they should be: read as they were meant, or refused by name."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Image, List
from pyarrow import parquet
from tiny import make_clip, make_model, make_pairs, make_processor, picture

from gmail_hf import GmailCLIPModel
from gmail_hf.generation.arguments import SynthesisArguments
from gmail_hf.generation.captions import load_captions
from gmail_hf.training.checks import check_pairs
from gmail_hf.training.loading import load_pairs
from gmail_hf.training.preparation import replace_images
from gmail_hf.training.sources import load_rows
from gmail_hf.vlm import Conversations

NAMES = [f"real/{i}.png" for i in range(3)]
CAPTIONS = ["a cat", "a dog", "two birds"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "real").mkdir()
    for i, name in enumerate(NAMES):
        picture(i).save(tmp_path / name)
    return tmp_path


def write(folder, name, images=NAMES, sep=",", header=("real_image", "caption"), encoding="utf-8"):
    lines = [sep.join(header), *(sep.join(row) for row in zip(images, CAPTIONS, strict=True))]
    (folder / name).write_bytes("\n".join(lines).encode(encoding))
    return str(folder / name)


def check(rows, column="real_image"):
    for i, image in enumerate(rows[column]):
        assert np.array_equal(np.asarray(image), np.asarray(picture(i)))
    assert rows["caption"][:] == CAPTIONS


@pytest.mark.parametrize("sep", [";", "\t", "|"])
def test_separators(sep, folder):
    check(load_pairs(write(folder, "pairs.csv", sep=sep)))


@pytest.mark.parametrize(
    "change",
    [
        lambda name, folder: name.replace("/", "\\"),
        lambda name, folder: f" {name} ",
        lambda name, folder: f"file://{folder}/{name}",
        lambda name, folder: f"zip://{name}::all.zip",
        lambda name, folder: f"zip://{name}::{folder}/all.zip",
    ],
    ids=["windows", "spaces", "file://", "zip://", "zip:///"],
)
def test_paths_and_addresses(change, folder):
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for name in NAMES:
            archive.write(folder / name, name)
    check(load_pairs(write(folder, "pairs.csv", [change(name, folder) for name in NAMES])))


def test_an_archive_that_does_not_exist_is_named_with_its_row(folder):
    with pytest.raises(FileNotFoundError, match="Row 0 of .* names 'none.zip'"):
        load_pairs(write(folder, "pairs.csv", [f"zip://{name}::none.zip" for name in NAMES]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"image,caption\n", "is empty"),
        (b"image,caption\nreal/0.png,a cat, black\n", "row 0 has more fields than the header"),
        (b"image,caption\nreal/0.png,a cat\nreal/1.png,a dog, brown\n", "Expected 2 fields in line 3, saw 3"),
        ("image,caption\nreal/0.png,größe\n".encode("latin-1"), "it is not UTF-8 text"),
        ("image,caption\nreal/0.png,a cat\n".encode("utf-16"), "it is not UTF-8 text"),
    ],
)
def test_a_csv_that_cannot_be_read_is_named(content, message, folder):
    (folder / "pairs.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"pairs.csv' .*{message}"):
        load_pairs(str(folder / "pairs.csv"))


def test_a_broken_line_of_json_is_named(folder):
    (folder / "pairs.jsonl").write_text('{"image": "real/0.png", "caption": "x"\n')
    with pytest.raises(ValueError, match="pairs.jsonl' cannot be read: .*JSON"):
        load_pairs(str(folder / "pairs.jsonl"))


@pytest.mark.parametrize("ids", [[1, "1", 2], [2**70, 2**70 + 1, 1], [1.5, 2, 3], ["2020-01-01"] * 3, [True, 1, 2]])
def test_ids_that_json_does_not_keep_are_refused_by_training_and_generation(ids, folder):
    lines = [
        json.dumps({"image": name, "caption": text, "image_id": i})
        for name, text, i in zip(NAMES, CAPTIONS, ids, strict=True)
    ]
    place = folder / "pairs.jsonl"
    place.write_text("\n".join(lines))
    message = "mixes numbers and text|Write ids as text or integers"
    with pytest.raises(ValueError, match=message):
        load_pairs(str(place))
    with pytest.raises(ValueError, match=message):
        load_captions(SynthesisArguments(dataset=str(place), output_dir=str(folder / "out")))


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples(folder, texts):
    images = [(f"{i}.png", (folder / name).read_bytes()) for i, name in enumerate(NAMES)]
    return images + [(f"{i}.{kind}", text) for i, (kind, text) in enumerate(texts)]


def test_ids_and_captions_that_look_like_files_are_text(folder):
    header = ("real_image", "caption", "image_id")
    rows = [*zip(NAMES, ["red.png", "a dog", "two birds"], ["7 (2).jpg", "8.jpg", "9.jpg"], strict=True)]
    lines = [",".join(row) for row in (header, *rows)]
    (folder / "pairs.csv").write_text("\n".join(lines))
    pairs = load_pairs(str(folder / "pairs.csv"))
    assert pairs["image_id"][:] == ["7 (2).jpg", "8.jpg", "9.jpg"] and pairs["caption"][0] == "red.png"


@pytest.mark.parametrize("bytes_in_rows", [True, False])
@pytest.mark.parametrize("column", ["filename", "original_filename", "page_file"])
def test_names_of_images_that_are_not_there_are_text_next_to_images(column, bytes_in_rows, folder, caplog):
    """Flickr30k on the Hub has `image`, with bytes, and `filename`."""
    columns = {"image": NAMES, column: ["7.jpg", "8.jpg", "9.jpg"], "caption": CAPTIONS}
    table = Dataset.from_dict(columns)
    if bytes_in_rows:
        columns["image"] = [{"bytes": (folder / name).read_bytes(), "path": None} for name in NAMES]
        table = Dataset.from_dict(columns).cast_column("image", Image())
    table.to_parquet(folder / "rows.parquet")
    rows = load_pairs(str(folder / "rows.parquet"))
    check(rows)
    assert rows[column][:] == columns[column]
    assert f"Column '{column}' of" in caplog.text and "its image '7.jpg' does not exist" in caplog.text
    captions = load_captions(SynthesisArguments(dataset=str(folder / "rows.parquet"), output_dir=str(folder / "out")))
    assert captions.real_image(0)["bytes"] == (folder / NAMES[0]).read_bytes()


def test_a_missing_photograph_is_not_text_next_to_generated_images(folder):
    for column in ("photo", "real_image"):
        header, rows = f"{column},generated_image,caption", [f"gone.png,{name},a cat" for name in NAMES]
        (folder / "pairs.csv").write_text("\n".join([header, *rows]))
        with pytest.raises(FileNotFoundError, match=f"Row 0 of .* names 'gone.png' in column '{column}'"):
            load_pairs(str(folder / "pairs.csv"))


def test_tars_in_any_order_with_ids_and_missing_texts(folder, caplog):
    texts = [("json", json.dumps({"caption": text, "image_id": f"00{i}"}).encode()) for i, text in enumerate(CAPTIONS)]
    tar(folder / "a.tar", samples(folder, texts))
    rows = load_pairs(str(folder / "a.tar"))
    check(rows)
    assert rows["image_id"][:] == ["000", "001", "002"]
    texts = [("caption.txt", text.encode()) for text in CAPTIONS]
    tar(folder / "b.tar", samples(folder, texts))
    check(load_pairs(str(folder / "b.tar")))
    caplog.clear()
    tar(folder / "a.tar", samples(folder, texts[:2]))  # another content of the same name
    rows = load_pairs(str(folder / "a.tar"))
    assert rows["caption"][:] == CAPTIONS[:2] and rows["image_id"][:] == ["0", "1"]
    assert "1 samples without all of ['image', 'txt'] are left out: 2 of a.tar" in caplog.text


def test_texts_that_are_not_utf8_are_named(folder):
    latin = "caf\xe9".encode("latin-1")
    tar(folder / "a.tar", samples(folder, [("txt", b"a cat"), ("txt", latin), ("txt", b"two birds")]))
    with pytest.raises(ValueError, match="'1.txt' of .*a.tar' is not UTF-8 text: save it as UTF-8"):
        load_pairs(str(folder / "a.tar"))
    tar(folder / "b.tar", samples(folder, [("json", b'{"caption": "a cat"}'), ("json", b"{"), ("json", b"{}")]))
    with pytest.raises(ValueError, match="'1.json' of .*b.tar' is not JSON"):
        load_pairs(str(folder / "b.tar"))
    (folder / "real" / "0.txt").write_bytes(latin)
    with pytest.raises(ValueError, match="0.txt' is not UTF-8 text"):
        load_pairs(str(folder / "real"))


def test_a_byte_order_mark_in_a_tar_is_no_text(folder):
    tar(folder / "a.tar", samples(folder, [("txt", text.encode("utf-8-sig")) for text in CAPTIONS]))
    check(load_pairs(str(folder / "a.tar")))


@pytest.mark.parametrize("word", ["train", "test"])
@pytest.mark.parametrize("with_texts", [True, False])
def test_the_word_train_in_the_name_of_one_image_is_no_split(with_texts, word, folder):
    names = ["cat_0", "dog_1", f"{word}_2"]
    (folder / "photos").mkdir()
    for i, name in enumerate(names):
        picture(i).save(folder / "photos" / f"{name}.png")
        if with_texts:
            (folder / "photos" / f"{name}.txt").write_text(name)
    rows = load_rows(str(folder / "photos"))
    assert len(rows) == 3
    if with_texts:
        assert rows["captions"][:] == [[name] for name in names]


def test_images_are_divided_if_all_of_their_names_have_the_word_of_a_split(folder):
    (folder / "photos").mkdir()
    for i, name in enumerate(["train_0", "train_1", "test_0"]):
        picture(i).save(folder / "photos" / f"{name}.png")
        (folder / "photos" / f"{name}.txt").write_text(name)
    assert load_rows(str(folder / "photos"), "test")["captions"][:] == [["test_0"]]
    assert load_rows(str(folder / "photos"), "train")["captions"][:] == [["train_0"], ["train_1"]]


def test_a_format_that_was_saved_with_the_rows_does_not_change_ids(folder):
    rows = make_pairs(2).remove_columns("image_id").add_column("image_id", [7, 8])
    rows.with_format("torch").save_to_disk(folder / "saved")
    assert load_pairs(str(folder / "saved"))["image_id"][:] == ["7", "8"]


def test_folders_without_common_names_are_refused(folder):
    (folder / "generated").mkdir()
    picture(0).save(folder / "generated" / "g.png")
    (folder / "generated" / "g.txt").write_text("a cat")
    with pytest.raises(ValueError, match="real' and .*generated' have no image names in common"):
        load_pairs(str(folder))


@pytest.mark.parametrize("empty", [None, ""])
def test_an_image_that_is_neither_real_nor_generated_is_refused(empty, folder):
    rows = [{"image": NAMES[i], "caption": "a cat", "source": kind} for i, kind in enumerate(("real", "sd", empty))]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="Row 2 of .* has no 'source'"):
        load_pairs(str(folder / "rows.jsonl"))


@pytest.mark.parametrize("caption", ["", "  ", None])
def test_empty_captions_are_refused(caption):
    pairs = make_pairs(12, captions=[f"a {i}" for i in range(11)] + ["b"])
    captions = pairs["caption"][:]
    pairs = pairs.remove_columns("caption").add_column("caption", [*captions[:10], caption, captions[11]])
    with pytest.raises(ValueError, match="Row 10 of train_dataset has no 'caption'"):
        check_pairs(pairs)


def test_captions_that_are_all_equal_to_the_model_are_refused():
    with pytest.raises(ValueError, match="All rows of train_dataset have caption"):
        check_pairs(make_pairs(4, captions=["a cat", "A cat", "a cat\n", " a  cat"]))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_paths_become_lists_of_images(kind, folder):
    lists = [NAMES[:2], None, NAMES[1:]]
    if kind == "parquet":
        parquet.write_table(pa.table({"images": lists, "caption": CAPTIONS}), folder / "rows.parquet")
    else:
        rows = [{"images": images, "caption": text} for images, text in zip(lists, CAPTIONS, strict=True)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = load_rows(str(folder / f"rows.{kind}"))
    assert isinstance(rows.features["images"], List) and isinstance(rows.features["images"].feature, Image)
    found = [[np.asarray(image) for image in images or []] for images in rows["images"]]
    assert [len(images) for images in found] == [2, 0, 2]
    assert np.array_equal(found[2], [np.asarray(picture(i)) for i in (1, 2)])
    paths = Conversations(rows, "images")[2]["images"]
    assert [image["path"] for image in paths] == [str(folder / name) for name in NAMES[1:]]
    lists[2] = [NAMES[0], "real/none.png"]
    parquet.write_table(pa.table({"images": lists}), folder / "rows.parquet")
    with pytest.raises(FileNotFoundError, match="Row 2 of .* names 'real/none.png'"):
        load_rows(str(folder / "rows.parquet"))


def test_optimal_pairing_groups_captions_by_what_the_model_sees(clip_folder, arguments):
    """Partners are exchanged between captions that differ in case alone."""
    pairs = make_pairs(6, captions=["a cat", "A cat", "a cat ", "a dog", "A dog", "a  dog"])
    args = arguments(cache_real_embeds=True)
    model, processor = make_model(clip_folder), make_processor()
    found = replace_images(pairs, model, processor, args, pairing="optimal").partners
    same = pairs.remove_columns("caption").add_column("caption", ["a cat"] * 3 + ["a dog"] * 3)
    expected = replace_images(same, model, processor, args, pairing="optimal").partners
    assert found.tolist() == expected.tolist() != list(range(6))


def test_a_pickle_says_how_to_convert_it(tmp_path):
    make_clip().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    for load in (GmailCLIPModel.from_base, GmailCLIPModel.from_pretrained):
        with pytest.raises(OSError, match="pytorch_model.bin and no model.safetensors.*save_pretrained"):
            load(tmp_path)
