"""Benchmarks of one's own: class folders and images with captions, by `gmail-hf evaluate`."""

import json
import shutil

import pytest
from benchmark_data import save_gmail, webp, write_webdataset
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from pyarrow import parquet
from tiny import make_pairs, picture

from gmail_hf.commands import evaluate
from gmail_hf.commands.bundled import get_benchmark
from gmail_hf.evaluation import open_source
from gmail_hf.evaluation.sources import captions_of
from gmail_hf.evaluation.zero_shot import class_question
from gmail_hf.training.data import decode_image


@pytest.fixture(scope="module")
def gmail(tmp_path_factory):
    return save_gmail(tmp_path_factory.mktemp("model") / "gmail")


@pytest.fixture
def run(gmail, tmp_path):
    def main(place):
        options = ["--model", gmail, "--benchmarks", "mine", "--dataset", f"mine={place}", "--device", "cpu"]
        return evaluate.main([*options, "--output_dir", str(tmp_path / "scores")])["mine"]

    return main


def mine(place):
    return open_source(get_benchmark("mine", str(place)), str(place))


@pytest.fixture
def classes(tmp_path):
    folder = tmp_path / "my [classes]"
    for number, name in enumerate(("red_fox", "cat", "cat", "owl")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name / f"{number}.png")
    return folder


def test_class_folders(classes, run):
    found = mine(classes)
    rows = list(found.read())
    assert [row["cls"] for row in rows] == [0, 0, 1, 2]
    order = [1, 2, 3, 0]  # cat, owl, red_fox
    assert [decode_image(row["image"]).tobytes() for row in rows] == [picture(i).tobytes() for i in order]
    assert class_question(found).prompts == [[["a photo of a cat."], ["a photo of a owl."], ["a photo of a red fox."]]]
    result = run(classes)
    assert list(result["tasks"]) == ["zero_shot"]
    assert result["tasks"]["zero_shot"]["counts"] == {"images": 4, "classes": 3, "prompts per class": 1}


def test_a_limit_takes_images_of_each_class_folder(classes):
    found = open_source(get_benchmark("mine", str(classes)), str(classes), limit=3)
    assert [row["cls"] for row in found.read()] == [0, 1, 2]


def test_a_limit_takes_rows_of_each_label(tmp_path):
    for i in range(6):
        picture(i).save(tmp_path / f"{i}.png")
    table = tmp_path / "labels.csv"
    table.write_text("image,label\n" + "".join(f"{i}.png,{'aabbcc'[i]}\n" for i in range(6)))
    found = list(open_source(get_benchmark("mine", str(table)), str(table), limit=4).read())
    assert [row["cls"] for row in found] == [0, 1, 2, 0]
    assert [decode_image(row["image"]).tobytes() for row in found] == [picture(i).tobytes() for i in (0, 2, 4, 1)]


def test_names_and_templates_of_class_folders(classes):
    (classes / "classnames.txt").write_text("house cat\nbarn owl\nfox\n")
    (classes / "templates.txt").write_text("a {c}\nthe {c}\n")
    assert class_question(mine(classes)).prompts == [
        [["a house cat", "the house cat"], ["a barn owl", "the barn owl"], ["a fox", "the fox"]]
    ]
    (classes / "classnames.txt").write_text("cat\nowl\n")
    with pytest.raises(ValueError, match="has 2 lines for 3 class folders of .* lacks .'red_fox'.: list all"):
        mine(classes)


def test_names_of_class_folders_in_another_order(classes):
    (classes / "classnames.txt").write_text("red fox\nwolf\nowl\ncat\n")
    found = mine(classes)
    assert [row["cls"] for row in found.read()] == [3, 3, 2, 0]
    assert found.lines("classnames.txt") == ["red fox", "wolf", "owl", "cat"]


def test_a_misspelt_name_of_a_class_folder_is_no_other_order(classes):
    (classes / "classnames.txt").write_text("red fox\ncats\nowl\n")
    with pytest.raises(ValueError, match=r"3 lines for 3 class folders of .* lacks \['cat'\].* order cat, owl, red"):
        mine(classes)
    (classes / "classnames.txt").write_text("red fox\ncat\nowl\n", encoding="utf-8-sig")  # as Windows writes it
    assert [row["cls"] for row in mine(classes).read()] == [1, 1, 2, 0]


def test_class_folders_of_other_splits_are_no_classes(classes):
    for split in ("train", "val"):
        shutil.copytree(classes, classes.parent / "splits" / split)
    with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train', 'validation'\]"):
        mine(classes.parent / "splits")
    with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train', 'validation'\]"):
        open_source(get_benchmark("pets"), str(classes.parent / "splits"))


def test_hidden_files_in_class_folders_are_no_images(classes):
    (classes / "cat" / ".ipynb_checkpoints").mkdir()
    picture(9).save(classes / "cat" / ".ipynb_checkpoints" / "1-checkpoint.png")
    (classes / "owl" / "._3.png").write_bytes(b"\0\5\x16\7")
    assert [row["cls"] for row in mine(classes).read()] == [0, 0, 1, 2]


@pytest.mark.parametrize("kind", ["csv", "classes", "texts", "coco", "saved"])
def test_the_only_split_is_named(kind, tmp_path):
    """Also where paths become images, and where the rows do not name their split."""
    place, expected = tmp_path / "own", "validation"
    place.mkdir()
    folders = {"classes": ("validation/cat", "validation/dog"), "texts": ("validation",) * 2}.get(kind, (".",) * 2)
    for number, folder in enumerate(folders):
        (place / folder).mkdir(parents=True, exist_ok=True)
        picture(number).save(place / folder / f"{number}.png")
        if kind == "texts":
            (place / folder / f"{number}.txt").write_text("a cat")
    if kind == "csv":
        (place / "validation.csv").write_text("image,caption\n0.png,a cat\n1.png,a dog\n")
    elif kind == "coco":
        notes = [{"image_id": number, "caption": "a cat"} for number in range(2)]
        images = [{"id": number, "file_name": f"{number}.png"} for number in range(2)]
        content = {"images": images, "annotations": notes}
        (place / "captions_val2017.json").write_text(json.dumps(content))
    elif kind == "saved":
        place, expected = tmp_path / "saved", "held_out"
        rows = make_pairs(4).train_test_split(0.5, seed=0)["test"]
        DatasetDict(held_out=Dataset(rows.data, split="train")).save_to_disk(place)
    found = mine(place)
    assert found.split == expected and len(list(found.read())) == (4 if kind == "saved" else 2)


def test_classes_of_the_test_split(classes):
    (classes / "test" / "owl").mkdir(parents=True)
    (classes / "test" / "cat").mkdir()
    picture(8).save(classes / "test" / "owl" / "8.png")
    picture(9).save(classes / "test" / "cat" / "9.png")
    rows = list(mine(classes).read())
    assert [(row["cls"], decode_image(row["image"]).tobytes()) for row in rows] == [
        (0, picture(9).tobytes()),
        (1, picture(8).tobytes()),
    ]


@pytest.mark.parametrize("kind", ["csv", "texts", "coco"])
def test_images_with_captions(kind, tmp_path, run):
    folder = tmp_path / "photos"
    folder.mkdir()
    captions = [["a cat"], ["a dog"], ["a bird"]]
    for i, (text,) in enumerate(captions):
        picture(i).save(folder / f"{i}.png")
        if kind == "texts":
            (folder / f"{i}.txt").write_text(text)
    place = folder
    if kind == "csv":
        place = folder / "captions.csv"
        place.write_text("file_name,text\n" + "".join(f"{i}.png,{text}\n" for i, (text,) in enumerate(captions)))
    if kind == "coco":
        captions[1].append("a hound")
        place = folder / "captions.json"
        notes = [{"image_id": i, "caption": text} for i, texts in enumerate(captions) for text in texts]
        content = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)], "annotations": notes}
        place.write_text(json.dumps(content))
    found = mine(place)
    read = {}
    for row in found.read():
        image_id, texts = captions_of(row, found)
        assert decode_image(row[found.image_column]).tobytes() == picture(len(read) - (image_id in read)).tobytes()
        read.setdefault(image_id, []).extend(texts)
    assert list(read.values()) == captions
    if kind == "coco":
        assert list(read) == ["0", "1", "2"]
    result = run(place)
    assert list(result["tasks"]) == ["retrieval"]
    counts = result["tasks"]["retrieval"]["counts"]
    assert (counts["images"], counts["captions"]) == (3, sum(map(len, captions)))


def test_pairs_of_photographs_and_generated_images(tmp_path):
    for i in range(3):
        for side in ("photos", "generated"):
            (tmp_path / "own" / side).mkdir(parents=True, exist_ok=True)
            picture(i + 5 * (side == "generated")).save(tmp_path / "own" / side / f"{i}.png")
        (tmp_path / "own" / "generated" / f"{i}.txt").write_text(f"number {i}")
    found = mine(tmp_path / "own")
    assert found.has_pairs
    rows = list(found.read())
    assert [row["caption"] for row in rows] == ["number 0", "number 1", "number 2"]
    assert decode_image(rows[1]["generated_image"]).tobytes() == picture(6).tobytes()


def test_a_name_without_data_is_unknown():
    with pytest.raises(ValueError, match="Unknown benchmark 'mine'"):
        get_benchmark("mine")
    with pytest.raises(FileNotFoundError, match="No data set at './nothing'"):
        get_benchmark("mine", "./nothing")


def test_keys_that_begin_again_in_each_shard(tmp_path):
    """Every image counts, with its own caption."""
    samples = [{"webp": webp(i), "txt": f"number {i}".encode()} for i in range(6)]
    for shard in range(2):
        write_webdataset(tmp_path / str(shard), samples[3 * shard : 3 * shard + 3], shards=1)
    (tmp_path / "1" / "test" / "0.tar").rename(tmp_path / "0" / "test" / "1.tar")
    found = open_source(get_benchmark("coco"), str(tmp_path / "0"))
    read = [(captions_of(row, found), decode_image(row["webp"]).tobytes()) for row in found.read()]
    ids = ["s0000000", "s0000001", "s0000002", "1/s0000000", "1/s0000001", "1/s0000002"]
    assert read == [((ids[i], [f"number {i}"]), picture(i).tobytes()) for i in range(6)]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_missing_ids_are_refused(value, tmp_path):
    ids = [1.0, value, 3.0]
    rows = make_pairs(3).remove_columns("image_id").add_column("image_id", ids)
    parquet.write_table(rows.data.table, tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="Row 1 of .* has no 'image_id'"):
        open_source(get_benchmark("coco"), str(tmp_path / "pairs.parquet"))


@pytest.mark.parametrize("kind", ["names", "numbers", "csv", "features"])
def test_a_table_of_images_and_labels(kind, tmp_path, run):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    names, numbers = ["red_fox", "cat", "red_fox", "cat"], [1, 0, 1, 0]
    place = tmp_path / ("labels.csv" if kind == "csv" else "labels.jsonl")
    if kind == "csv":
        place.write_text("image,class\n" + "".join(f"{i}.png,{number}\n" for i, number in enumerate(numbers)))
    elif kind == "features":
        place = tmp_path / "saved"
        features = Features(image=Image(), label=ClassLabel(names=["cat", "red_fox"]))
        Dataset.from_dict({"image": [picture(i) for i in range(4)], "label": numbers}, features).save_to_disk(place)
    else:
        labels = names if kind == "names" else numbers
        rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
        place.write_text("\n".join(map(json.dumps, rows)))
    if kind in ("csv", "numbers"):
        with pytest.raises(ValueError, match="has numbers without names: add classnames.txt"):
            mine(place)
        (tmp_path / "classnames.txt").write_text("cat\nred fox\n")
    found = mine(place)
    rows = list(found.read())
    assert [row["cls"] for row in rows] == numbers
    assert [decode_image(row["image"]).tobytes() for row in rows] == [picture(i).tobytes() for i in range(4)]
    assert class_question(found).prompts == [[["a photo of a cat."], ["a photo of a red fox."]]]
    if kind == "names":
        assert run(place)["tasks"]["zero_shot"]["counts"]["images"] == 4


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_whole_numbers_as_floats_are_lines_of_the_names(kind, tmp_path):
    """As pandas writes a column that once had gaps. In alphabetical order 10.0 would come before 2.0."""
    picture(0).save(tmp_path / "0.png")
    table = tmp_path / f"labels.{kind}"
    if kind == "csv":
        table.write_text("image,label\n" + "".join(f"0.png,{i}.0\n" for i in range(12)))
    else:
        Dataset.from_dict({"image": ["0.png"] * 12, "label": [float(i) for i in range(12)]}).to_parquet(table)
    with pytest.raises(ValueError, match="has numbers without names"):
        mine(table)
    (tmp_path / "classnames.txt").write_text("".join(f"name {i}\n" for i in range(12)))
    assert [row["cls"] for row in mine(table).read()] == list(range(12))


def test_labels_are_found_among_the_names(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text("image,label\n0.png,cat\n1.png,red_fox\n2.png,cat\n")
    for names, numbers in (
        ("red fox\ncat\n", [1, 0, 1]),
        ("red_fox\nowl\ncat\n", [2, 0, 2]),
        ("house cat\nfox\n", [0, 1, 0]),
    ):
        (tmp_path / "classnames.txt").write_text(names)
        found = mine(tmp_path / "labels.csv")
        assert [row["cls"] for row in found.read()] == numbers
        assert found.lines("classnames.txt") == names.replace("_", " ").splitlines()
    (tmp_path / "classnames.txt").write_text("house cat\nowl\nfox\n")
    with pytest.raises(ValueError, match="has 3 lines for 2 labels of .* order cat, red_fox"):
        mine(tmp_path / "labels.csv")


def test_class_labels_are_found_among_the_names(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["red_fox", "cat"])})
    rows = Dataset.from_dict({"image": [picture(i) for i in range(3)], "label": [1, 0, 1]}, features)
    rows.to_parquet(tmp_path / "test.parquet")
    for names, numbers in (
        (None, [1, 0, 1]),
        ("cat\nred fox\n", [0, 1, 0]),
        ("cat\nowl\nred_fox\n", [0, 2, 0]),
        ("fox\nhouse cat\n", [1, 0, 1]),
    ):
        if names is not None:
            (tmp_path / "classnames.txt").write_text(names)
        found = mine(tmp_path / "test.parquet")
        assert [row["cls"] for row in found.read()] == numbers
        assert found.lines("classnames.txt") == (names or "red fox\ncat").replace("_", " ").splitlines()
    (tmp_path / "classnames.txt").write_text("house cat\nowl\nfox\n")
    with pytest.raises(ValueError, match="has 3 lines for 2 labels of .* order red_fox, cat"):
        mine(tmp_path / "test.parquet")


def test_the_revision_of_a_table_changes_with_its_images_and_class_names(tmp_path):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    place = tmp_path / "labels.csv"
    place.write_text("image,label\n0.png,cat\n1.png,dog\n")
    revisions = [mine(place).revision]
    picture(7).save(tmp_path / "other.png")
    assert mine(place).revision == revisions[0]
    (tmp_path / "templates.txt").write_text("the {c}\n")
    revisions.append(mine(place).revision)
    picture(7, "L").save(tmp_path / "1.png")
    revisions.append(mine(place).revision)
    assert len(set(revisions)) == 3


def test_labels_that_are_missing_or_unclear_are_refused(tmp_path):
    picture(0).save(tmp_path / "0.png")
    for row, message in (
        ({"label": None}, "Row 1 of .* has no 'label'"),
        ({"label": ["a", "b"]}, "'label' of .* must hold one label per row, not lists"),
        ({"label": "a", "class": "b"}, "Several columns may contain the labels: .'label', 'class'."),
    ):
        other = ["a"] if row["label"] == ["a", "b"] else "a"
        rows = [{"image": "0.png", **dict.fromkeys(row, other)}, {"image": "0.png", **row}]
        (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(ValueError, match=message):
            mine(tmp_path / "labels.jsonl")


def test_a_class_folder_without_images_is_a_class_to_choose_from(classes):
    (classes / "bear").mkdir()
    assert [row["cls"] for row in mine(classes).read()] == [1, 1, 2, 3]
