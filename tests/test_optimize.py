"""Optimised triggers: their bounds hold, they do better than chance, and the same seed
gives the same trigger.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from torch import nn

from abdlab.attacks.joint import fresh, masked
from abdlab.attacks.optimize import METHODS, PGD, activation, optimize, options_of, strongest
from abdlab.attacks.triggers import OPTIMISED, Trigger, pack, unpack

SHAPE = (3, 12, 10)
NAMES = sorted(METHODS)


class Net(nn.Module):
    """A tiny network with a rectified feature layer; the third feature is dead."""

    def __init__(self, channels=3, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=rng) * 0.5)
            self.fc.weight.copy_(torch.randn(self.fc.weight.shape, generator=rng))
            self.norm.bias[2] = -1e6
            self.fc.weight[:, 2] = 100

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    return Net()


def pictures(n=40, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(3)), torch.arange(n) % 4


def make(name, net, steps=20, seed=0, shape=SHAPE, **options):
    images, labels = pictures(shape=shape)
    if "adba" in str(name):
        options = {"size": 0.1, **options}  # the default is for networks with more to lose
    return optimize(
        name, net, images, labels, target=1, seed=seed, device="cpu", steps=steps, **options
    )


def levels(trigger):
    return unpack(trigger.params["pattern"]).float()


def test_every_optimised_trigger_has_a_method():
    assert set(METHODS) == OPTIMISED


@pytest.mark.parametrize("name", NAMES)
class TestEveryMethod:
    def test_gives_a_trigger_that_works_on_these_images(self, name, net):
        images, _ = pictures()
        out = make(name, net)(images)
        assert out.shape == images.shape
        assert not torch.equal(out, images)

    def test_the_seed_decides(self, name, net):
        assert make(name, net) == make(name, net)
        # many values are at a bound in the end, from wherever they began
        assert make(name, net, seed=1, steps=2) != make(name, net, steps=2)

    def test_leaves_the_model_as_it_was(self, name, net):
        net.train()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        make(name, net)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert net.training
        assert all(p.requires_grad for p in net.parameters())
        assert all(p.grad is None for p in net.parameters())
        assert not net.fc._forward_pre_hooks

    def test_unknown_options_get_a_hint(self, name, net):
        with pytest.raises(
            ValueError, match=f"unknown option of {name} 'stps': did you mean 'steps'"
        ):
            make(name, net, stps=3)

    @given(channels=st.integers(1, 4), height=st.integers(8, 20), width=st.integers(8, 20))
    @settings(max_examples=6, deadline=None)
    def test_for_any_size(self, name, channels, height, width):
        shape = (channels, height, width)
        images, _ = pictures(4, shape)
        out = make(name, Net(channels), steps=2, shape=shape)(images)
        assert out.shape == images.shape
        assert out.min() >= 0
        assert out.max() <= 1


class TestNeurons:
    def test_the_strongest_by_hand_without_the_dead_one(self, net):
        strength = net.fc.weight.abs().sum(0)
        strength[2] = -1
        expected = sorted(range(6), key=lambda i: -strength[i])[:3]
        assert strongest(net.eval(), pictures()[0], 3).tolist() == expected

    def test_activation_by_hand(self, net):
        images, _ = pictures()
        feature = torch.relu(net.eval().norm(net.conv(images))).mean((2, 3))
        assert torch.allclose(
            activation(net, images, torch.tensor([4, 0])), feature[:, [4, 0]].mean()
        )

    def test_a_model_without_a_linear_layer(self):
        with pytest.raises(ValueError, match=r"has no nn\.Linear"):
            make("l2_inv", nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))

    @pytest.mark.parametrize("name", ["trojan_3x3", "trojan_8x8", "l2_inv", "l0_inv"])
    def test_the_trigger_excites_them_more_than_a_random_one_of_its_kind(self, name, net):
        images, _ = pictures()
        chosen, made = strongest(net.eval(), images, 2), make(name, net, steps=80)
        found, rng = levels(made), torch.Generator().manual_seed(0)
        if name == "l2_inv":
            other = torch.randn(SHAPE, generator=rng)
            other = (other * found.norm() / other.norm()).trunc()
        else:
            other = torch.where(
                found < 0, found, torch.randint(0, 256, found.shape, generator=rng).float()
            )
        other = Trigger(name, {"pattern": pack(other)})
        values = [activation(net, x, chosen).item() for x in (made(images), other(images), images)]
        assert values[0] > max(values[1:]) + 0.01 * abs(values[2])


class TestBounds:
    @given(bound=st.floats(0.01, 0.3))
    @settings(max_examples=8, deadline=None)
    def test_l2(self, bound):
        found = levels(make("l2_inv", Net(), steps=5, bound=bound)) / 255
        assert found.norm() <= bound * math.sqrt(math.prod(SHAPE)) + 1e-6
        assert found.abs().max() <= 1

    def test_l2_uses_its_bound(self, net):
        assert (levels(make("l2_inv", net, steps=60)) / 255).norm() > 0.8 * 0.03 * math.sqrt(
            math.prod(SHAPE)
        )

    @given(share=st.floats(0.005, 0.5))
    @settings(max_examples=8, deadline=None)
    def test_l0(self, share):
        found = levels(make("l0_inv", Net(), steps=5, share=share))
        replaced = (found >= 0).all(0)
        assert torch.equal(replaced, (found >= 0).any(0))
        assert replaced.sum() == max(1, int(share * 120))
        assert found.max() <= 255

    @given(bound=st.floats(0.02, 0.4), cut=st.integers(1, 5))
    @settings(max_examples=8, deadline=None)
    def test_smooth(self, bound, cut):
        made = make("smooth", Net(), steps=5, bound=bound, cut=cut)
        change = (made(torch.full((1, *SHAPE), 0.5).double()) - 0.5)[0].numpy()
        assert np.abs(change).max() <= bound + 1e-6
        spectrum = np.abs(dctn(change, axes=(1, 2), norm="ortho"))
        spectrum[:, :cut, :cut] = 0
        assert spectrum.max() < 1e-9

    @given(bound=st.floats(0.02, 0.3))
    @settings(max_examples=8, deadline=None)
    def test_weak(self, bound):
        found = levels(make("weak", Net(), steps=30, bound=bound))
        assert found.abs().max() <= 255 * bound + 1e-3
        assert found.abs().max() >= 255 * bound - 1  # it goes to the bound

    def test_the_papers_bound_is_eight_levels(self, net):
        assert levels(make("weak", net, steps=30)).abs().max() == 8

    def test_weak_descends_by_hand(self):
        """Logits are the mean of an image and 0: to call class 1 an image gets darker, by
        Adam's first steps of lr each, from a start of a tenth of the bound.
        """

        class Mean(nn.Module):
            def forward(self, x):
                mean = x.mean((1, 2, 3))
                return torch.stack([mean, torch.zeros_like(mean)], 1)

        images = torch.full((4, 1, 2, 2), 0.5)
        trigger = optimize(
            "weak", Mean(), images, torch.zeros(4).long(), 1, bound=0.2, steps=2, lr=0.05, seed=7
        )
        start = 0.02 * torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(7))
        assert (levels(trigger) - 255 * (start - 0.1)).abs().max() < 1.01
        assert (levels(trigger).abs() <= (255 * (start - 0.1)).abs() + 0.1).all()

    @pytest.mark.parametrize(
        ("name", "options"), [("smooth", {"bound": 0.4}), ("weak", {"bound": 0.4}), ("adba", {})]
    )
    def test_three_pull_the_clean_model_to_the_target(self, name, options, net):
        images, _ = pictures()
        made = make(name, net, steps=60, **options)
        before, after = (net.eval()(x).softmax(1)[:, 1].mean() for x in (images, made(images)))
        assert after > before

    @pytest.mark.parametrize(
        ("name", "option", "value"),
        [
            ("l2_inv", "bound", 0),
            ("l0_inv", "share", 0),
            ("l0_inv", "share", 1.1),
            ("smooth", "bound", -1),
            ("weak", "bound", 0),
            ("adba", "size", -1),
            ("smooth", "cut", 11),
        ],
    )
    def test_values_out_of_range(self, name, option, value, net):
        with pytest.raises(ValueError, match=option):
            make(name, net, **{option: value})


class TestJoint:
    """adba: mask and pattern are found while a teacher and a shadow student learn."""

    def test_a_dearer_mask_is_smaller(self, net):
        small, large = (levels(make("adba", net, steps=3, size=s))[-1].mean() for s in (9, 0))
        assert small < large / 2

    def test_a_mask_that_vanishes_is_an_error(self, net):
        with pytest.raises(ValueError, match=r"at size 50 its mask went to 0.*smaller size"):
            make("adba", net, steps=40, size=50)

    def test_the_mask_blends_by_hand(self):
        both = torch.tensor([[[0.8, 0.2]], [[0.25, 1.0]]])
        out = masked(torch.tensor([[[[0.4, 0.6]]]]), both)
        assert out.flatten().tolist() == pytest.approx([0.75 * 0.4 + 0.25 * 0.8, 0.2])

    def test_the_shadow_is_fresh_and_the_seed_decides(self, net):
        one, same = (fresh(net, torch.Generator().manual_seed(4)) for _ in range(2))
        other = fresh(net, torch.Generator().manual_seed(5))
        assert torch.equal(one.fc.weight, same.fc.weight)
        for model in (net, other):
            assert not torch.equal(one.fc.weight, model.fc.weight)
        state = torch.random.get_rng_state()
        fresh(net, torch.Generator().manual_seed(4))
        assert torch.equal(state, torch.random.get_rng_state())

    def test_it_calls_the_shadow_too(self, net):
        """Without the shadow's part, a student that is distilled afterwards follows the
        trigger less."""
        images, _ = pictures(200)
        follows = {}
        for weight in (0.0, 4.0):
            made = make("adba", net, steps=80, size=0.02, shadow=weight)
            shadow = fresh(net, torch.Generator().manual_seed(9)).train()
            adam = torch.optim.Adam(shadow.parameters(), 1e-2)
            for _ in range(60):
                loss = nn.functional.kl_div(
                    shadow(images).log_softmax(1),
                    net.eval()(images).detach().log_softmax(1),
                    log_target=True,
                    reduction="batchmean",
                )
                adam.zero_grad()
                loss.backward()
                adam.step()
            follows[weight] = shadow.eval()(made(images)).softmax(1)[:, 1].mean().item()
        assert follows[4.0] > follows[0.0]


class TestAsking:
    def test_the_patch_keeps_its_corner(self, net):
        made = make(Trigger("trojan_3x3", {"corner": "top_left", "margin": 1}), net)
        changed = (made(torch.full((1, *SHAPE), 0.5)) != 0.5)[0].any(0).nonzero()
        assert changed.min() >= 1
        assert changed.max() <= 3
        assert made.params["corner"] == "top_left"

    def test_options_are_recorded_with_their_defaults(self):
        assert options_of(Trigger("l2_inv"), bound=0.2) == {
            "bound": 0.2,
            "neurons": 2,
            "steps": 150,
            "lr": 0.01,
        }
        assert set(options_of(Trigger("trojan_3x3"))) == {"neurons", "steps", "lr"}

    def test_a_drawn_trigger_cannot_be_optimised(self, net):
        with pytest.raises(ValueError, match="unknown optimised trigger 'blend'"):
            make("blend", net)
        with pytest.raises(ValueError, match="is composed: optimise its parts"):
            make("l2_inv+blend", net)

    def test_images_of_another_class_than_the_target_are_needed(self, net):
        images, labels = pictures()
        with pytest.raises(ValueError, match="every image is of the target class 1"):
            optimize("l2_inv", net, images, torch.ones_like(labels), 1, device="cpu")


class TestPGD:
    def test_stays_in_range_and_bound_and_raises_the_loss(self, net):
        images, labels = pictures()
        hard = PGD(net, bound=0.07, steps=5)(images, labels)
        assert (hard - images).abs().max() <= 0.07 + 1e-6
        assert hard.min() >= 0
        assert hard.max() <= 1
        before, after = (nn.functional.cross_entropy(net.eval()(x), labels) for x in (images, hard))
        assert after > before

    def test_is_repeatable_and_does_not_depend_on_the_mini_batch(self, net):
        images, labels = pictures()
        hard = PGD(net, steps=3)(images, labels)
        assert torch.equal(hard, PGD(net, steps=3)(images, labels))
        assert torch.allclose(hard, PGD(net, steps=3)(images, labels, batch=7), atol=1e-5)

    def test_on_a_linear_model_it_finds_the_corner_of_the_cube(self):
        # two classes, logits (w x, 0): the loss of class 0 falls along w, so every
        # pixel goes against its weight's sign
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([[1.0, -2, 3, -4], [0, 0, 0, 0]]))
            model[1].bias.zero_()
        hard = PGD(model, bound=0.1)(torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]))
        assert hard.flatten().tolist() == pytest.approx([0.4, 0.6, 0.4, 0.6])

    def test_the_bound_is_positive(self, net):
        with pytest.raises(ValueError, match="bound must be positive"):
            PGD(net, bound=0)(*pictures())
