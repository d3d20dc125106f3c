"""Labels as values, names from registries, and parts of a newcomer's own by import path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abdlab.defenses import DEFENSES, ShufflingVaccine
from abdlab.labels import Label, in_order, name_of
from abdlab.purifiers import PURIFIERS
from abdlab.registry import Registry
from abdlab.settings import SECTIONS, settings
from abdlab.sources import SOURCES


def names(registry):
    return st.lists(st.sampled_from(sorted(registry)), unique=True, max_size=3)


@given(names(PURIFIERS), st.sampled_from(sorted(SOURCES)), names(DEFENSES))
def test_a_label_is_what_it_was_parsed_from(purifiers, source, defenses):
    label = Label(source, tuple(defenses), tuple(purifiers))
    assert Label.parse(str(label)) == label
    assert {*label.parts} == {source, *defenses, *purifiers}
    assert "/" not in label.folder
    assert label.undefended == (not defenses and not purifiers)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a method is purifier"),
        ("zskt+", "a method is purifier"),
        ("/zskt", "a method is purifier"),
        ("bounded/unlearn/zskt", "a method is purifier"),
        ("zskt sv", "a method is purifier"),
        ("zskt+sv+sv", "names sv twice"),
        ("bounded+bounded/zskt", "names bounded twice"),
    ],
)
def test_what_is_no_label_is_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        Label.parse(text)


def test_names_for_people():
    spoken = {
        "teacher": "teacher",
        "clean": "clean KD",
        "zskt+sv": "ZSKT+SV",
        "bounded+unlearn/cmi+tc": "bounded+unlearn/CMI+TC",
        "bounded/teacher": "bounded/teacher",
        "my_pkg.mine:Noise+sv": "NOISE+SV",
    }
    assert {label: name_of(label) for label in spoken} == spoken


def test_order_goes_from_teachers_to_all_defenses():
    mixed = ["zskt+sv+tu", "cmi", "bounded/zskt", "zskt", "clean", "bounded/teacher", "teacher"]
    assert in_order(mixed) == [
        "teacher",
        "bounded/teacher",
        "clean",
        "zskt",
        "zskt+sv+tu",
        "bounded/zskt",
        "cmi",
    ]


def test_methods_that_train_alike_until_a_late_defense_begins():
    late = ("sr", "tu")

    def others(text):
        return {str(other) for other in Label.parse(text).forks(late)}

    assert others("zskt") == {"zskt+sr", "zskt+tu"}
    assert others("zskt+sv+tu") == {"zskt+sv", "zskt+sv+sr"}
    assert others("bounded/cmi+sr") == {"bounded/cmi", "bounded/cmi+tu"}


def test_every_registered_part_has_a_section_and_its_own_name():
    parts = {**SOURCES, **DEFENSES, **PURIFIERS}
    assert len(parts) == len(SOURCES) + len(DEFENSES) + len(PURIFIERS), "a name means one thing"
    assert {*parts} <= {*SECTIONS}
    assert all(cls.name == key for key, cls in parts.items())
    assert ShufflingVaccine().name == "sv"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nois", "unknown part 'nois': did you mean 'noise'"),
        ("no_such_pkg.mine:Noise", "cannot be imported: No module named 'no_such_pkg'"),
        ("collections:Nothing", "cannot be imported: module 'collections' has no attribute"),
        ("collections:namedtuple", "is no class but a function"),
    ],
)
def test_what_cannot_be_found_is_one_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        Registry("part", {"noise": type("Noise", (), {})}).find(name)


SOURCE = '''
"""A source of one's own: images are noise."""
from dataclasses import KW_ONLY, dataclass
import torch
from torch.optim import Adam
from abdlab.losses import kl
from abdlab.sources import Batch, Source


@dataclass(eq=False, repr=False)
class Static(Source):
    shape: tuple
    _: KW_ONLY
    pseudo_batches: int = 4
    size: float = 1.0

    def __len__(self):
        return self.pseudo_batches

    def optimizer(self, student):
        return Adam(student.parameters(), lr=1e-3), None

    def batch(self, defenses):
        images = self.size * torch.rand(8, *self.shape, generator=self.rng).to(self.device)
        return Batch(images, self.teacher(images), synthesised=False)

    def student_loss(self, batch):
        logits = self.student(batch.images)
        return logits, kl(batch.logits, logits), {}
'''

DEFENSE = '''
"""A defense of one's own: the student answers noisy images as the teacher answers them clean."""
import torch
from abdlab.defenses import Defense
from abdlab.losses import kl


class Noise(Defense):
    tunable = ("weight",)

    def __init__(self, *, weight: float = 1.0, size: float = 0.1):
        self.weight, self.size = weight, size

    def student_term(self, batch, logits):
        noise = self.size * torch.randn(batch.images.shape, generator=self.rng)
        answers = self.student(batch.images + noise.to(self.device))
        return self.weight * kl(batch.logits, answers).mean()
'''

TINY = {
    "data.size": 8,
    "teacher.model": "wrn-10-1",
    "teacher.epochs": 1,
    "teacher.width": 4,
    "student.width": 4,
    "clean.epochs": 1,
}


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder to work in with two files of one's own."""
    assert max(len(text.strip().splitlines()) for text in (SOURCE, DEFENSE)) <= 30
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "defend.py").write_text(DEFENSE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ABDLAB_HEADLESS", "1")
    return tmp_path


def test_settings_name_them(newcomer):
    given = {"defend:Noise.weight": 2.0, "mine:Static.pseudo_batches": 3}
    chosen = settings("quick/digits", given)
    (defense,) = chosen.defenses("defend:Noise")
    assert (defense.weight, defense.name) == (2.0, "defend:Noise")
    assert len(chosen.source("mine:Static", chosen.dataset())) == 3
    with pytest.raises(ValueError, match=r"did you mean 'defend:Noise\.weight'"):
        settings("quick/digits", {"defend:Noise.wieght": 2.0})


@pytest.mark.slow
def test_they_run_by_name_in_a_notebook_a_sweep_and_the_tuner(newcomer, here):
    import json
    import time

    import torch
    import yaml
    from safetensors.torch import load_file

    from abdlab.threads import computing_with

    over = json.dumps(TINY | {"defend:Noise.weight": 2.0})
    code, out, error = here(
        *("run", "02", "-p", "run", "runs/own", "-p", "source", "mine:Static"),
        *("-p", "defenses", "['defend:Noise']", "-p", "overrides", over, "-p", "device", "cpu"),
    )
    assert code == 0, out + error
    label = "mine:Static+defend:Noise"
    metrics = json.loads((newcomer / "runs/own/02_distillation/metrics.json").read_text())
    assert list(metrics["results"]) == ["clean", "mine:Static", label]
    config = (newcomer / "runs/own/seed0" / Label.parse(label).folder / "config.json").read_text()
    assert json.loads(config)["defend:Noise"] == {"weight": 2.0}

    study = {"notebook": "05_abd_ablation", "parameters": {"overrides": TINY, "device": "cpu"}}
    study["grid"] = {"methods": [["mine:Static", label]], "defend:Noise.size": [0.1]}
    (newcomer / "own.yaml").write_text(yaml.safe_dump(study))
    code, out, error = here("sweep", "own.yaml", "--out", "swept", "--slots", "1")
    assert code == 0, out + error
    found = sorted(newcomer.glob("swept/jobs/*/seed0/mine*/metrics.json"))
    assert [json.loads(p.read_text())["label"] for p in found].count(label) == 1

    from abdlab import widgets

    tuner = widgets.DefenseTuner(
        "runs/own", settings("quick/digits", json.loads(over), device="cpu"), label=label
    )
    with computing_with(2):  # as in a kernel with two cores
        tuner.start()
        until = time.monotonic() + 120
        going = ("idle", "preparing", "asking", "running")
        while tuner.state in going and time.monotonic() < until:
            if tuner.state == "asking":  # a teacher of few steps has next to no backdoor
                tuner.start()
            time.sleep(0.2)
    assert tuner.state == "done", tuner.trouble.sentence
    config = json.loads((newcomer / "runs/own/seed0" / tuner.folder / "config.json").read_text())
    assert config["defend:Noise"] == {"weight": 2.0}
    assert tuner.knob("defend:Noise.weight").value == 2.0

    # contract 7: the same numbers from every launcher, on however many cores it was started
    seeds = newcomer / "runs/own/seed0"
    (job,) = newcomer.glob("swept/jobs/*/seed0/mine.Static")
    pairs = [
        (seeds / "mine.Static", job),
        (seeds / Label.parse(label).folder, seeds / tuner.folder),
    ]
    for folders in pairs:
        one, other = (load_file(folder / "student.safetensors") for folder in folders)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        for folder in folders:
            assert json.loads((folder / "config.json").read_text())["threads"] == 1
