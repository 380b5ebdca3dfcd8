"""Numbers of the paper, of SAM and of the data sets, written down a second time."""

import numpy as np
import pytest

from geodata.layouts import LAYOUTS
from geodata.scaling import measure_image
from reports.paper import PAPER_SCORES


def inputs(images, dtype, value):
    """What a network sees of an image of one value."""
    image = np.full((2, 2, 3), value, dtype)
    return measure_image(images, image).image_input(image)[:, 0, 0]


def test_sam_s_mean_and_deviation_are_those_of_its_preprocessing():
    expected = (100 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    assert inputs("sam", np.uint8, 100) == pytest.approx(expected, rel=1e-5)


def test_a_reflectance_of_four_tenths_is_1():
    assert inputs("reflectance", np.float32, 0.1) == pytest.approx([0.25] * 3, rel=1e-5)


def test_the_colours_of_mmhunan_are_the_data_set_s():
    assert [color for _, color in LAYOUTS["hunan"].classes] == [
        (196, 90, 17), (51, 129, 88), (177, 205, 61), (228, 84, 96), (91, 154, 214),
        (225, 174, 110), (239, 159, 2),
    ]  # fmt: skip


MIOU = {
    "vaihingen": dict(lora=(82.09, 83.96, 84.66), adapter=(83.24, 84.72, 85.03)),
    "potsdam": dict(lora=(84.61, 85.71, 86.34), adapter=(85.14, 86.37, 86.69)),
    "hunan": dict(lora=(46.54, None, 47.63), adapter=(49.20, 51.82, 51.08)),
}


@pytest.mark.parametrize("data", MIOU)
@pytest.mark.parametrize("tuner", ["lora", "adapter"])
def test_the_scores_are_the_papers(data, tuner):
    for encoder, miou in zip(("vit_b", "vit_l", "vit_h"), MIOU[data][tuner]):
        found = PAPER_SCORES.get((data, tuner, encoder))
        assert (found and found[2]) == miou
