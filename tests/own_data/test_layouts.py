"""Pairs from every usual layout of files: each value is the one that was written."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, Value
from pair_files import CAPTIONS, COUNT, IDS, check, rows_of, table, write_csv, write_jsonl
from pyarrow import parquet
from tiny import picture

from gmail_hf.training.loading import load_pairs
from gmail_hf.training.sources import load_rows


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_tables_of_relative_paths(kind, as_folder, images):
    path = images / f"pairs.{kind}"
    if kind in ("csv", "tsv"):
        write_csv(path, table(), "\t" if kind == "tsv" else ",")
    elif kind == "jsonl":
        write_jsonl(path, table())
    elif kind == "json":
        path.write_text(json.dumps(rows_of(table())))
    elif kind == "parquet":
        parquet.write_table(pa.table(table()), path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.table(table()).schema) as writer:
            writer.write_table(pa.table(table()))
    check(load_pairs(str(images if as_folder else path)))


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_string_type(type_, images):
    columns = pa.table(table())
    for number, name in enumerate(("real_image", "generated_image")):
        columns = columns.set_column(
            number,
            name,
            columns[name].cast(type_) if type_ != pa.string_view() else pa.array(columns[name].to_pylist(), type_),
        )
    with pa.OSFile(str(images / "pairs.arrow"), "wb") as sink, pa.ipc.new_stream(sink, columns.schema) as writer:
        writer.write_table(columns)
    check(load_pairs(str(images / "pairs.arrow")))


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_parquet_of_bytes(kind, images):
    columns = table()
    for side in ("real", "generated"):
        content = [(images / path).read_bytes() for path in columns[f"{side}_image"]]
        columns[f"{side}_image"] = content if kind == "binary" else [{"bytes": c, "path": None} for c in content]
    if kind == "binary":
        parquet.write_table(pa.table(columns), images / "pairs.parquet")
    else:
        image = Features(
            real_image=Image(), generated_image=Image(), caption=Value("string"), image_id=Value("string")
        )
        Dataset.from_dict(columns, features=image).to_parquet(images / "pairs.parquet")
    check(load_pairs(str(images / "pairs.parquet")))


def test_paths_in_the_working_directory(images, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    write_csv(tmp_path / "elsewhere" / "pairs.csv", table())
    monkeypatch.chdir(images)
    check(load_pairs(str(tmp_path / "elsewhere" / "pairs.csv")))


def test_the_first_missing_image_is_named_with_its_row(images):
    (images / "generated" / "2.png").unlink()
    for path in (write_csv(images / "pairs.csv", table()), write_jsonl(images / "pairs.jsonl", table())):
        with pytest.raises(
            FileNotFoundError, match=r"Row 2 of '.*pairs.* names 'generated/2.png' in column 'generated_image'"
        ):
            load_pairs(str(path))


def test_paths_inside_image_cells_are_found_too(images):
    cells = [{"bytes": None, "path": f"real/{i}.png"} for i in range(COUNT)]
    features = Features(
        real_image=Image(),
        generated_image=Image(),
        caption=Value("string"),
        image_id=Value("string"),
    )
    generated = [{"bytes": (images / "generated" / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(COUNT)]
    pairs = {"real_image": cells, "generated_image": generated, "caption": CAPTIONS, "image_id": IDS}
    pa_table = Dataset.from_dict(pairs, features=features).data.table
    parquet.write_table(pa_table, images / "pairs.parquet")
    check(load_pairs(str(images / "pairs.parquet")))


@pytest.mark.parametrize("place", ["t/pairs.csv", "pairs", "./pairs", "org/pairs.jsonl", "a/b/c", "no*thing.csv"])
def test_missing_paths_are_not_looked_up_on_the_hub(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="No data set at"):
        load_pairs(place)


def test_an_id_of_the_hub_that_cannot_be_read_says_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match="'org/pairs' is not a local path and cannot be read from the Hub"):
        load_pairs("org/pairs")


@pytest.mark.parametrize("name", ["Caption", "captions", "text", "sentences", "prompt"])
def test_usual_names_are_found_and_reported(name, images, caplog):
    columns = table()
    columns = {
        "photo_path": columns["real_image"],
        "generated_path": columns["generated_image"],
        name: columns["caption"],
        "image_id": IDS,
    }
    check(load_pairs(str(write_csv(images / "pairs.csv", columns))))
    assert f"Using column '{name}' as 'caption'" in caplog.text and "'photo_path' as 'real_image'" in caplog.text


def test_several_candidates_are_listed(images):
    columns = table()
    columns["text"] = columns.pop("caption")
    path = write_csv(images / "pairs.csv", {**columns, "prompt": CAPTIONS})
    with pytest.raises(ValueError, match=r"Several columns can be 'caption': \['text', 'prompt'\].*--caption_column"):
        load_pairs(str(path))
    check(
        load_pairs(
            str(path),
            columns={
                "caption": "prompt",
                "real_image": "real_image",
                "generated_image": "generated_image",
                "image_id": "image_id",
            },
        )
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_imagefolder_with_metadata(kind, images):
    columns = {"file_name": [f"real/{i}.png" for i in range(COUNT)], "text": CAPTIONS, "image_id": IDS}
    path = images / f"metadata.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table(columns), path)
    else:
        (write_csv if kind == "csv" else write_jsonl)(path, columns)
    check(load_pairs(str(images)), sides=("real",))
    assert "image" in load_rows(str(images)).column_names


def test_imagefolder_with_splits(images):
    for split, rows in (("train", range(3)), ("test", range(3, 4))):
        (images / split).mkdir()
        for i in rows:
            (images / "real" / f"{i}.png").rename(images / split / f"{i}.png")
        columns = {
            "file_name": [f"{i}.png" for i in rows],
            "text": [CAPTIONS[i] for i in rows],
            "image_id": [IDS[i] for i in rows],
        }
        write_csv(images / split / "metadata.csv", columns)
    check(load_pairs(str(images), "train"), IDS[:3], CAPTIONS[:3], range(3), ("real",))
    check(load_pairs(str(images), "test"), IDS[3:], CAPTIONS[3:], range(3, 4), ("real",))


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("captions_in", ["txt", "json"])
def test_tars_of_pairs(captions_in, images):
    """The keys of the second shard are those of the first."""
    (images / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(images / "tars" / f"{shard:05d}.tar", "w") as tar:
            for i in range(2):
                row = 2 * shard + i
                for side in ("real", "generated"):
                    add(tar, f"{i}.{side}.png", (images / side / f"{row}.png").read_bytes())
                text = CAPTIONS[row] if captions_in == "txt" else json.dumps({"caption": CAPTIONS[row], "key": str(i)})
                add(tar, f"{i}.{captions_in}", text.encode())
    ids = ["0", "1", "00001/0", "00001/1"]
    check(load_pairs(str(images / "tars")), ids)
    check(load_pairs(str(images / "tars" / "00001.tar")), ids[:2], CAPTIONS[2:], range(2, 4))


def test_coco_annotations(images, caplog):
    (images / "annotations").mkdir()
    (images / "real").rename(images / "val2017")
    (images / "train2017").mkdir()
    picture(99).save(images / "train2017" / "1.png")  # another image of the same name
    content = {
        "info": {},
        "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(COUNT)],
        "annotations": [
            {"id": k, "image_id": image, "caption": text}
            for k, (image, text) in enumerate(
                [(11, "a dog"), (10, "a cat"), (11, "a hound"), (12, "birds"), (77, "lost")]
            )
        ],
    }
    path = images / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(content))
    (images / "annotations" / "instances_val2017.json").write_text(
        json.dumps({**content, "annotations": [{"bbox": []}]})
    )
    expected = {
        "ids": ["10", "11", "11", "12"],
        "captions": ["a cat", "a dog", "a hound", "birds"],
        "order": [0, 1, 1, 2],
    }
    check(load_pairs(str(path)), **expected, sides=("real",))
    assert "1 captions of images that are not listed are left out: 77" in caplog.text
    assert "1 images without a caption are left out: 3.png" in caplog.text
    check(load_pairs(str(images), "validation"), **expected, sides=("real",))
    assert load_rows(str(path))["captions"][:] == [["a cat"], ["a dog", "a hound"], ["birds"]]


def test_karpathys_splits(images):
    (images / "images").mkdir()
    (images / "real").rename(images / "images" / "val2014")
    splits = ["train", "restval", "val", "test"]
    rows = [
        {"filepath": "val2014", "filename": f"{i}.png", "imgid": i, "cocoid": 100 + i, "split": splits[i],
         "sentences": [{"raw": CAPTIONS[i], "tokens": []}, {"raw": f"{CAPTIONS[i]} again", "tokens": []}]}
        for i in range(COUNT)
    ]  # fmt: skip
    (images / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    both = [text for caption in CAPTIONS for text in (caption, f"{caption} again")]
    name = str(images / "dataset_coco.json")
    check(load_pairs(name), ["100", "100", "101", "101"], both[:4], [0, 0, 1, 1], ("real",))
    check(load_pairs(name, "validation"), ["102"] * 2, both[4:6], [2, 2], ("real",))
    (images / "images" / "val2014" / "0.png").unlink()  # of another split, which need not be there
    check(load_pairs(name, "test"), ["103"] * 2, both[6:], [3, 3], ("real",))
    with pytest.raises(FileNotFoundError, match="Row 0 of .* names 'val2014/0.png'"):
        load_pairs(name, "train")


def test_texts_next_to_generated_images(images, caplog):
    """What generation tools write, next to a folder of photographs of any name."""
    (images / "real").rename(images / "holidays")
    (images / "generated").rename(images / "sd")
    for i in range(3):
        (images / "sd" / f"{i}.txt").write_text(f"{CAPTIONS[i]}\n")
    (images / "holidays" / "1.png").unlink()
    check(load_pairs(str(images)), ["0", "2"], [CAPTIONS[0], CAPTIONS[2]], [0, 2])
    assert "1 generated images without a partner are left out" in caplog.text and "1.png" in caplog.text
    assert "1 pairs without a caption are left out: 3" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_two_folders_and_a_table_of_captions(kind, images, caplog):
    (images / "generated" / "0.png").unlink()
    columns = {"name": [f"{i}.png" for i in range(COUNT)], "text": CAPTIONS}
    (write_csv if kind == "csv" else write_jsonl)(images / f"captions.{kind}", columns)
    check(load_pairs(str(images)), ["1", "2", "3"], CAPTIONS[1:], [1, 2, 3])
    assert "1 photographs without a partner are left out" in caplog.text


def test_a_table_of_captions_may_have_numbers_and_begin_with_an_absent_image(images):
    (images / "generated" / "0.png").unlink()
    (images / "real" / "0.png").unlink()
    names = [f"{i}.png" for i in range(COUNT)]
    write_csv(images / "captions.csv", {"id": range(COUNT), "file_name": names, "caption": CAPTIONS})
    check(load_pairs(str(images)), ["1", "2", "3"], CAPTIONS[1:], [1, 2, 3])


def test_a_part_of_a_split_is_read(images):
    path = str(write_csv(images / "pairs.csv", table()))
    check(load_pairs(path, "train[1:3]"), IDS[1:3], CAPTIONS[1:3], [1, 2])
    check(load_pairs(path, "train[:50%]"), IDS[:2], CAPTIONS[:2], [0, 1])
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        load_pairs(path, "test[:2]")
    with pytest.raises(ValueError, match=r"'train\[4:\]' selects none of the 4 rows"):
        load_pairs(path, "train[4:]")


def test_two_folders_without_captions_are_refused(images):
    with pytest.raises(ValueError, match="hold pairs without captions"):
        load_pairs(str(images))


def test_semicolons_and_empty_cells(images):
    columns = table()
    columns["generated_image"][2] = ""
    rows = load_pairs(str(write_csv(images / "pairs.csv", columns, ";")))
    assert rows["image_id"][:] == IDS and rows[2]["generated_image"] is None
    check(rows.select([0, 1, 3]), [IDS[i] for i in (0, 1, 3)], [CAPTIONS[i] for i in (0, 1, 3)], [0, 1, 3])


def test_images_with_texts(images, caplog):
    for i in range(3):
        (images / "real" / f"{i}.txt").write_text(CAPTIONS[i])
    rows = load_pairs(str(images / "real"))
    paths = [f"{i}.png" for i in range(3)]
    check(rows, paths, CAPTIONS[:3], range(3), ("real",))
    assert "1 images without a text are left out" in caplog.text


@pytest.mark.parametrize("labels", [("real", "sd"), ("Real", "Generated"), (0, 1)])
def test_one_image_per_row(labels, images, caplog):
    kinds = [("real", i) for i in range(3)] + [("generated", i) for i in (2, 0, 1, 3, 0)]
    columns = {
        "Image": [f"{side}/{i}.png" for side, i in kinds],
        "Caption": [CAPTIONS[i] for _, i in kinds],
        "Label_A": [labels[side == "generated"] for side, _ in kinds],
    }
    rows = load_pairs(str(write_jsonl(images / "rows.jsonl", columns)))
    order = [2, 0, 1, 0]
    check(rows, [f"real/{i}.png" for i in order], [CAPTIONS[i] for i in order], order)
    assert "1 rows of" in caplog.text and "without a partner are left out: 6" in caplog.text


def test_generated_rows_are_no_photographs_though_nobody_asks_for_them(images):
    kinds = [("real", 0), ("generated", 0), ("real", 1), ("generated", 1)]
    columns = {
        "image": [f"{side}/{i}.png" for side, i in kinds],
        "caption": [CAPTIONS[i] for _, i in kinds],
        "imgid": [i for _, i in kinds],
        "source": [side for side, _ in kinds],
    }
    path = write_jsonl(images / "rows.jsonl", columns)
    for asked in (
        ["real_image", "caption"],
        ["real_image", "caption", "image_id"],
        ["generated_image", "real_image", "caption"],
    ):
        rows = load_pairs(str(path), columns={name: name for name in asked})
        check(rows, ["0", "1"], CAPTIONS[:2], range(2))


def test_a_byte_order_mark_is_no_text(images):
    (images / "generated" / "0.txt").write_text("a cat", encoding="utf-8-sig")
    rows = load_pairs(str(images))
    check(rows, ["0"], ["a cat"], range(1))


def test_images_of_a_class_are_paired_in_turn(images):
    kinds = [("generated", 0), ("real", 1), ("generated", 2), ("real", 3), ("real", 0)]
    columns = {
        "image": [f"{side}/{i}.png" for side, i in kinds],
        "caption": ["a cat"] * 5,
        "is_generated": [side == "generated" for side, _ in kinds],
    }
    rows = load_pairs(str(write_jsonl(images / "rows.jsonl", columns)))
    pairs = [(Path(real).stem, image) for real, image in zip(rows["image_id"], rows["generated_image"], strict=True)]
    generated = [picture(1), picture(5), picture(1)]
    assert [real for real, _ in pairs] == ["1", "3", "0"]
    for (_, image), expected in zip(pairs, generated, strict=True):
        assert (np.asarray(image.convert("RGB")) == np.asarray(expected)).all()
