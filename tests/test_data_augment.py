"""Blur, noise and borders of random changes."""

import pytest
import torch

from sansmax.data.augment import Augment
from sansmax.errors import InputError


def test_a_border_that_goes_on_brings_no_new_grey_value():
    image = torch.full((1, 20, 30), 0.625)
    change = Augment(rotate=90.0, translate=0.5, scale=(0.6, 1.4), fill="edge")
    for _ in range(20):
        assert torch.allclose(change(image), image, atol=1e-6)


def test_a_fixed_fill_does_bring_its_grey_value():
    image = torch.full((1, 20, 30), 0.625)
    outs = torch.stack([Augment(translate=0.5, fill=0.25)(image) for _ in range(20)])
    assert outs.min() == pytest.approx(0.25, abs=1e-6)
    assert outs.max() == pytest.approx(0.625, abs=1e-6)


def test_the_border_moves_with_the_picture():
    # a step from dark to bright stays a step, moved by whole pixels of the picture's own width
    image = torch.zeros(1, 8, 40)
    image[..., 20:] = 1.0
    places = set()
    for _ in range(60):
        out = Augment(translate=0.25, fill="edge")(image)
        assert (out == out[:, :1]).all()
        assert set(out.unique().tolist()) == {0.0, 1.0}
        places.add(int((out[0, 0] == 0).sum()))
    assert min(places) >= 10
    assert max(places) <= 30
    assert len(places) > 8


def test_blur_spreads_a_point_by_at_most_its_width_and_keeps_the_sum():
    image = torch.zeros(1, 21, 21)
    image[0, 10, 10] = 1.0
    spread = []
    y = torch.arange(21.0) - 10
    for _ in range(50):
        out = Augment(blur=1.5)(image)
        assert torch.isclose(out.sum(), torch.tensor(1.0), atol=1e-4)
        spread.append(float((out[0].sum(1) * y**2).sum().sqrt()))
    assert min(spread) < 0.4
    assert 1.2 < max(spread) < 1.6


def test_noise_has_a_standard_deviation_between_zero_and_the_largest():
    image = torch.full((1, 64, 64), 0.5)
    widths = torch.stack([(Augment(noise=0.05)(image) - 0.5).std() for _ in range(100)])
    assert widths.max() < 0.053
    assert widths.min() < 0.01
    assert torch.isclose(widths.mean(), torch.tensor(0.025), atol=0.006)


@pytest.mark.parametrize("wrong", [{"fill": "mirror"}, {"fill": 1.5}, {"blur": -1.0}, {"erase": 2.0}])
def test_a_wrong_setting_is_an_error_that_names_it(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Augment(**wrong)
