import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from abdlab.attacks.image_wise import image_patch, wanet, warping_field
from abdlab.attacks.triggers import (
    CORNERS,
    OPTIMISED,
    TRIGGERS,
    Trigger,
    badnet_grid,
    badnet_sq,
    blend,
    cl,
    l0_inv,
    l2_inv,
    pack,
    sig,
    smooth,
    trigger_from,
    trojan_3x3,
    trojan_wm,
    unpack,
)

NAMES = sorted(TRIGGERS)
DRAWN = sorted(set(NAMES) - OPTIMISED)
PATCHES = ("badnet_grid", "badnet_sq")

sides = st.integers(8, 40)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), sides, sides)


def pictures(shape, seed=0):
    """Random images, with a pure black and a pure white row, where ranges are easily
    left.
    """
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    images[..., 0, :], images[..., -1, :] = 0, 1
    return images


def ready(name, shape, seed=1):
    """The named trigger for images of this shape; an optimised one gets a random
    pattern.
    """
    channels, height, width = shape[1:]
    rng = torch.Generator().manual_seed(seed)
    sides = {"trojan_3x3": (3, 3), "trojan_8x8": (8, 8), "smooth": (3, 3)}.get(
        name, (height, width)
    )
    low = {"l0_inv": -1, "l2_inv": -40, "smooth": -40, "weak": -40}.get(name, 0)
    channels += name == "adba"  # its mask
    levels = torch.randint(low, 41, (channels, *sides), generator=rng)
    if name == "l0_inv":  # most pixels stay as they are
        levels[:, torch.rand(height, width, generator=rng) < 0.8] = -1
        levels[:, 0, 0] = 7
    return Trigger(name, {"pattern": pack(levels)} if name in OPTIMISED else {})


def grey(height=8, width=8, channels=1, value=0.5):
    return torch.full((1, channels, height, width), value)


class TestEveryTrigger:
    @given(name=st.sampled_from(NAMES), shape=shapes, seed=st.integers(0, 99))
    @settings(max_examples=100, deadline=None)
    def test_keeps_shape_type_range_and_input(self, name, shape, seed):
        images = pictures(shape, seed)
        before = images.clone()
        trigger = ready(name, shape)
        out = trigger(images)
        assert out.shape == images.shape
        assert out.dtype == images.dtype
        assert out.min() >= 0
        assert out.max() <= 1
        assert torch.equal(images, before)
        assert not torch.equal(out, images)
        assert torch.equal(out, trigger(images))

    @given(name=st.sampled_from(NAMES), shape=shapes)
    @settings(max_examples=50, deadline=None)
    def test_treats_every_image_alike_whatever_the_batch(self, name, shape):
        images, trigger = pictures(shape), ready(name, shape)
        one_by_one = torch.cat([trigger(image[None]) for image in images])
        assert torch.equal(trigger(images), one_by_one)

    @given(
        name=st.sampled_from(PATCHES),
        shape=shapes,
        corner=st.sampled_from(CORNERS),
        margin=st.integers(0, 3),
    )
    @settings(max_examples=100, deadline=None)
    def test_a_patch_twice_is_the_patch_and_touches_nothing_else(self, name, shape, corner, margin):
        trigger = Trigger(name, {"size": 4, "corner": corner, "margin": margin})
        images = pictures(shape)
        out = trigger(images)
        assert torch.equal(trigger(out), out)
        rows = (
            slice(margin, margin + 4)
            if "top" in corner
            else slice(shape[2] - margin - 4, shape[2] - margin)
        )
        cols = (
            slice(margin, margin + 4)
            if "left" in corner
            else slice(shape[3] - margin - 4, shape[3] - margin)
        )
        inside = torch.zeros(shape[2:], dtype=torch.bool)
        inside[rows, cols] = True
        assert torch.equal(out[..., ~inside], images[..., ~inside])
        # the same patch in every image and channel
        assert (out[..., inside] == out[:1, :1, inside]).all()


class TestPatches:
    def test_square_by_hand(self):
        expected = grey(5, 6)
        expected[..., 3:, 4:] = 0.75
        assert torch.equal(badnet_sq(grey(5, 6), size=2, value=0.75), expected)

    def test_margin_and_corner_by_hand(self):
        expected = grey(5, 6)
        expected[..., 1:3, 1:3] = 1
        assert torch.equal(badnet_sq(grey(5, 6), size=2, corner="top_left", margin=1), expected)

    def test_grid_by_hand(self):
        patch = badnet_grid(grey(), size=3)[0, 0, -3:, -3:]
        assert patch.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]

    @pytest.mark.parametrize(("side", "expected"), [(8, 2), (16, 2), (32, 3), (64, 6)])
    def test_default_size_of_the_square(self, side, expected):
        changed = badnet_sq(grey(side, side)) != grey(side, side)
        assert changed.sum() == expected**2

    def test_a_patch_larger_than_the_image_is_cut(self):
        assert torch.equal(badnet_sq(grey(4, 6), size=10), torch.ones(1, 1, 4, 6))

    @pytest.mark.parametrize("name", PATCHES)
    @pytest.mark.parametrize("size", [0, -1])
    def test_a_patch_has_a_positive_size(self, name, size):
        with pytest.raises(ValueError, match="size"):
            Trigger(name, {"size": size})(grey())


class TestBlend:
    def test_by_hand(self):
        noise = torch.rand((3, 8, 8), generator=torch.Generator().manual_seed(7))
        images = pictures((2, 3, 8, 8))
        assert torch.allclose(
            blend(images, alpha=0.25, pattern_seed=7), 0.75 * images + 0.25 * noise
        )

    def test_the_ends_of_alpha(self):
        images = pictures((2, 3, 8, 8))
        assert torch.equal(blend(images, alpha=0), images)
        assert torch.equal(blend(images, alpha=1)[0], blend(images, alpha=1)[1])

    def test_the_pattern_follows_its_seed(self):
        assert not torch.equal(blend(grey(), pattern_seed=0), blend(grey(), pattern_seed=1))


class TestSig:
    def test_amplitude_by_hand(self):
        # one period over 8 columns: 0, 1, 0 and -1 strengths at columns 0, 2, 4 and 6
        row = sig(grey(), strength=0.25, frequency=1)[0, 0, 0]
        r = 0.25 / math.sqrt(2)
        expected = [0.5, 0.5 + r, 0.75, 0.5 + r, 0.5, 0.5 - r, 0.25, 0.5 - r]
        assert row.tolist() == pytest.approx(expected, abs=1e-6)

    def test_every_row_is_the_same_and_the_default_is_20_of_255(self):
        change = sig(grey(5, 24)) - grey(5, 24)
        assert torch.equal(change[0, 0, 0].expand(5, -1), change[0, 0])
        assert change.max().item() == pytest.approx(20 / 255, abs=1e-6)
        # six periods: six maxima
        row = change[0, 0, 0]
        assert (row > 0.9 * 20 / 255).sum() == 6

    def test_is_cut_at_black_and_white(self):
        assert sig(grey(value=1.0), strength=0.5, frequency=1).max() == 1
        assert sig(grey(value=0.0), strength=0.5, frequency=1).min() == 0


class TestWatermark:
    @given(shape=shapes, alpha=st.floats(0.05, 1))
    @settings(max_examples=50, deadline=None)
    def test_marks_get_brighter_the_rest_stays(self, shape, alpha):
        images = 0.9 * pictures(shape)
        out = trojan_wm(images, alpha=alpha)
        marked = (trojan_wm(torch.zeros(1, 1, *shape[2:]), alpha=1.0) > 0)[0, 0]
        assert torch.equal(out[..., ~marked], images[..., ~marked])
        assert (out[..., marked] > images[..., marked]).all()
        assert torch.allclose(
            out[..., marked], (1 - alpha) * images[..., marked] + alpha, atol=1e-6
        )
        assert 0.05 < marked.float().mean() < 0.75

    def test_white_stays_white(self):
        assert torch.equal(trojan_wm(torch.ones(1, 3, 16, 16)), torch.ones(1, 3, 16, 16))


class TestTrojanPatch:
    def test_by_hand(self):
        levels = torch.tensor([[[0, 51, 102], [153, 204, 255], [0, 255, 0]]])
        expected = grey()
        expected[0, 0, 4:7, 1:4] = torch.tensor([[0, 0.2, 0.4], [0.6, 0.8, 1], [0, 1, 0]])
        found = trojan_3x3(grey(), pattern=pack(levels), corner="bottom_left", margin=1)
        assert torch.allclose(found, expected)

    def test_each_channel_has_its_own_levels(self):
        levels = torch.tensor([255, 0, 51])[:, None, None].expand(3, 3, 3)
        assert trojan_3x3(grey(channels=3), pattern=pack(levels))[
            0, :, -1, -1
        ].tolist() == pytest.approx([1, 0, 0.2])


class TestCL:
    def test_a_grid_in_each_corner_by_hand(self):
        grid = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
        expected = grey(9, 8)
        for rows, cols in ((slice(0, 3), slice(0, 3)), (slice(0, 3), slice(5, 8))):
            expected[..., rows, cols] = grid
            expected[..., slice(6, 9), cols] = grid
        assert torch.equal(cl(grey(9, 8), size=3), expected)

    def test_the_margin(self):
        assert cl(grey(), size=1, margin=1).argwhere()[:, 2:].shape[0] == 64
        assert (cl(grey(), size=1, margin=1) == 1).nonzero()[:, 2:].tolist() == [
            [1, 1],
            [1, 6],
            [6, 1],
            [6, 6],
        ]


class TestAdditive:
    def test_l2_inv_by_hand_and_cut_at_black_and_white(self):
        images = torch.tensor([[[[0.5, 0.0], [1.0, 0.25]]]])
        found = l2_inv(images, pattern=pack(torch.tensor([[[51, -51], [51, -51]]])))
        assert found.flatten().tolist() == pytest.approx([0.7, 0, 1, 0.05])

    def test_l0_inv_by_hand(self):
        levels = torch.full((2, 2, 3), -1)
        levels[:, 1, 2] = torch.tensor([0, 51])
        images = pictures((3, 2, 2, 3))
        found = l0_inv(images, pattern=pack(levels))
        assert torch.allclose(found[:, :, 1, 2], torch.tensor([0, 0.2]).expand(3, 2))
        assert torch.equal(found[:, :, 0], images[:, :, 0])
        assert torch.equal(found[:, :, 1, :2], images[:, :, 1, :2])

    def test_smooth_by_the_naive_formula(self):
        levels = torch.tensor([[[3, -20], [10, 5]]])
        found = smooth(grey(6, 9), pattern=pack(levels)) - 0.5
        for y in range(6):
            for x in range(9):
                expected = sum(
                    levels[0, u, v].item()
                    / 255
                    * math.cos(math.pi * (y + 0.5) * u / 6)
                    * math.cos(math.pi * (x + 0.5) * v / 9)
                    for u in range(2)
                    for v in range(2)
                )
                assert found[0, 0, y, x].item() == pytest.approx(expected, abs=1e-6)

    @given(side=st.integers(8, 40), cut=st.integers(1, 6))
    @settings(max_examples=30, deadline=None)
    def test_smooth_has_no_energy_above_its_cut(self, side, cut):
        levels = torch.randint(-9, 10, (1, cut, cut), generator=torch.Generator().manual_seed(side))
        change = (smooth(grey(side, side + 3).double(), pattern=pack(levels)) - 0.5)[0, 0].numpy()
        spectrum = np.abs(dctn(change, norm="ortho"))
        spectrum[:cut, :cut] = 0
        assert spectrum.max() < 1e-9


class TestPatterns:
    @given(
        shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
        low=st.integers(-32767, 0),
        high=st.integers(0, 32767),
    )
    @settings(max_examples=50, deadline=None)
    def test_pack_and_unpack_are_inverse(self, shape, low, high):
        levels = torch.randint(low, high + 1, shape)
        packed = json.loads(json.dumps(pack(levels)))
        assert torch.equal(unpack(packed).long(), levels)
        assert packed.startswith("x".join(map(str, shape)) + ":")

    def test_what_does_not_fit_is_an_error(self):
        for value in (32768.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="whole numbers"):
                pack(torch.tensor([value]))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "rubbish",
            "1x2x2:",
            "1x2x2:!!!!",
            "1x2x2:aGVsbG8=",
            pack(torch.ones(1, 2, 2)).replace("1x2x2", "1x2x3"),
            "0:eJwDAAAAAAE=",
        ],
    )
    def test_what_is_no_pattern_is_an_error(self, text):
        with pytest.raises(ValueError, match="no pattern as abdlab"):
            unpack(text)

    def test_a_strangers_pattern_cannot_fill_the_memory(self):
        bomb = pack(torch.zeros(1000, 1000)).replace("1000x1000", "2x2")
        with pytest.raises(ValueError, match="no pattern"):
            unpack(bomb)
        with pytest.raises(ValueError, match="no pattern"):
            unpack(bomb.replace("2x2", "99999x99999x99999"))

    @pytest.mark.parametrize("name", sorted(OPTIMISED))
    def test_without_one_the_error_says_how_to_make_it(self, name):
        assert Trigger(name).needs_pattern
        assert (Trigger("blend") + Trigger(name)).needs_pattern
        with pytest.raises(
            ValueError,
            match=rf"{name} is optimised against a clean model.*abdlab.optimize\('{name}'.*prepare",
        ):
            Trigger(name)(grey())
        assert not ready(name, (1, 1, 8, 8)).needs_pattern

    def test_drawn_triggers_need_none(self):
        assert not any(Trigger(name).needs_pattern for name in DRAWN)
        assert [name for name in NAMES if Trigger(name).adversarial] == ["cl"]

    @pytest.mark.parametrize("name", sorted(OPTIMISED))
    def test_one_for_other_images_is_an_error(self, name):
        trigger = ready(name, (1, 3, 16, 16))
        with pytest.raises(
            ValueError,
            match=r"optimised for other images: its pattern is 3x.* and the images are 1x16x16",
        ):
            trigger(grey(16, 16))
        if name in ("l2_inv", "l0_inv"):
            with pytest.raises(ValueError, match="is 3x16x16, and the images are 3x16x17"):
                trigger(grey(16, 17, channels=3))
        with pytest.raises(ValueError, match="optimised for other images"):
            Trigger(name, {"pattern": pack(torch.ones(4))})(grey())

    def test_a_smooth_one_fits_other_sizes_but_no_smaller_ones_than_its_cosines(self):
        trigger = ready("smooth", (1, 1, 16, 16))
        assert trigger(grey(20, 12)).shape == (1, 1, 20, 12)
        with pytest.raises(ValueError, match="1x3x3, and the images are 1x2x9"):
            trigger(grey(2, 9))

    def test_the_pattern_travels_in_the_card_and_its_name_stays_short(self):
        trigger = ready("l2_inv", (1, 1, 16, 16)) + ready("trojan_3x3", (1, 1, 16, 16))
        again = trigger_from(json.loads(json.dumps(trigger.card())))
        assert again == trigger
        assert torch.equal(again(grey(16, 16)), trigger(grey(16, 16)))
        assert str(trigger) == "l2_inv+trojan_3x3"


class TestNames:
    @given(first=st.sampled_from(NAMES), second=st.sampled_from(NAMES))
    @settings(max_examples=25, deadline=None)
    def test_a_plus_b_is_b_of_a(self, first, second):
        images = pictures((2, 3, 9, 12))
        a, b = (ready(name, images.shape) for name in (first, second))
        assert torch.equal((a + b)(images), b(a(images)))
        assert str(a + b) == str(trigger_from(f"{first}+{second}")) == f"{first}+{second}"
        if {first, second} <= set(DRAWN):
            assert torch.equal(trigger_from(f"{first}+{second}")(images), b(a(images)))

    def test_grouping_does_not_matter(self):
        images, (a, b, c) = pictures((1, 1, 9, 9)), map(Trigger, ("blend", "sig", "badnet_sq"))
        assert torch.equal(((a + b) + c)(images), (a + (b + c))(images))
        assert torch.equal((a + b + c)(images), c(b(a(images))))

    def test_a_card_goes_through_json(self):
        trigger = (
            Trigger("badnet_sq", {"size": 3, "corner": "top_left"})
            + Trigger("blend", {"alpha": 0.3})
            + Trigger("sig")
        )
        again = trigger_from(json.loads(json.dumps(trigger.card())))
        assert again == trigger
        images = pictures((2, 1, 12, 12))
        assert torch.equal(again(images), trigger(images))

    def test_trigger_from_passes_triggers_and_takes_parameters(self):
        trigger = Trigger("blend")
        assert trigger_from(trigger) is trigger
        assert trigger_from("badnet_sq", {"size": 5}) == Trigger("badnet_sq", {"size": 5})
        with pytest.raises(ValueError, match="parameters need a single trigger"):
            trigger_from("badnet_sq+blend", {"size": 5})

    def test_only_sig_and_cl_are_clean_label(self):
        assert [name for name in NAMES if Trigger(name).clean_label] == ["cl", "sig"]
        assert (Trigger("sig") + Trigger("sig")).clean_label
        assert not (Trigger("sig") + Trigger("blend")).clean_label

    def test_hints_for_wrong_names(self):
        with pytest.raises(
            ValueError, match="unknown trigger 'badnet_sqr': did you mean 'badnet_sq'"
        ):
            Trigger("badnet_sqr")
        with pytest.raises(
            ValueError, match="unknown parameter of blend 'alfa': did you mean 'alpha'"
        ):
            Trigger("blend", {"alfa": 0.1})
        with pytest.raises(
            ValueError, match="unknown corner 'bottom_rigth': did you mean 'bottom_right'"
        ):
            Trigger("badnet_sq", {"corner": "bottom_rigth"})(grey())
        with pytest.raises(
            ValueError, match="unknown key of a trigger's card 'parms': did you mean 'params'"
        ):
            trigger_from({"name": "blend", "parms": {}})

    def test_a_card_without_a_name_is_an_error(self):
        with pytest.raises(ValueError, match="name"):
            trigger_from({"params": {}})

    @pytest.mark.parametrize(
        ("name", "parameter", "value"),
        [
            ("badnet_sq", "value", 1.5),
            ("badnet_sq", "value", -0.1),
            ("badnet_sq", "margin", -1),
            ("badnet_sq", "margin", 8),
            ("badnet_grid", "margin", -1),
            ("blend", "alpha", 1.01),
            ("sig", "strength", -0.1),
            ("sig", "strength", float("nan")),
            ("trojan_wm", "alpha", 2),
        ],
    )
    def test_values_out_of_range(self, name, parameter, value):
        with pytest.raises(ValueError, match=parameter):
            Trigger(name, {parameter: value})(grey())


def bent(image, field):
    """Bilinear sampling of one channel, pixel by pixel; places beyond the border are the border."""
    height, width = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            at = (min(max(x + field[y, x, 0].item(), 0), width - 1),
                  min(max(y + field[y, x, 1].item(), 0), height - 1))  # fmt: skip
            left, top = min(int(at[0]), width - 2), min(int(at[1]), height - 2)
            a, b = at[0] - left, at[1] - top
            out[y, x] = (1 - b) * ((1 - a) * image[top, left] + a * image[top, left + 1]) + b * (
                (1 - a) * image[top + 1, left] + a * image[top + 1, left + 1]
            )
    return out


class TestWarping:
    def test_against_pixel_by_pixel_sampling(self):
        images = pictures((2, 2, 7, 9))
        field = warping_field(7, 9, pixels=1.5, grid=3, pattern_seed=5)
        expected = torch.stack(
            [torch.stack([bent(channel, field) for channel in image]) for image in images]
        )
        got = wanet(images, pixels=1.5, grid=3, pattern_seed=5)
        assert torch.allclose(got, expected, atol=1e-5)

    def test_the_control_points_move_by_their_mean_and_lie_on_the_corners(self):
        drawn = 2 * torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
        at = warping_field(10, 10, pixels=2.0)[::3, ::3]  # 4 points over 10 pixels
        assert torch.allclose(at, (2 * drawn / drawn.abs().mean())[0].permute(1, 2, 0), atol=1e-5)

    @pytest.mark.parametrize(("wrong", "named"), [({"pixels": 0}, "pixels"), ({"grid": 1}, "grid")])
    def test_bad_values(self, wrong, named):
        with pytest.raises(ValueError, match=named):
            Trigger("wanet", wrong)(grey())


class TestImagePatch:
    def test_by_hand(self):
        rng = torch.Generator().manual_seed(3)
        order = torch.rand(4, 64, generator=rng).argsort(1).tolist()
        image = pictures((1, 1, 8, 8))
        levels = [round(255 * v) for v in image.flatten().tolist()]
        sums = [sum(v if i < 32 else -v for i, v in zip(row, levels, strict=True)) for row in order]
        expected = image.clone()
        expected[0, 0, :2, 6:] = torch.tensor(sums).view(2, 2) > 0
        assert torch.equal(image_patch(image, size=2, corner="top_right", pattern_seed=3), expected)

    def test_every_image_has_its_own_and_all_channels_share_it(self):
        patches = image_patch(pictures((20, 3, 8, 8)))[..., -4:, -4:]
        assert (patches == patches[:, :1]).all()
        assert len({tuple(p.flatten().tolist()) for p in patches}) == 20

    def test_bad_size(self):
        with pytest.raises(ValueError, match="size"):
            Trigger("image_patch", {"size": 0})(grey())
