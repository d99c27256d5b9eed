"""Ids, captions and labels of own files: each value is the one that was written, or refused with its row."""

import os

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, Value
from pair_files import CAPTIONS, IDS, SIDES, check, table, write_csv, write_jsonl
from pyarrow import parquet

from gmail_hf.training.columns import one_caption_each, paths_of
from gmail_hf.training.data import undecoded
from gmail_hf.training.loading import load_pairs


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
