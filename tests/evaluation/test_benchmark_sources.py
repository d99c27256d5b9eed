"""The registry, and data from local folders and from a Hub, in the layouts that they have there."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from benchmark_data import CLASS_NAMES, TEMPLATES, png_cell, webp, write_captions, write_classes, write_webdataset
from datasets import Dataset, DatasetDict, Image
from pyarrow import parquet
from server import HubServer, commit_id
from tiny import make_pairs, picture

from gmail_hf.commands.bundled import BENCHMARKS, get_benchmark
from gmail_hf.evaluation import LAYOUTS, sources
from gmail_hf.evaluation.sources import SHAREGPT4V_FILE, captions_of, tasks_of
from gmail_hf.training.data import decode_image

NAMES = (
    "coco flickr30k sharegpt4v urban1k dtd cars sun397 food101 aircraft pets caltech101 imagenet scienceqa mmmu pope "
    "digits"
)


def test_registry_is_complete():
    assert list(BENCHMARKS) == NAMES.split()
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.tasks and benchmark.layout in LAYOUTS
        assert benchmark.paper or name in ("digits", "pope", "urban1k")
    ids = [benchmark.dataset for benchmark in BENCHMARKS.values()]
    assert max(Counter(filter(None, ids)).values()) == 1
    table_4 = [name for name, benchmark in BENCHMARKS.items() if benchmark.paper == "Table 4"]
    assert len(table_4) == 8 and all(BENCHMARKS[name].tasks == ("zero_shot", "probe") for name in table_4)
    with pytest.raises(ValueError, match="Unknown benchmark 'mnist'; choose from " + ", ".join(NAMES.split())):
        get_benchmark("mnist")


def test_webdataset_of_classes(source, tmp_path):
    found = source("dtd", write_classes(tmp_path / "wds"))
    rows = list(found.read())
    assert (found.split, found.image_column, found.layout) == ("test", "webp", "classes")
    assert [row["cls"] for row in rows] == [0, 1, 2, 0, 1, 0]
    assert [decode_image(row["webp"]).tobytes() for row in rows] == [picture(i).tobytes() for i in range(6)]
    assert found.lines("classnames.txt") == list(CLASS_NAMES)
    assert found.lines("zeroshot_classification_templates.txt") == list(TEMPLATES)
    assert tasks_of(get_benchmark("dtd"), found) == ("zero_shot", "probe")
    assert [row["cls"] for row in source("dtd", tmp_path / "wds", limit=4).read()] == [0, 1, 2, 0]  # over two shards


def test_revision_of_a_folder_changes_with_it(source, tmp_path):
    write_classes(tmp_path / "wds")
    first = source("dtd", tmp_path / "wds").revision
    assert first == source("dtd", tmp_path / "wds").revision
    (tmp_path / "wds" / "classnames.txt").write_text("cat\ndog\nfish\n")
    assert first != source("dtd", tmp_path / "wds").revision


def test_captions_one_a_line(source, tmp_path):
    found = source("coco", write_captions(tmp_path / "wds", [["a cat", "a  cat again"], ["a dog", ""]]))
    assert [captions_of(row, found) for row in found.read()] == [
        ("s0000000", ["a cat", "a  cat again"]),
        ("s0000001", ["a dog"]),
    ]
    assert tasks_of(get_benchmark("coco"), found) == ("retrieval", "captioning")


@pytest.mark.parametrize("kind", ["parquet", "saved", "splits"])
def test_pairs_stand_in_for_captions(source, tmp_path, kind):
    pairs, place = make_pairs(6), tmp_path / "pairs.parquet"
    if kind == "parquet":
        pairs.to_parquet(place)
    elif kind == "saved":
        pairs.save_to_disk(place)
    else:
        DatasetDict(train=pairs.select([0]), test=pairs).save_to_disk(place)
    found = source("flickr30k", place)
    assert found.layout == "pairs" and found.has_pairs and found.image_column == "real_image"
    assert [captions_of(row, found) for row in found.read()] == [
        (row["image_id"], [row["caption"]]) for row in pairs.select_columns(["image_id", "caption"])
    ]
    assert tasks_of(get_benchmark("flickr30k"), found) == ("retrieval", "captioning", "alignment")


def test_unreachable_hub(source, monkeypatch):
    def dataset_info(*args):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(sources.HfApi, "dataset_info", dataset_info)
    with pytest.raises(ConnectionError, match=r"RuntimeError: no route to host.* --dataset dtd=FOLDER"):
        source("dtd")


def test_pairs_without_generated_images_are_captions(source, tmp_path):
    make_pairs(4).remove_columns("generated_image").to_parquet(tmp_path / "real.parquet")
    found = source("coco", tmp_path / "real.parquet")
    assert tasks_of(get_benchmark("digits"), source("digits", tmp_path / "real.parquet")) == (
        "retrieval",
        "captioning",
    )
    assert tasks_of(get_benchmark("coco"), found) == ("retrieval", "captioning")


def test_sharegpt4v_reads_the_first_thousand_rows_of_its_list(source, tmp_path):
    (tmp_path / "coco").mkdir()
    picture(0).save(tmp_path / "coco" / "0.png")
    written = 'A "long"\ncaption, [no. {}].' + "x" * 2000
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": written}]
    rows = [{"id": str(i), "image": f"coco/{i}.png", "conversations": turns} for i in range(1003)]
    (tmp_path / SHAREGPT4V_FILE).write_text(json.dumps(rows, indent=1))
    found = source("sharegpt4v", tmp_path)
    read = list(found.read())
    assert len(read) == 1000 and len(list(source("sharegpt4v", tmp_path, limit=7).read())) == 7
    image_id, captions = captions_of(read[0], found)
    assert captions == [written.replace("\n", " ")] and image_id.endswith("coco/0.png")
    assert decode_image(read[0]["image"]).tobytes() == picture(0).tobytes()
    (tmp_path / SHAREGPT4V_FILE).write_text(json.dumps(rows[:5])[:-100])  # half a download
    with pytest.raises(ValueError, match="is truncated"):
        list(source("sharegpt4v", tmp_path).read())


def test_urban1k_pairs_images_and_captions_by_name(source, tmp_path):
    for folder in ("image", "caption"):
        (tmp_path / folder).mkdir()
    for name in ("221", "9"):
        picture(int(name)).save(tmp_path / "image" / f"{name}.jpg")
        (tmp_path / "caption" / f"{name}.txt").write_text(f"A long caption, no. {name}.\nNot read by Long-CLIP.\n")
    found = source("urban1k", tmp_path)
    rows = list(found.read())
    assert [captions_of(row, found) for row in rows] == [
        ("221", ["A long caption, no. 221."]),
        ("9", ["A long caption, no. 9."]),
    ]
    assert [row["image"]["path"] for row in rows] == [str(tmp_path / "image" / f"{name}.jpg") for name in ("221", "9")]
    assert decode_image(rows[0]["image"]).size == (16, 16)
    assert tasks_of(get_benchmark("urban1k"), found) == ("retrieval",)
    assert len(list(source("urban1k", tmp_path, limit=1).read())) == 1
    with pytest.raises(ValueError, match=r"--dataset urban1k=FOLDER: .*Urban1k.zip"):
        source("urban1k")


def test_scienceqa_and_mmmu_columns(source, tmp_path):
    row = {"image": png_cell(picture(0)), "question": "?", "choices": ["a", "b"], "answer": 0, "hint": "h"}
    row |= {"subject": "social science", "grade": "grade3"}
    Dataset.from_list([row]).cast_column("image", Image()).to_parquet(tmp_path / "test.parquet")
    assert list(source("scienceqa", tmp_path / "test.parquet").read())[0]["choices"] == ["a", "b"]
    # One configuration a subject, told by the card as on the Hub.
    for subject, count in {"Art": 2, "Biology": 1}.items():
        (tmp_path / "mmmu" / subject).mkdir(parents=True)
        row = {"question": "<image 1>?", "options": "['a', 'b']", "answer": "A", "question_type": "multiple-choice"}
        row |= {"image_1": png_cell(picture(0))}
        rows = [{**row, "id": f"validation_{subject}_{i}"} for i in range(count)]
        Dataset.from_list(rows).cast_column("image_1", Image()).to_parquet(
            tmp_path / "mmmu" / subject / "validation-00000-of-00001.parquet"
        )
    configs = [
        f"- config_name: {subject}\n  data_files:\n  - split: validation\n    path: {subject}/validation-*\n"
        for subject in ("Art", "Biology")
    ]
    (tmp_path / "mmmu" / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    found = source("mmmu", tmp_path / "mmmu")
    ids = ["validation_Art_0", "validation_Art_1", "validation_Biology_0"]
    expected = list(zip(("Art", "Art", "Biology"), ids, strict=True))
    assert [(row["config_name"], row["id"]) for row in found.read()] == expected
    for limit, expected in ((1, ids[:1]), (2, ids[::2]), (9, [*ids[::2], ids[1]])):  # a subject in each turn
        assert [row["id"] for row in source("mmmu", tmp_path / "mmmu", limit=limit).read()] == expected


def test_pope_is_read_from_one_configuration(source, tmp_path):
    """As on the Hub: the split `test` of the second configuration has all rows; the first has them in three splits."""
    for folder, split, categories in (
        ("Full", "random", ["random"]),
        ("Full", "popular", ["popular"]),
        ("data", "test", ["random", "popular"]),
    ):
        rows = [
            {"image": png_cell(picture(0)), "question": "Is there a dog?", "answer": "no", "category": category}
            for category in categories
        ]
        (tmp_path / folder).mkdir(exist_ok=True)
        table = Dataset.from_list(rows).cast_column("image", Image())
        table.to_parquet(tmp_path / folder / f"{split}-00000-of-00001.parquet")
    full = "".join(f"  - split: {split}\n    path: Full/{split}-*\n" for split in ("random", "popular"))
    default = "- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n"
    card = f"---\nconfigs:\n- config_name: Full\n  data_files:\n{full}{default}---\n"
    (tmp_path / "README.md").write_text(card)
    found = source("pope", tmp_path)
    assert found.split == "test"
    assert [row["category"] for row in found.read()] == ["random", "popular"]
    one = source("pope", tmp_path / "data" / "test-00000-of-00001.parquet")
    assert [row["answer"] for row in one.read()] == ["no", "no"]


def test_bad_data_are_told_at_once(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="No data set at './nowhere'"):
        source("dtd", "./nowhere")
    with pytest.raises(ConnectionError, match="--dataset dtd=FOLDER"):  # pytest runs offline
        source("dtd")
    with pytest.raises(ValueError, match="--dataset sharegpt4v=FOLDER"):
        source("sharegpt4v")
    captions = write_captions(tmp_path / "captions", [["a"], ["b"]])
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['cls'\]; it has .*'txt'.* dtd needs a webdataset"):
        source("dtd", captions)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['txt'\]"):
        source("coco", write_classes(tmp_path / "classes"))
    write_webdataset(tmp_path / "imageless", [{"cls": b"0", "json": b"{}"}], shards=1)
    with pytest.raises(ValueError, match="webp or jpg"):
        source("dtd", tmp_path / "imageless")
    (tmp_path / "classes" / "classnames.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="classnames.txt of .* is empty"):
        source("dtd", tmp_path / "classes")
    (tmp_path / "classes" / "classnames.txt").unlink()
    with pytest.raises(ValueError, match="has no file classnames.txt"):
        source("dtd", tmp_path / "classes")
    DatasetDict(train=make_pairs(2), dev=make_pairs(2)).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'dev'\]"):
        source("coco", tmp_path / "splits")
    with parquet.ParquetWriter(tmp_path / "empty.parquet", make_pairs(2).data.table.schema):
        pass  # the lowest datasets cannot write a set without rows
    with pytest.raises(ValueError, match="is empty"):
        source("coco", tmp_path / "empty.parquet")
    found = source("coco", write_webdataset(tmp_path / "mute", [{"webp": webp(0), "txt": b"\n"}], shards=1))
    with pytest.raises(ValueError, match="Image s0000000 of .* has no caption"):
        captions_of(next(found.read()), found)


CLIENT = """
import json, sys
from huggingface_hub import HfApi
from gmail_hf.evaluation import get_benchmark, load_model, open_source, open_training
from gmail_hf.training.data import decode_image

for name in ("wds", "gone"):
    HfApi().create_repo(f"org/{name}", repo_type="dataset")
HfApi().upload_folder(repo_id="org/wds", repo_type="dataset", folder_path=sys.argv[1])
HfApi().upload_folder(repo_id="org/gone", repo_type="dataset", folder_path=sys.argv[1], ignore_patterns="*.txt")
HfApi().create_repo("org/gmail")
HfApi().upload_folder(repo_id="org/gmail", folder_path=sys.argv[2])
model = load_model("org/gmail")
found = open_source(get_benchmark("dtd"), "org/wds")
rows = list(found.read())
probed = open_training(get_benchmark("dtd"), found)
errors = []
for name in ("org/gone", "org/never"):
    try:
        open_source(get_benchmark("dtd"), name)
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
print(json.dumps({
    "train": [[row["cls"] for row in probed.train.read()], probed.train.revision, probed.validation],
    "model": [model.name, model.revision], "revision": found.revision,
    "split": found.split, "labels": [row["cls"] for row in rows], "errors": errors,
    "pixels": decode_image(rows[5]["webp"]).tobytes().hex(),
    "names": found.lines("classnames.txt"), "templates": found.lines("zeroshot_classification_templates.txt"),
}))
"""


@pytest.mark.integration
def test_classes_and_model_from_the_hub(tmp_path, model_folders):
    folder = write_classes(tmp_path / "wds")
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(folder), model_folders["gmail"]],
            env={**os.environ, **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["model"] == ["org/gmail", commit_id(1)]
    assert (answer["revision"], answer["split"]) == (commit_id(1), "test")
    assert answer["train"] == [[0], commit_id(1), None]
    assert answer["labels"] == [0, 1, 2, 0, 1, 0]
    assert answer["pixels"] == picture(5).tobytes().hex()
    assert (answer["names"], answer["templates"]) == (list(CLASS_NAMES), list(TEMPLATES))
    assert "ValueError: 'org/gone' has no file classnames.txt" in answer["errors"][0]
    assert "ConnectionError: 'org/never' cannot be reached" in answer["errors"][1]
