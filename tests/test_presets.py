import pytest
import torch

from abdlab.data import Dataset, load
from abdlab.defenses import DEFENSES
from abdlab.distill import distill
from abdlab.presets import PRESETS, SECTIONS, settings
from abdlab.sources import SOURCES
from abdlab.train import train
from abdlab.triggers import Trigger

QUICK = "quick/digits"


def stand_in(name):
    """A few images in the shape of a data set, so that no preset needs a download."""
    if name == "digits":
        return load("digits", device="cpu").subset(40, 40)
    classes = 43 if name == "gtsrb" else 10
    images, labels = torch.rand(86, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(86) % classes
    names = tuple(map(str, range(classes)))
    return Dataset(name, images, labels, images, labels, names, (0.5,) * 3, (0.25,) * 3, shift=2, flip=False)


@pytest.mark.parametrize("preset", PRESETS)
class TestEveryPreset:
    def test_builds_its_networks(self, preset):
        chosen = settings(preset, device="cpu")
        data = stand_in(chosen.values["data"]["name"])
        teacher, student = chosen.teacher(data).eval(), chosen.student(data).eval()
        for model in (teacher, student):
            assert model(data.test_images[:2]).shape == (2, len(data.classes))
            assert tuple(model.normalize.mean.flatten().tolist()) == pytest.approx(data.mean)

    def test_builds_its_attack(self, preset):
        chosen = settings(preset, device="cpu")
        data = stand_in(chosen.values["data"]["name"])
        poisoned = chosen.poison(data)
        assert poisoned.trigger == chosen.trigger
        assert poisoned.mask.any()
        exam = chosen.exam(data)
        assert exam.target == chosen.target
        assert len(exam.triggered) == (data.test_labels != chosen.target).sum()

    def test_builds_its_sources_and_defences(self, preset):
        chosen = settings(preset, device="cpu")
        data = stand_in(chosen.values["data"]["name"])
        for name in SOURCES:
            assert isinstance(chosen.source(name, data), SOURCES[name])
            assert len(chosen.source(name, data)) > 0
        defences = chosen.defenses(*DEFENSES)
        assert [type(d) for d in defences] == list(DEFENSES.values())
        # binding checks every keyword; nothing runs until the first step
        stream = train(chosen.teacher(data), data.train_images, data.train_labels, **chosen.training(data))
        stream.close()
        distill(chosen.teacher(data), chosen.student(data), chosen.source("zskt", data), defenses=defences).close()

    def test_names_only_known_settings(self, preset):
        for section, values in PRESETS[preset].items():
            assert set(values) <= set(SECTIONS[section])


class TestOverrides:
    def test_a_value_overrides_and_the_preset_stays(self):
        before = repr(PRESETS)
        chosen = settings(QUICK, {"zskt.pseudo_batches": 7, "sv.alpha": 0.25, "attack.target": 3})
        assert len(chosen.source("zskt", stand_in("digits"))) == 7
        assert chosen.defenses("sv")[0].alpha == 0.25
        assert chosen.target == 3
        assert repr(PRESETS) == before

    def test_none_keeps_the_presets_value(self):
        assert settings(QUICK, {"zskt.pseudo_batches": None, "attack.trigger": None}) == settings(QUICK)

    @pytest.mark.parametrize("value", [0, 0.0, False])
    def test_nought_is_a_value(self, value):
        assert settings(QUICK, {"attack.rate": value}).values["attack"]["rate"] == value

    def test_another_trigger_drops_the_parameters(self):
        other = "blend" if settings(QUICK).trigger.name != "blend" else "sig"
        assert settings(QUICK, {"attack.trigger": other}).trigger == Trigger(other)

    def test_the_same_trigger_keeps_them(self):
        chosen = settings(QUICK)
        assert settings(QUICK, {"attack.trigger": PRESETS[QUICK]["attack"]["trigger"]}).trigger == chosen.trigger

    def test_another_trigger_with_its_own_parameters(self):
        for order in (1, -1):
            pairs = [("attack.trigger", "sig"), ("attack.params", {"strength": 0.3})][::order]
            assert settings(QUICK, dict(pairs)).trigger == Trigger("sig", {"strength": 0.3})

    def test_the_config_is_a_copy_of_the_result(self):
        chosen = settings(QUICK, {"sr.weight": 2.0}, seed=4, device="cpu")
        config = chosen.config()
        assert (config["preset"], config["seed"], config["sr"]["weight"]) == (QUICK, 4, 2.0)
        assert set(config) == {"preset", "seed", *SECTIONS}
        config["sr"]["weight"] = 9
        assert chosen.values["sr"]["weight"] == 2.0

    def test_a_config_of_some_sections(self):
        chosen = settings(QUICK, seed=4)
        assert chosen.config("sv", "data") == {
            "preset": QUICK,
            "seed": 4,
            "sv": chosen.values["sv"],
            "data": chosen.values["data"],
        }

    def test_the_seed_draws_the_networks_and_the_poison(self):
        data = stand_in("digits")
        first, same, other = (settings(QUICK, seed=seed, device="cpu") for seed in (0, 0, 1))
        weight = [s.teacher(data).fc.weight for s in (first, same, other)]
        assert torch.equal(weight[0], weight[1])
        assert not torch.equal(weight[0], weight[2])
        assert torch.equal(first.poison(data).mask, same.poison(data).mask)
        assert not torch.equal(first.student(data).conv1.weight, settings(QUICK, seed=1).student(data).conv1.weight)


class TestHints:
    def test_an_unknown_preset(self):
        with pytest.raises(ValueError, match="unknown preset 'quick/digit': did you mean 'quick/digits'"):
            settings("quick/digit")

    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ("sv.alfa", "sv.alpha"),
            ("zskt.pseudobatches", "zskt.pseudo_batches"),
            ("atack.rate", "attack.rate"),
            ("sr.strat", "sr.start"),
        ],
    )
    def test_an_unknown_setting(self, given, meant):
        with pytest.raises(ValueError, match=f"unknown setting '{given}': did you mean '{meant}'"):
            settings(QUICK, {given: 1})

    @pytest.mark.parametrize("given", ["teacher.seed", "teacher.device", "clean.images", "zskt.shape", "sv", "attack"])
    def test_what_the_run_itself_provides_is_no_setting(self, given):
        with pytest.raises(ValueError, match=f"unknown setting '{given}'"):
            settings(QUICK, {given: 1})

    def test_an_unknown_setting_is_an_error_even_when_none(self):
        with pytest.raises(ValueError, match=r"unknown setting 'sv\.alfa'"):
            settings(QUICK, {"sv.alfa": None})

    def test_unknown_sources_and_defences(self):
        with pytest.raises(ValueError, match="unknown source 'zkst': did you mean 'zskt'"):
            settings(QUICK).source("zkst", stand_in("digits"))
        with pytest.raises(ValueError, match="unknown defence 'svr': did you mean"):
            settings(QUICK).defenses("svr")
