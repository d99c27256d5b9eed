"""Captions from every kind of source, with ids that last."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from tiny import make_pairs, picture

from gmail_hf.generation.captions import Captions, load_captions


@pytest.fixture
def coco(tmp_path):
    """Three images, six captions, one of them empty; the paths of the images in a column."""
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    return Dataset.from_dict(
        {
            "id": [7, 3, 9],
            "image": [str(tmp_path / f"{index}.png") for index in range(3)],
            "sentences": [["a cat", "one cat"], ["a dog", " ", "a hound"], ["birds"]],
        }
    )


def coco_args(make_args, **changes):
    return make_args(caption_column="sentences", image_id_column="id", num_captions=None, **changes)


def test_several_captions_an_image(coco, make_args, caplog):
    captions = Captions(coco, coco_args(make_args))
    assert captions.captions == ["a cat", "one cat", "a dog", "a hound", "birds"]
    assert captions.caption_ids == ["7-0", "7-1", "3-0", "3-2", "9-0"]
    assert captions.image_ids == ["7", "7", "3", "3", "9"]
    assert "1 empty captions are left out" in caplog.text


def test_a_row_a_caption_gives_the_same_ids(coco, make_args):
    rows = [(row["id"], text) for row in coco for text in row["sentences"]]
    flat = Dataset.from_dict({"id": [row[0] for row in rows], "sentences": [row[1] for row in rows]})
    nested, flat = Captions(coco, coco_args(make_args)), Captions(flat, coco_args(make_args))
    assert flat.caption_ids == nested.caption_ids and flat.fingerprint() == nested.fingerprint()


def test_fingerprint_tells_captions_and_ids(coco, make_args):
    def fingerprint(dataset):
        return Captions(dataset, coco_args(make_args)).fingerprint()

    other_text = coco.map(lambda row: {"sentences": [text.upper() for text in row["sentences"]]})
    other_ids = coco.map(lambda row: {"id": row["id"] + 1})
    assert len({fingerprint(coco), fingerprint(other_text), fingerprint(other_ids)}) == 3


def test_real_images_kept_referenced_or_absent(coco, make_args, tmp_path):
    kept = Captions(coco, coco_args(make_args))
    assert kept.real_image(2) == {"bytes": (tmp_path / "1.png").read_bytes(), "path": "1.png"}
    referenced = Captions(coco, coco_args(make_args, real_images="reference"))
    assert referenced.real_image(4) == {"bytes": None, "path": str(tmp_path / "2.png")}
    assert Captions(coco, coco_args(make_args, real_images="drop")).images is None
    assert Captions(coco.remove_columns("image"), coco_args(make_args)).real_images == "drop"


def test_unreadable_real_image_is_none(coco, make_args, tmp_path, caplog):
    captions = Captions(coco, coco_args(make_args))
    (tmp_path / "1.png").unlink()
    assert captions.real_image(2) is None and captions.real_image(0) is not None
    assert "The real image of caption 3-0 cannot be read" in caplog.text


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_files(suffix, make_args, tmp_path):
    path = tmp_path / f"captions.{suffix}"
    dataset = Dataset.from_dict({"caption": ["a cat", "a dog"], "image_id": [1, 2]})
    {"csv": dataset.to_csv, "parquet": dataset.to_parquet}.get(suffix, dataset.to_json)(path)
    captions = load_captions(make_args(dataset=str(path)))
    assert captions.captions == ["a cat", "a dog"] and captions.caption_ids == ["1-0", "2-0"]


def test_without_ids_the_row_number_names_the_image(make_args, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(json.dumps({"caption": text}) for text in ("a cat", "a dog")))
    assert load_captions(make_args(dataset=str(path))).caption_ids == ["0-0", "1-0"]


def test_first_captions_are_a_prefix(make_args):
    few, many = (Captions(make_pairs(8), make_args(num_captions=number)) for number in (3, 5))
    assert few.caption_ids == many.caption_ids[:3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "text"}, r"no column 'text' among .*`caption_column`"),
        ({"image_id_column": "nr"}, r"no column 'nr' among .*`image_id_column`"),
        ({"real_image_column": "photo"}, r"no column 'photo' among .*`real_image_column`"),
        ({"real_image_column": "caption_id"}, "must have images or their paths"),
        ({"caption_column": "caption_id"}, "must have text, got int"),
        ({"caption_column": "nothing"}, "has no captions"),
        ({"real_images": "reference"}, "has bytes without paths"),
    ],
)
def test_mistakes(changes, message, make_args):
    pairs = make_pairs(4).add_column("caption_id", list(range(4))).add_column("nothing", [""] * 4)
    with pytest.raises(ValueError, match=message):
        Captions(pairs, make_args(**changes))


def test_no_images_to_keep(make_args):
    with pytest.raises(ValueError, match="needs a column of images"):
        Captions(make_pairs(2).select_columns(["caption"]), make_args(real_images="keep"))


def test_the_first_row_may_have_no_real_image_to_reference(make_args, tmp_path):
    picture(0).save(tmp_path / "0.png")
    rows = [{"image": None, "caption": "a cat"}, {"image": "0.png", "caption": "a dog"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captions = load_captions(make_args(dataset=str(tmp_path / "rows.jsonl"), real_images="reference"))
    assert captions.real_image(0) is None and captions.real_image(1)["path"] == str(tmp_path / "0.png")


def test_classes_are_captions_by_their_names(make_args, tmp_path):
    features = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]))
    rows = {"image": [picture(0), picture(1)], "label": [1, 0]}
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "classes")
    captions = load_captions(make_args(dataset=str(tmp_path / "classes"), caption_column="label"))
    assert captions.captions == ["dog", "cat"]


def test_no_such_file(make_args):
    with pytest.raises(FileNotFoundError, match="No data set at"):
        load_captions(make_args(dataset="nothing.json"))


def test_annotations_whose_images_are_not_there(make_args, tmp_path):
    path = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    path.parent.mkdir(parents=True)
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [{"id": 0, "image_id": 8, "caption": "a dog"}, {"id": 1, "image_id": 7, "caption": "a cat"}],
    }
    path.write_text(json.dumps(content))
    (tmp_path / "captions.csv").write_text("file_name,caption\na.jpg,a cat\n")
    for place in (path, tmp_path / "coco"):
        captions = load_captions(make_args(dataset=str(place), real_images="drop"))
        assert captions.caption_ids == ["7-0", "8-0"] and captions.captions == ["a cat", "a dog"]
    for place in (path, tmp_path / "captions.csv"):
        with pytest.raises(FileNotFoundError, match=r"names 'a.jpg'.*\. To generate .* add --real_images drop\."):
            load_captions(make_args(dataset=str(place)))
        with pytest.raises(FileNotFoundError) as error:
            load_captions(make_args(dataset=str(place), real_images="keep"))
        assert "drop" not in str(error.value)


def test_undecoded_images_are_copied_byte_for_byte(make_args):
    pairs = make_pairs(2)
    cell = pairs.cast_column("real_image", Image(decode=False))[1]["real_image"]
    assert Captions(pairs, make_args()).real_image(1)["bytes"] == cell["bytes"]


def test_rows_of_one_photograph_share_an_id(make_args, tmp_path):
    for name in ("a", "b"):
        make_pairs(1)[0]["real_image"].save(tmp_path / f"{name}.png")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,a cat\na.png,a tabby\nb.png,a dog\n")
    captions = load_captions(make_args(dataset=str(tmp_path / "captions.csv")))
    assert captions.image_ids == ["a.png", "a.png", "b.png"]
    assert captions.caption_ids == ["a.png-0", "a.png-1", "b.png-0"]
