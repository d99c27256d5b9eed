import pytest
from pair_files import COUNT
from tiny import picture


@pytest.fixture
def images(tmp_path):
    """`real/0.png`, ... and `generated/0.png`, ..., in a folder whose name is a pattern to glob."""
    folder = tmp_path / "run[v2]"
    for side in ("real", "generated"):
        (folder / side).mkdir(parents=True)
        for i in range(COUNT):
            picture(2 * i + (side == "generated")).save(folder / side / f"{i}.png")
    return folder
