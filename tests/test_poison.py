import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from abdlab.attacks.optimize import PGD
from abdlab.attacks.poison import Attack, poison, poison_many, triggered_test
from abdlab.attacks.triggers import Trigger

SQUARE = Trigger("badnet_sq", {"size": 2, "value": 1.0})
CORNER = Trigger("badnet_sq", {"size": 2, "value": 1.0, "corner": "top_left"})


class Linear(nn.Sequential):
    """Four classes, by fixed random weights on the pixels."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
        with torch.no_grad():
            self[1].weight.copy_(torch.randn(4, 192, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def images():
    return torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.9


@pytest.fixture
def labels():
    """Four classes, ten images each."""
    return torch.arange(40) % 4


def test_rate_0_is_the_identity(images, labels):
    found = poison(images, labels, SQUARE, rate=0)
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    assert not found.mask.any()
    assert found.rate == 0


@pytest.mark.parametrize(("rate", "count"), [(0.05, 2), (0.1, 4), (0.26, 10), (1, 40)])
def test_the_rate_counts_the_whole_set(images, labels, rate, count):
    found = poison(images, labels, SQUARE, rate=rate)
    assert found.mask.sum() == count
    assert found.rate == pytest.approx(count / 40)


def test_exactly_the_masked_images_carry_trigger_and_label(images, labels):
    found = poison(images, labels, SQUARE, rate=0.25, target=2)
    assert torch.equal(found.images[found.mask], SQUARE(images[found.mask]))
    assert torch.equal(found.images[~found.mask], images[~found.mask])
    assert (found.labels[found.mask] == 2).all()
    assert torch.equal(found.labels[~found.mask], labels[~found.mask])
    assert (found.trigger, found.target) == (SQUARE, 2)


def test_the_inputs_stay_as_they_are(images, labels):
    before = images.clone(), labels.clone()
    poison(images, labels, SQUARE, rate=1)
    triggered_test(images, labels, SQUARE, 0)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def test_the_seed_draws_the_mask(images, labels):
    first = poison(images, labels, SQUARE, rate=0.25, seed=1)
    assert torch.equal(first.mask, poison(images, labels, SQUARE, rate=0.25, seed=1).mask)
    assert not torch.equal(first.mask, poison(images, labels, SQUARE, rate=0.25, seed=2).mask)


def test_a_higher_rate_contains_the_lower_one(images, labels):
    low, high = (poison(images, labels, SQUARE, rate=rate).mask for rate in (0.1, 0.4))
    assert (high | ~low).all()


def test_clean_label_touches_only_the_target_class_and_keeps_labels(images, labels):
    sig = Trigger("sig")
    found = poison(images, labels, sig, rate=0.1, target=3)
    assert found.mask.sum() == 4
    assert (labels[found.mask] == 3).all()
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.images[found.mask], sig(images[found.mask]))
    assert torch.equal(found.images[~found.mask], images[~found.mask])


def test_clean_label_takes_at_most_the_whole_class(images, labels):
    found = poison(images, labels, Trigger("sig"), rate=0.9, target=3)
    assert torch.equal(found.mask, labels == 3)


def test_clean_label_can_be_asked_for_and_refused(images, labels):
    asked = poison(images, labels, SQUARE, rate=0.1, target=1, clean_label=True)
    assert torch.equal(asked.labels, labels)
    refused = poison(images, labels, Trigger("sig"), rate=0.5, target=1, clean_label=False)
    assert refused.mask.sum() == 20
    assert (labels[refused.mask] != 1).any()
    assert (refused.labels[refused.mask] == 1).all()


@pytest.mark.parametrize("rate", [-0.01, 1.01, float("nan")])
def test_a_rate_is_a_share(images, labels, rate):
    with pytest.raises(ValueError, match=r"the poison rate is a share in \[0, 1\]"):
        poison(images, labels, SQUARE, rate=rate)


@pytest.mark.parametrize("target", [-1, 4])
def test_a_target_is_a_class(images, labels, target):
    with pytest.raises(
        ValueError, match=f"target {target} is not a class: the labels run from 0 to 3"
    ):
        poison(images, labels, SQUARE, target=target)


def test_triggered_test_leaves_the_target_class_out(images, labels):
    triggered, true = triggered_test(images, labels, SQUARE, target=1)
    assert len(triggered) == 30
    assert (true != 1).all()
    assert torch.equal(triggered, SQUARE(images[labels != 1]))
    assert torch.equal(true, labels[labels != 1])


def test_triggered_test_needs_another_class(images):
    with pytest.raises(ValueError, match="every test image is of the target class 0"):
        triggered_test(images, torch.zeros(40, dtype=torch.long), SQUARE, target=0)


class TestAllToAll:
    def test_every_class_becomes_the_next_one(self, images, labels):
        found = poison(images, labels, SQUARE, rate=0.5, relabel="all_to_all")
        assert found.mask.sum() == 20
        assert torch.equal(found.labels[found.mask], (labels[found.mask] + 1) % 4)
        assert torch.equal(found.labels[~found.mask], labels[~found.mask])
        assert {0, 1, 2, 3} == set(labels[found.mask].tolist())

    def test_the_number_of_classes_can_be_given(self, images, labels):
        found = poison(images, labels, SQUARE, rate=1, relabel="all_to_all", classes=7)
        assert torch.equal(found.labels, labels + 1)

    def test_its_test_set_is_all_images(self, images, labels):
        triggered, true = triggered_test(images, labels, Attack(SQUARE, relabel="all_to_all"))
        assert torch.equal(triggered, SQUARE(images))
        assert torch.equal(true, labels)

    def test_contradictions_and_hints(self, images, labels):
        with pytest.raises(ValueError, match="sig keeps its labels"):
            poison(images, labels, Trigger("sig"), relabel="all_to_all")
        with pytest.raises(
            ValueError, match="unknown relabelling 'all_to_al': did you mean 'all_to_all'"
        ):
            poison(images, labels, SQUARE, relabel="all_to_al")


class TestCovers:
    def test_they_carry_the_trigger_keep_their_label_and_are_none_of_the_target(
        self, images, labels
    ):
        found = poison(images, labels, SQUARE, rate=0.1, covers=0.2, target=1)
        assert (found.mask.sum(), found.covers.sum()) == (4, 8)
        assert not (found.mask & found.covers).any()
        assert torch.equal(found.images[found.covers], SQUARE(images[found.covers]))
        assert torch.equal(found.labels[found.covers], labels[found.covers])
        assert (labels[found.covers] != 1).all()
        assert found.rate == pytest.approx(0.1)
        untouched = ~(found.mask | found.covers)
        assert torch.equal(found.images[untouched], images[untouched])
        assert torch.equal(found.which >= 0, ~untouched)

    def test_of_an_all_to_all_attack_they_may_be_of_any_class(self, images, labels):
        found = poison(images, labels, SQUARE, rate=0, covers=1.0, relabel="all_to_all")
        assert found.covers.all()
        assert torch.equal(found.labels, labels)

    def test_they_do_not_change_what_is_poisoned(self, images, labels):
        assert torch.equal(
            poison(images, labels, SQUARE).mask, poison(images, labels, SQUARE, covers=0.5).mask
        )

    def test_too_many(self, images, labels):
        with pytest.raises(ValueError, match=r"asks for 32 covers, and [0-9]+ images are left"):
            poison(images, labels, SQUARE, rate=0.5, covers=0.8)
        with pytest.raises(ValueError, match=r"share of covers is a share in \[0, 1\], not 1.5"):
            poison(images, labels, SQUARE, covers=1.5)


class TestSeveralAttacks:
    def test_disjoint_samples_each_with_its_own_trigger_and_target(self, images, labels):
        attacks = [
            Attack(SQUARE, 2, 0.1),
            Attack(CORNER, 3, 0.2, covers=0.05),
            Attack(Trigger("sig"), 1, 0.05),
        ]
        found = poison_many(images, labels, attacks, seed=3)
        assert [((found.which == i) & found.mask).sum().item() for i in range(3)] == [4, 8, 2]
        assert [found.rate_of(i) for i in range(3)] == pytest.approx([0.1, 0.2, 0.05])
        assert ((found.which == 1) & found.covers).sum() == 2
        assert found.covers.sum() == 2
        for i, attack in enumerate(attacks):
            carries = found.which == i
            assert torch.equal(found.images[carries], attack.trigger(images[carries]))
            assert (found.labels[carries & found.mask] == attack.target).all()
        assert torch.equal(found.images[found.which < 0], images[found.which < 0])
        assert (found.trigger, found.target, found.attacks) == (SQUARE, 2, tuple(attacks))
        assert [str(a) for a in attacks] == ["badnet_sq -> 2", "badnet_sq -> 3", "sig -> 1"]

    @given(
        rates=st.lists(st.floats(0, 0.25), min_size=1, max_size=3),
        covers=st.floats(0, 0.2),
        seed=st.integers(0, 9),
    )
    @settings(max_examples=40, deadline=None)
    def test_counts_for_any_shares(self, rates, covers, seed):
        labels = torch.arange(60) % 5
        images = torch.zeros(60, 1, 4, 4)
        found = poison_many(
            images,
            labels,
            [Attack(SQUARE, i, r, covers=covers / 3) for i, r in enumerate(rates)],
            seed,
        )
        assert found.mask.sum() == sum(round(60 * r) for r in rates)
        assert found.covers.sum() == len(rates) * round(60 * covers / 3)
        assert (found.images.flatten(1).sum(1) == 4.0 * (found.which >= 0)).all()

    def test_the_first_attack_is_drawn_as_if_it_were_alone(self, images, labels):
        alone = poison(images, labels, SQUARE, seed=5)
        both = poison_many(images, labels, [Attack(SQUARE), Attack(CORNER, 1)], seed=5)
        assert torch.equal(alone.mask, (both.which == 0) & both.mask)

    def test_more_than_there_is(self, images, labels):
        with pytest.raises(
            ValueError, match="badnet_sq -> 1 asks for 24 poisoned images, and 16 images are left"
        ):
            poison_many(images, labels, [Attack(SQUARE, 0, 0.6), Attack(CORNER, 1, 0.6)])
        with pytest.raises(ValueError, match="at least one attack"):
            poison_many(images, labels, [])

    def test_cards_say_what_is_not_default(self):
        assert Attack(SQUARE, 2, 0.3).card() == {"trigger": SQUARE.card(), "target": 2, "rate": 0.3}
        assert Attack(SQUARE, relabel="all_to_all", covers=0.1).card() == {
            "trigger": SQUARE.card(),
            "target": 0,
            "rate": 0.1,
            "relabel": "all_to_all",
            "covers": 0.1,
        }


class TestLabelConsistent:
    CL = Trigger("cl", {"size": 3})

    def test_perturbs_the_targets_images_within_the_bound_and_keeps_every_label(
        self, images, labels
    ):
        found = poison(
            images, labels, self.CL, rate=0.2, target=2, adversary=PGD(Linear(), bound=0.1)
        )
        assert found.mask.sum() == 8
        assert (labels[found.mask] == 2).all()
        assert torch.equal(found.labels, labels)
        assert torch.equal(found.images[~found.mask], images[~found.mask])
        # outside the grids only the perturbation is left
        free = (self.CL(torch.zeros(1, 3, 8, 8)) == 0) & (self.CL(torch.ones(1, 3, 8, 8)) == 1)
        change = (found.images - images)[found.mask][:, free[0]]
        assert 0.09 < change.abs().max() <= 0.1 + 1e-6
        assert torch.equal(self.CL(found.images[found.mask]), found.images[found.mask])
        assert found.images.min() >= 0
        assert found.images.max() <= 1

    def test_the_model_no_longer_recognises_them(self, images, labels):
        model = Linear()
        hard = PGD(model, bound=0.1)(images, labels)
        before, after = (nn.functional.cross_entropy(model(x), labels) for x in (images, hard))
        assert after > before + 1

    def test_a_model_alone_is_perturbed_against_with_the_default_bound(self, images, labels):
        model = Linear()
        found, same = (
            poison(images, labels, self.CL, target=2, adversary=a) for a in (model, PGD(model))
        )
        assert torch.equal(found.images, same.images)

    def test_without_an_adversary(self, images, labels):
        with pytest.raises(
            ValueError,
            match="cl perturbs the target's images against a clean model: pass adversary=",
        ):
            poison(images, labels, self.CL)

    def test_with_wrong_labels_it_needs_none(self, images, labels):
        found = poison(images, labels, self.CL, clean_label=False)
        assert torch.equal(found.images[found.mask], self.CL(images[found.mask]))

    def test_covers_are_not_perturbed(self, images, labels):
        found = poison(images, labels, self.CL, covers=0.1, adversary=Linear())
        assert torch.equal(found.images[found.covers], self.CL(images[found.covers]))
