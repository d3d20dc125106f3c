import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn

from abdlab.attacks.poison import Attack
from abdlab.attacks.triggers import Trigger, pack
from abdlab.evaluate import (
    Details,
    Exam,
    accuracy,
    agreement,
    attack_success,
    predict,
    trigger_size,
)
from abdlab.losses import kl, log_kl

# Three classes on images of 1x3 pixels: the logits are the pixels, the prediction is
# the brightest one.
IMAGES = torch.tensor(
    [
        [0.9, 0.0, 0.0],  # class 0, right; stays 0 under the trigger
        [0.3, 0.1, 0.0],  # class 0, right; called 2 under the trigger
        [0.0, 0.4, 0.1],  # class 1, right; called 2 under the trigger
        [0.0, 0.4, 0.2],  # class 2, but called 1
        [0.2, 0.1, 0.9],  # class 2, right
    ]
).view(5, 1, 1, 3)
LABELS = torch.tensor([0, 0, 1, 2, 2])
TRIGGER = Trigger("badnet_sq", {"size": 1, "value": 0.5})  # sets the last pixel to .5
PROBABILITIES = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
OTHERS = np.array([[0.25, 0.5, 0.25], [0.3, 0.3, 0.4]])


@pytest.fixture
def identity():
    """The pixels as logits."""
    linear = nn.Linear(3, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(3))
        linear.bias.zero_()
    return nn.Sequential(nn.Flatten(), linear)


def logits(probabilities):
    return torch.from_numpy(np.log(probabilities) + 3)  # softmax forgets the 3


class TestShares:
    def test_accuracy_by_hand(self, identity):
        assert accuracy(identity, IMAGES, LABELS) == pytest.approx(4 / 5)

    def test_attack_success_by_hand(self, identity):
        assert attack_success(identity, IMAGES, 2) == pytest.approx(1 / 5)
        assert attack_success(identity, IMAGES, 1) == pytest.approx(2 / 5)

    def test_exam_leaves_the_targets_own_images_out_of_asr(self, identity):
        # with them it were 4/5
        assert Exam.of(IMAGES, LABELS, TRIGGER, 2)(identity) == pytest.approx(
            {"acc": 4 / 5, "asr": 2 / 3}
        )

    def test_exam_without_a_trigger_has_no_asr(self, identity):
        assert Exam.of(IMAGES, LABELS)(identity) == pytest.approx({"acc": 4 / 5})

    def test_all_to_all_counts_every_image_that_is_called_its_next_class(self, identity):
        # triggered predictions are 0, 2, 2, 2 and 2 (or 1: a tie would count once);
        # wanted are 1, 1, 2, 0 and 0
        attack = Attack(TRIGGER, relabel="all_to_all")
        assert Exam.of(IMAGES, LABELS, attack)(identity) == pytest.approx(
            {"acc": 4 / 5, "asr": 1 / 5}
        )
        assert attack_success(identity, IMAGES, torch.tensor([0, 1, 1, 0, 2])) == pytest.approx(
            3 / 5
        )

    def test_several_attacks_have_an_asr_each_and_their_mean(self, identity):
        dark = Trigger(
            "badnet_sq", {"size": 1, "value": 0.0, "corner": "bottom_left"}
        )  # the first pixel to 0
        attacks = [Attack(TRIGGER, 2), Attack(dark, 1), Attack(Trigger("blend", {"alpha": 0}), 0)]
        # dark: of the images 0, 1, 3 and 4 the second and third are called 1, and the
        # first, all black, is called 0 blend: nothing changes, and no image of the
        # classes 1 and 2 is called 0
        exam = Exam.of(IMAGES, LABELS, attacks)
        expected = {
            "acc": 4 / 5,
            "asr": (2 / 3 + 1 / 2) / 3,
            "asr/badnet_sq": 2 / 3,
            "asr/badnet_sq-2": 1 / 2,
            "asr/blend": 0,
        }
        assert exam(identity) == pytest.approx(expected)
        assert exam.target == 2
        assert len(exam.triggered) == 3

    def test_agreement_by_hand(self, identity):
        reverse = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
        with torch.no_grad():
            reverse[1].weight.copy_(torch.eye(3).flip(0))  # classes 0 and 2 swap places
            reverse[1].bias.zero_()
        assert agreement(identity, identity, IMAGES) == 1
        assert agreement(identity, reverse, IMAGES) == pytest.approx(2 / 5)


class TestDetails:
    def test_by_hand(self, identity):
        """Target 2: of the images of classes 0 and 1, one of three stays itself under the
        trigger, and two are called 2.
        """
        found = Exam.of(IMAGES, LABELS, TRIGGER, 2).details(identity, 3)
        assert found.clean.tolist() == [[2, 0, 0], [0, 1, 0], [0, 1, 1]]
        assert found.per_class == [1.0, 1.0, 0.5]
        assert found.triggered["badnet_sq"].tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]
        assert found.robust == {"robust": pytest.approx(1 / 3)}

    def test_robust_accuracy_and_asr_are_shares_of_the_same_images(self, identity):
        exam = Exam.of(IMAGES, LABELS, TRIGGER, 2)
        counts = exam.details(identity, 3).triggered["badnet_sq"]
        assert counts[:, 2].sum() / counts.sum() == pytest.approx(exam(identity)["asr"])
        assert counts.sum() == len(exam.triggered)

    def test_several_attacks_have_their_own_and_a_mean(self, identity):
        plain = Trigger("badnet_sq", {"size": 1, "value": 0.0})
        found = Exam.of(IMAGES, LABELS, [Attack(TRIGGER, 2), Attack(plain, 2)]).details(identity, 3)
        both = found.robust
        assert both["robust"] == (both["robust/badnet_sq"] + both["robust/badnet_sq-2"]) / 2
        assert both["robust/badnet_sq-2"] == 1

    def test_what_is_not_there_is_not_known(self, identity):
        assert Exam.of(IMAGES[:0], LABELS[:0]).details(identity, 3) is None
        found = Exam.of(IMAGES, LABELS).details(identity, 4)
        assert (found.robust, found.triggered, found.per_class[3]) == ({}, {}, None)
        assert Details(found.clean, {}).card() == {"clean": found.clean.tolist(), "triggered": {}}


class TestPredict:
    @pytest.fixture
    def net(self):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, (1, 2)),
            nn.BatchNorm2d(4),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
        net.train()(IMAGES)
        net[1].eval()
        return net

    def test_is_in_eval_mode_and_restores_each_flag(self, net):
        flags = [m.training for m in net.modules()]
        out = predict(net, IMAGES)
        assert [m.training for m in net.modules()] == flags
        assert torch.allclose(out, net.eval()(IMAGES))

    def test_leaves_the_statistics_alone_and_needs_no_gradient(self, net):
        net.train()
        before = net[1].running_mean.clone()
        assert not predict(net, IMAGES).requires_grad
        assert torch.equal(net[1].running_mean, before)

    @pytest.mark.parametrize("batch", [1, 2, 3, 5, 1000])
    def test_the_batch_size_does_not_matter(self, net, batch):
        assert torch.allclose(predict(net, IMAGES, batch), predict(net, IMAGES), atol=1e-6)


class TestKL:
    def test_is_the_one_of_scipy_in_nats(self):
        expected = entropy(PROBABILITIES, OTHERS, axis=1)
        assert kl(logits(PROBABILITIES), logits(OTHERS)).tolist() == pytest.approx(
            expected.tolist()
        )

    def test_by_hand(self):
        # .5 ln(.5/.25) + .25 ln(.25/.5) + 0
        assert kl(logits(PROBABILITIES[:1]), logits(OTHERS[:1])).item() == pytest.approx(
            0.25 * math.log(2)
        )

    def test_is_not_symmetric_and_zero_only_for_equals(self):
        p, q = logits(PROBABILITIES), logits(OTHERS)
        assert not torch.allclose(kl(p, q), kl(q, p))
        assert kl(p, p + 5).tolist() == pytest.approx([0, 0], abs=1e-12)

    def test_the_temperature_divides_both(self):
        p, q = logits(PROBABILITIES), logits(OTHERS)
        assert torch.allclose(kl(p, q, temperature=4.0), kl(p / 4, q / 4))

    def test_extreme_logits_stay_finite(self):
        p, q = torch.tensor([[200.0, 0, 0]]), torch.tensor([[0.0, 200, 0]])
        assert kl(p, q).item() == pytest.approx(200)

    def test_log_kl_is_the_decimal_logarithm_in_float64(self):
        found = log_kl(logits(PROBABILITIES).float(), logits(OTHERS).float())
        assert found.dtype == torch.float64
        expected = np.log10(entropy(PROBABILITIES, OTHERS, axis=1))
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)

    def test_log_kl_clamps_round_off_below_zero(self):
        p = torch.randn(200, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        q = p + 0.1
        assert (kl(p, q) < 0).any()
        assert (log_kl(p, q) == -12).all()
        assert (log_kl(p, q, floor=1e-6) == -6).all()


class TestTriggerSize:
    def test_by_hand(self):
        # two pixels of nine are set to 1: once from 0 and .5, once from .8 and 1, where
        # one pixel stays as it is
        images = torch.tensor(
            [
                [[[0.0, 0.3, 0], [0.5, 0.6, 0], [0, 0, 0]]],
                [[[0.8, 0.2, 1], [1.0, 0.4, 0], [0, 1, 1]]],
            ]
        )
        trigger = Trigger(
            "l0_inv",
            {"pattern": pack(torch.tensor([[[255, -1, -1], [255, -1, -1], [-1, -1, -1]]]))},
        )
        found = trigger_size(images, trigger)
        assert found["l0"] == pytest.approx((2 / 9 + 1 / 9) / 2)
        assert found["l2"] == pytest.approx((math.sqrt(1 + 0.25) + 0.2) / 2)
        assert found["linf"] == pytest.approx((1 + 0.2) / 2)

    def test_a_pixel_counts_once_whatever_its_channels(self):
        found = trigger_size(torch.zeros(1, 3, 8, 8), Trigger("badnet_sq", {"size": 2}))
        assert found["l0"] == pytest.approx(4 / 64)
        assert found["l2"] == pytest.approx(math.sqrt(3 * 4))
        assert found["linf"] == 1

    @pytest.mark.parametrize("side", [3, 8, 16])
    def test_the_similarity_of_two_flat_images_by_hand(self, side):
        # no variance: what is left of the formula is (2 a b + c) / (a^2 + b^2 + c) with
        # c = .01^2
        flat = torch.full((1, 1, side, side), 0.5)
        lighter = Trigger("smooth", {"pattern": pack(torch.tensor([[[51]]]))})
        expected = (2 * 0.5 * 0.7 + 1e-4) / (0.25 + 0.49 + 1e-4)
        assert trigger_size(flat, lighter)["ssim"] == pytest.approx(expected)

    def test_no_change(self):
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        found = trigger_size(images, Trigger("blend", {"alpha": 0}))
        assert found == pytest.approx({"l0": 0, "l2": 0, "linf": 0, "ssim": 1})
