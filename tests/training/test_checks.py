"""What is refused before training starts, and that errors name it and the remedy."""

import datasets
import pytest
from tiny import make_pairs

from gmail_hf import GmailLossConfig
from gmail_hf.training.checks import check_pairs, needed_columns
from gmail_hf.training.data import undecoded


def without(column):
    return make_pairs(3).remove_columns([column])


@pytest.mark.parametrize("column", ["real_image", "generated_image", "caption", "image_id"])
@pytest.mark.parametrize("streamed", [False, True])
def test_missing_column_is_named(column, streamed):
    pairs = without(column).to_iterable_dataset() if streamed else without(column)
    with pytest.raises(ValueError, match=rf"lacks the column\(s\) \['{column}'\].*rename_column"):
        check_pairs(pairs)


def test_wrong_types_are_refused():
    pairs = make_pairs(3)
    paths = pairs.remove_columns(["real_image"]).add_column("real_image", ["a.png", "b.png", "c.png"])
    with pytest.raises(ValueError, match=r"real_image.*cast_column\('real_image', datasets.Image\(\)\)"):
        check_pairs(paths, "eval_dataset")
    numbers = pairs.remove_columns(["caption"]).add_column("caption", [1, 2, 3])
    with pytest.raises(ValueError, match="'caption' of train_dataset holds int"):
        check_pairs(numbers)


def nothing():
    yield from ()


@pytest.mark.parametrize(
    "dataset", [make_pairs(3).select([]), datasets.IterableDataset.from_generator(nothing)], ids=["table", "stream"]
)
def test_empty_data_set_is_refused(dataset):
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        check_pairs(dataset, "eval_dataset")


def test_a_stream_is_read_once():
    passes = []

    def rows():
        passes.append(1)
        yield from make_pairs(3)

    check_pairs(datasets.IterableDataset.from_generator(rows, features=make_pairs(1).features))
    assert len(passes) == 1  # a shuffled stream first fills its buffer


def test_sampled_images_must_decode():
    everything = make_pairs(3, bad_real=(0, 1, 2))
    with pytest.raises(ValueError, match="3 of 3 sampled pairs.*image_id id-0"):
        check_pairs(everything)
    one = make_pairs(5, bad_generated=(3,))
    check_pairs(one)
    with pytest.raises(ValueError, match="1 of 5 sampled pairs.*image_id id-3"):
        check_pairs(one, on_bad_image="error")
    check_pairs(make_pairs(40), on_bad_image="error")


@pytest.mark.parametrize("column", ["image_id", "caption"])
def test_an_empty_cell_among_the_sampled_is_refused(column):
    pairs = make_pairs(4)
    rows = [{**row, column: None if i == 1 else row[column]} for i, row in enumerate(undecoded(pairs))]
    with pytest.raises(ValueError, match=f"'{column}'.*(empty cells|NoneType)"):
        check_pairs(datasets.Dataset.from_list(rows, features=pairs.features))


@pytest.mark.parametrize("column", ["image_id", "caption"])
def test_a_cell_without_id_or_caption_is_found_wherever_it_is(column):
    pairs = make_pairs(40)
    values = [None if i == 2 else value for i, value in enumerate(pairs[column])]
    pairs = pairs.remove_columns(column).add_column(column, values)
    shuffled = pairs.select([*range(3, 30), 2, *range(30, 40)])  # rows of the data set, not of its table
    for dataset, row in ((pairs, 2), (shuffled, 27)):
        with pytest.raises(ValueError, match=f"Row {row} of train_dataset has no '{column}'.*dataset.filter"):
            check_pairs(dataset, sample=2)
    check_pairs(pairs.select(range(3, 40)), sample=2)


@pytest.mark.parametrize("column", ["image_id", "caption"])
def test_one_id_for_all_pairs_is_refused(column):
    pairs = make_pairs(4)
    same = [pairs[column][0]] * 4
    pairs = pairs.remove_columns(column).add_column(column, same)
    with pytest.raises(ValueError, match=f"All rows of train_dataset have {column}=.*the loss would be constant"):
        check_pairs(pairs)
    check_pairs(pairs.to_iterable_dataset())  # whose later rows nobody knows
    check_pairs(pairs, with_negatives=False)


@pytest.mark.parametrize(
    ("losses", "images"),
    [
        ({}, {"real_image", "generated_image"}),
        ({"align_weight": 0.0, "gen_text_weight": 1.0}, {"generated_image"}),
        ({"align_weight": 0.0, "real_text_weight": 1.0}, {"real_image"}),
    ],
    ids=["align", "gen_text", "real_text"],
)
def test_losses_need_the_images_they_look_at(losses, images):
    assert {*needed_columns(GmailLossConfig(**losses))} == {*images, "caption", "image_id"}
