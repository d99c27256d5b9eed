"""What a card says about the detector of `modality="auto"`, from the detector's file."""

import os
import re
from pathlib import Path

from ..branches.detector import DETECTOR_FILE, detector_settings
from ..files import write_file
from .marker import signed

START, END = "<!-- detector -->", "<!-- end of detector -->"
SECTION = re.compile(f"{START}.*?{END}\n\n", re.DOTALL)
SCORES = {
    "accuracy": "accuracy",
    "real_accuracy": "accuracy on real images",
    "generated_accuracy": "accuracy on generated images",
    "expected_calibration_error": "expected calibration error",
    "brier_score": "Brier score",
}


def detector_section(folder: str | os.PathLike) -> str:
    """The section of a model's card about the detector in its folder; empty if there is none."""
    file = Path(folder, DETECTOR_FILE)
    if not file.exists():
        return ""
    settings = detector_settings(file)
    scores, branch = settings["scores"], settings["modality"]
    images = f"{scores.get('images', 0):,.0f} images"
    rows = "\n".join(f"| {title} | {scores[name]:.3f} |" for name, title in SCORES.items() if name in scores)
    return f"""{START}
## Images of unknown origin

`model.get_image_features(pixel_values, modality="auto")` sends images through `{branch}` that a detector takes for
generated: a logistic regression on the embedding by `real`. On {images} of pairs that it was not fitted on,
half of them generated:

| score | value |
|---|---:|
{rows}

**It is no forensic detector.** It knows the generator and the photographs of its training pairs, and the ways in which
their files were made. Another generator, an edit or a compression can mislead it, at any probability. Do not use it to
decide whether an image is genuine.
{END}

"""


def update_detector(card: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Make a card that was written here show the detector in `folder`; the rest of it stays."""
    path = Path(card)
    content, section = path.read_bytes().decode(errors="surrogateescape"), detector_section(folder)
    changed = SECTION.sub("", content)
    if section:
        changed = changed.replace("## Results\n", f"{section}## Results\n", 1)
    if changed != content:
        write_file(path, signed(changed).encode(errors="surrogateescape"))
