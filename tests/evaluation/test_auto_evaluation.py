"""`gmail-hf evaluate --modality auto`: each image by the branch that the detector names."""

import numpy as np
import pytest
from tiny import make_pairs

from gmail_hf import fit_detector
from gmail_hf.evaluation.embedding import image_embeds
from gmail_hf.evaluation.load_model import LoadedModel
from gmail_hf.evaluation.measure import Settings


def test_images_pass_the_branch_that_the_detector_names(model, processor):
    pairs, loaded = make_pairs(24), LoadedModel(model, processor, "org/gmail", "0")
    with pytest.raises(ValueError, match=r"no branch 'auto'; it has \['real', 'gen'\]"):
        loaded.check_modality("auto")
    fit_detector(model, processor, pairs)
    loaded.check_modality("auto")
    images = pairs["generated_image"][:12]
    auto, real, gen = (
        image_embeds(model, processor, images, name, Settings(), "") for name in ("auto", "real", "gen")
    )
    values = processor(images=images, return_tensors="pt")["pixel_values"]
    chosen = np.array(model.detect_modality(values).modality) == "gen"
    assert 0 < chosen.sum() < 12
    np.testing.assert_allclose(auto, np.where(chosen[:, None], gen, real), atol=1e-6)
