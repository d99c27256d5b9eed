"""Small pairs and the files that tests of layouts write of them."""

import json

import numpy as np
from tiny import picture

COUNT = 4
CAPTIONS = ["a cat", "a dog", "two birds", "a red car"]
SIDES = {"real_image": "real", "generated_image": "generated"}
IDS = ["007", "7", "9007199254740993", "9007199254740992"]


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
