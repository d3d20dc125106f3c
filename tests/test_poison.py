import pytest
import torch

from abdlab.poison import poison, triggered_test
from abdlab.triggers import Trigger

SQUARE = Trigger("badnet_sq", {"size": 2, "value": 1.0})


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
    with pytest.raises(ValueError, match=f"target {target} is not a class: the labels run from 0 to 3"):
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
