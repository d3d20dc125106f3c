"""The switch between the paper's printed formulas and the scales of its official code."""

import pytest
import torch

from abdlab.data import load
from abdlab.defenses import DEFENSES
from abdlab.models import build
from abdlab.presets import PRESETS, SCALES
from abdlab.settings import SECTIONS, settings
from abdlab.sources import Batch

QUICK = "quick/digits"


@pytest.fixture(scope="module")
def data():
    return load("digits", device="cpu").subset(40, 40)


class TestScales:
    """The switch between the printed formulas and the official code's scales, on
    numbers computed by hand.
    """

    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = 1/2 log 4/3 = .1438410, summed over
    # the two classes
    P, Q, KL = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log(), 0.1438410

    @pytest.mark.parametrize(
        ("scales", "expected"), [("printed", KL), ("code", KL / 2), (None, KL / 2)]
    )
    @pytest.mark.parametrize("name", ["zskt", "ood"])
    def test_the_kd_loss(self, data, name, scales, expected):
        source = settings(QUICK, {f"{name}.temperature": 1.0}, scales=scales).source(name, data)
        source.student, source.pairs = lambda images: self.Q, {}
        _, kd, _ = source.student_loss(Batch(torch.zeros(1, 1, 16, 16), self.P))
        assert kd.item() == pytest.approx(expected, rel=1e-5)

    @staticmethod
    def vaccine(scales, **overrides):
        (sv,) = settings(
            QUICK, {"sv.alpha": 0.5, "sv.cap": 1e9, **overrides}, scales=scales
        ).defenses("sv")
        model = build("wrn-10-1", channels=1, width=4)
        sv.start(model, model, torch.device("cpu"), 0, 10)
        # T~ says (1/2, 1/2) four times, which is class 0; T agrees once
        sv.vaccine, sv.active = lambda images: torch.zeros(4, 2), True
        return sv, torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.25, 0.75], [0.25, 0.75]]).log()

    # KL((1/2, 1/2) || (3/4, 1/4)) is .1438410 too. Printed: alpha x KL / 4 samples.
    # Code: the other way round it is 3/4 log 3/2 + 1/4 log 1/2 = .1308120; alpha x KL /
    # 2 classes / 1 agreeing
    @pytest.mark.parametrize(
        ("scales", "expected"), [("printed", -0.5 * KL / 4), ("code", -0.5 * 0.1308120 / 2)]
    )
    def test_the_synthesis_term(self, scales, expected):
        sv, logits = self.vaccine(scales)
        assert sv.synthesis_term(torch.zeros(4, 1, 16, 16), logits).item() == pytest.approx(
            expected, rel=1e-5
        )

    # losses 1, 2, 3, 4, the first suspicious. Printed: (1/10 + 2 + 3 + 4) / 4. Code:
    # mean(2, 3, 4) - .1 x 1
    @pytest.mark.parametrize(
        ("scales", "expected"), [("printed", 2.275), (None, 2.275), ("code", 2.9)]
    )
    def test_the_weights_without_synthesis(self, scales, expected):
        sv, logits = self.vaccine(scales)
        weights = sv.sample_weights(Batch(torch.zeros(4, 1, 16, 16), logits, synthesised=False))
        assert (weights * torch.tensor([1.0, 2.0, 3.0, 4.0])).mean().item() == pytest.approx(
            expected
        )

    # S(x) = (x, -x) of one pixel at x = 0, delta 1/2: s = sigmoid(1), KL = -1/2 log(4 s
    # (1 - s)) = .1201145. Printed: its mean. Code: 2 of 128 images carry delta, and
    # their sum is divided by 128
    @pytest.mark.parametrize(
        ("scales", "expected"), [("printed", 0.1201145), ("code", 2 * 0.1201145 / 128)]
    )
    def test_self_retrospection(self, scales, expected):
        class Slope(torch.nn.Module):
            def forward(self, x):
                return torch.cat([x.flatten(1), -x.flatten(1)], 1)

        (sr,) = settings(QUICK, {"sr.weight": 1.0, "sr.start": 0.0}, scales=scales).defenses("sr")
        sr.start(Slope(), Slope(), torch.device("cpu"), 0, 10)
        sr.before(0)
        images = torch.zeros(128, 1, 1, 1)
        batch = Batch(images, Slope()(images))
        sr.observe(batch)
        sr.scale, sr._delta = (
            torch.ones(1, 1, 1, 1),
            lambda batch, images: torch.full((1, 1, 1, 1), 0.5),
        )
        assert sr.student_term(batch, Slope()(images)).item() == pytest.approx(expected, rel=1e-5)
        assert (sr.init_std > 0, sr.perturb) == (
            (True, "student") if scales == "printed" else (False, "teacher")
        )

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("scales", SCALES)
    def test_every_preset_takes_them(self, preset, scales):
        chosen = settings(preset, scales=scales)
        for section, values in SCALES[scales].items():
            assert set(values) <= set(SECTIONS[section])
            assert {key: chosen.values[section][key] for key in values} == values
        assert len(chosen.defenses(*DEFENSES)) == len(DEFENSES)
        assert settings(preset, scales=None) == settings(preset)

    def test_single_settings_override_them(self):
        chosen = settings(QUICK, {"sv.per": "agreeing", "sr.fraction": 0.5}, scales="printed")
        assert (chosen.values["sv"]["per"], chosen.values["sv"]["class_mean"]) == (
            "agreeing",
            False,
        )
        assert chosen.values["sr"]["fraction"] == 0.5

    def test_unknown_scales(self):
        with pytest.raises(ValueError, match="unknown scales 'printd': did you mean 'printed'"):
            settings(QUICK, scales="printd")
