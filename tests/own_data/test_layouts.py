"""Pairs from every usual layout of files: each value is the one that was written."""

import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, Value
from pyarrow import parquet
from tiny import picture

from gmail_hf.training.columns import one_caption_each, paths_of
from gmail_hf.training.data import undecoded
from gmail_hf.training.loading import load_pairs
from gmail_hf.training.sources import load_rows

COUNT = 4
CAPTIONS = ["a cat", "a dog", "two birds", "a red car"]
SIDES = {"real_image": "real", "generated_image": "generated"}
IDS = ["007", "7", "9007199254740993", "9007199254740992"]


@pytest.fixture
def images(tmp_path):
    """`real/0.png`, ... and `generated/0.png`, ..., in a folder whose name is a pattern to glob."""
    folder = tmp_path / "run[v2]"
    for side in ("real", "generated"):
        (folder / side).mkdir(parents=True)
        for i in range(COUNT):
            picture(2 * i + (side == "generated")).save(folder / side / f"{i}.png")
    return folder


def check(rows, ids=IDS, captions=CAPTIONS, order=range(COUNT), sides=("real", "generated")):
    """`order`: which of the images each row has."""
    assert len(rows) == len(order)
    for side in sides:
        for image, i in zip(rows[f"{side}_image"], order, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(picture(2 * i + (side == "generated"))))
    assert rows["caption"][:] == list(captions)
    assert rows["image_id"][:] == list(ids)


def table(folder=None, **more):
    """Columns of paths, relative or in a folder."""
    paths = {side: [f"{side}/{i}.png" for i in range(COUNT)] for side in ("real", "generated")}
    if folder:
        paths = {side: [str(folder / path) for path in found] for side, found in paths.items()}
    return {
        "real_image": paths["real"],
        "generated_image": paths["generated"],
        "caption": CAPTIONS,
        "image_id": IDS,
        **more,
    }


def rows_of(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def write_csv(path, columns, sep=","):
    lines = [sep.join(columns), *(sep.join(map(str, row.values())) for row in rows_of(columns))]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_jsonl(path, columns):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(columns)))
    return path


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


def test_classes_are_captions_by_their_names(images):
    labels = datasets.ClassLabel(names=["a cat", "a dog"])
    columns = {name: [str(images / side / f"{i}.png") for i in range(2)] for name, side in SIDES.items()}
    rows = Dataset.from_dict(
        {**columns, "label": [1, 0], "image_id": ["0", "1"]},
        Features({**dict.fromkeys(columns, Image()), "label": labels, "image_id": Value("string")}),
    )
    rows.save_to_disk(images / "saved")
    loaded = load_pairs(str(images / "saved"), columns={"caption": "label", "generated_image": "generated_image"})
    assert loaded["caption"][:] == ["a dog", "a cat"]


def test_rows_without_a_class_have_no_caption():
    rows = Dataset.from_dict({"caption": [1, None]}, Features(caption=datasets.ClassLabel(names=["a cat", "a dog"])))
    assert one_caption_each(rows)["caption"][:] == ["a dog", None]


def test_paths_belong_to_the_selected_rows():
    cells = [{"bytes": None, "path": f"{i}.png"} for i in range(4)]
    rows = Dataset.from_dict({"image": cells}, Features(image=Image(decode=False)))
    assert list(paths_of(rows.select([3, 1]), "image")) == ["3.png", "1.png"]


def test_a_label_that_does_not_say_what_it_means_is_refused(images):
    columns = {"image": ["real/0.png", "generated/0.png"], "caption": CAPTIONS[:2], "label": [0, 1]}
    with pytest.raises(ValueError, match="Rename it to 'is_generated' or 'is_real'"):
        load_pairs(str(write_jsonl(images / "rows.jsonl", columns)))
    columns["is_real"] = [1 - label for label in columns.pop("label")]
    columns["caption"] = ["a cat", "a cat"]
    rows = load_pairs(str(write_jsonl(images / "rows.jsonl", columns)))
    check(rows, ["real/0.png"], ["a cat"], [0])


@pytest.mark.parametrize("cell", [None, float("nan"), ""])
def test_a_row_without_an_id_is_refused(cell, images):
    columns = table(image_id=[1.0, 2.0, cell, 3.0] if cell != "" else ["1", "2", "", "3"])
    parquet.write_table(pa.table(columns), images / "pairs.parquet")
    with pytest.raises(ValueError, match="Row 2 of .* has no 'image_id'"):
        load_pairs(str(images / "pairs.parquet"))


def test_an_empty_id_in_a_csv_is_refused(images):
    with pytest.raises(ValueError, match="Row 1 of .* has no 'image_id'"):
        load_pairs(str(write_csv(images / "pairs.csv", table(image_id=["1", "", "3", "4"]))))


def test_ids_of_numbers_become_text(images):
    ids = [7, 2**53, 2**53 + 1, 1]
    check(load_pairs(str(write_jsonl(images / "pairs.jsonl", table(image_id=ids)))), [str(i) for i in ids])


def test_ids_of_numbers_and_text_are_refused(images):
    with pytest.raises(ValueError, match="mixes numbers and text"):
        load_pairs(str(write_jsonl(images / "pairs.jsonl", table(image_id=[7, "007", 3, 4]))))


def test_without_ids_rows_of_one_photograph_are_one_image(images, caplog):
    columns = table()
    columns["real_image"][1] = columns["real_image"][0]
    del columns["image_id"]
    rows = load_pairs(str(write_csv(images / "pairs.csv", columns)))
    assert rows["image_id"][:] == [os.path.basename(path) for path in columns["real_image"]]
    assert "using the path of the real image as the id" in caplog.text


def test_an_empty_cell_does_not_change_the_ids_of_other_rows(images, caplog):
    columns = table()
    columns["real_image"] = [columns["real_image"][i] for i in (0, 0, 1)] + [""]
    del columns["image_id"]
    rows = load_pairs(str(write_csv(images / "pairs.csv", columns)))
    assert rows["image_id"][:] == ["0.png", "0.png", "1.png", "3"]
    assert "using the path of the real image, or else the row number, as the id" in caplog.text


def test_lists_of_captions_become_rows(images):
    columns = table()
    columns["captions"] = [
        [text, f"{text} again"] if i == 1 else [text] for i, text in enumerate(columns.pop("caption"))
    ]
    order = [0, 1, 1, 2, 3]
    captions = [CAPTIONS[0], "a dog", "a dog again", *CAPTIONS[2:]]
    check(load_pairs(str(write_jsonl(images / "pairs.jsonl", columns))), [IDS[i] for i in order], captions, order)


def test_images_stay_files(images):
    rows = undecoded(load_pairs(str(write_csv(images / "pairs.csv", table()))))
    assert rows[1]["real_image"] == {"bytes": None, "path": str(images / "real" / "1.png")}
    assert os.path.isabs(rows[1]["real_image"]["path"])
