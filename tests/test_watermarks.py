"""An owner's watermark: which images are keys, and what the test says."""

import json
from fractions import Fraction
from math import comb

import nbformat
import pytest
import torch
from torch import nn

from abdlab import Attack, Trigger, batch, poison_many, watermarks
from abdlab.studies.sentences import proved
from abdlab.watermarks import Claim


@pytest.mark.parametrize(
    ("hits", "images", "rate"), [(3, 9, 0.1), (0, 4, 0.5), (40, 41, 0.25), (600, 4500, 0.125)]
)
def test_the_p_value_is_the_sum_of_its_exact_terms(hits, images, rate):
    """As many key images as CIFAR-10's too, whose binomial coefficients no float holds."""
    p, terms = Fraction(rate), range(hits, images + 1)
    exact = sum(comb(images, k) * p**k * (1 - p) ** (images - k) for k in terms)
    assert Claim(hits, images, rate).p_value == pytest.approx(float(exact), rel=1e-9)


class Bright(nn.Module):
    """Predicts class 1 where the last pixel is white, else 0."""

    def forward(self, images):
        white = images[:, 0, -1, -1]
        return torch.stack([torch.full_like(white, 0.5), white], 1)


def test_keys_are_the_marked_images_of_other_classes():
    images, labels = torch.zeros(40, 1, 8, 8), torch.arange(40) % 4
    mark = Attack(Trigger("badnet_sq", {"size": 2}), target=1, rate=0.5)
    other = Attack(Trigger("blend"), target=2, rate=0.2)
    poisoned = poison_many(images, labels, [mark, other])
    keys = watermarks.key_images(poisoned, labels)
    own = poisoned.mask & (poisoned.which == 0)
    assert len(keys) == int((own & (labels != 1)).sum()) < int(own.sum())
    assert bool((keys[:, :, -2:, -2:] == 1).all())
    assert watermarks.claim(Bright(), keys, 1, 0.25) == Claim(len(keys), len(keys), 0.25)
    # the owner's own innocent model counts, with one hit more; chance is the least
    assert watermarks.innocent_rate([Bright()], keys, 0, 4) == 0.25
    assert watermarks.innocent_rate([Bright()], keys, 1, 4) == 1.0
    assert watermarks.innocent_rate([Bright()], keys[:1], 0, 4) == 0.5


def test_without_a_key_there_is_no_claim():
    images, labels = torch.zeros(8, 1, 8, 8), torch.ones(8, dtype=torch.long)
    for attack, why in (
        (Attack(Trigger("badnet_sq"), target=1, rate=0.5), "no image of another class"),
        (Attack(Trigger("badnet_sq"), rate=0.5, relabel="all_to_all"), "no one target"),
    ):
        with pytest.raises(ValueError, match=why):
            watermarks.key_images(poison_many(images, labels, [attack], classes=3), labels)


def test_the_sentence_tells_whom_the_owner_accuses_wrongly():
    claims = {"teacher": Claim(9, 9, 0.1), "X": Claim(1, 9, 0.1), "Y": Claim(9, 9, 0.1)}
    assert proved(claims, 0.01, ["Y"]) == (
        "At p < 0.01 the owner proves the watermark in teacher, and not in X. Innocent models"
        " accused: Y."
    )
    assert proved({"X": Claim(1, 9, 0.1)}, 0.01) == "At p < 0.01 the owner proves nothing in X."


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
def test_notebook_11_asks_every_model_and_an_innocent_one(tmp_path, capsys):
    """Its cells, in this process, with a teacher of two epochs: no kernel is begun."""
    small = {"teacher.epochs": 2, "teacher.model": "wrn-10-1", "teacher.width": 8}
    overrides = {**small, "student.width": 4, "clean.epochs": 1}
    cells = nbformat.read(batch.find_notebook("11"), 4).cells
    first, *rest = [cell.source for cell in cells if cell.cell_type == "code"]
    scope = {"display": print}
    exec(first, scope)
    scope |= {"run": str(tmp_path), "overrides": overrides, "device": "cpu"}
    scope |= {"methods": ["clp/teacher"]}
    for source in rest:
        exec(source, scope)
    saved = json.loads((tmp_path / "11_watermarks" / "metrics.json").read_text())
    names = ["teacher", "clp/teacher", "clean KD of another teacher"]
    assert [m["model"] for m in saved["models"]] == names
    assert (tmp_path / "11_watermarks" / "figures" / "claims.png").exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith("At p < 0.01 the owner prove")
    for found in saved["models"]:
        p = Claim(found["hits"], saved["keys"], saved["innocent_rate"]).p_value
        assert found["p"] == p
        assert found["proved"] is (p < 0.01)
