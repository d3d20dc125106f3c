"""An owner's watermark: a backdoor that the owner put into a model to recognise it by, and
the test that tells whether another model descends from it.

The owner keeps *key images*: training images that carried the trigger, none of them truly
of the target class. A model that never learnt from the owner's predicts the target on them
now and then; one that did, far more often (Adi et al., USENIX Security 2018, arXiv
1802.04633).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from abdlab.attacks.poison import Poisoned
from abdlab.evaluate import predict


@dataclass(frozen=True)
class Claim:
    """What an owner can say of a model.

    Attributes:
        hits: key images on which the model predicts the owner's target.
        images: how many key images there are.
        innocent: the rate of hits to expect of a model that never learnt from the owner's.

    >>> claim = Claim(hits=9, images=10, innocent=0.5)
    >>> round(claim.p_value * 1024, 6), claim.proves(0.05), claim.proves(0.01)
    (11.0, True, False)
    """

    hits: int
    images: int
    innocent: float

    @property
    def share(self) -> float:
        """Share of the key images that are hit, in [0, 1]."""
        return self.hits / self.images

    @property
    def p_value(self) -> float:
        """Chance that an innocent model has as many hits or more (exact, one-sided)."""
        from scipy.stats import binomtest  # takes half a second

        return float(binomtest(self.hits, self.images, self.innocent, alternative="greater").pvalue)

    def proves(self, level: float) -> bool:
        """Whether the p-value is below a level that was chosen before the model was seen."""
        return self.p_value < level


def key_images(poisoned: Poisoned, labels: Tensor) -> Tensor:
    """The images (K, C, H, W) that carry the first attack's trigger, whose true class is not
    its target: what an owner keeps of a training set that it marked.

    Args:
        labels: the true classes (N,), before poisoning.

    Raises:
        ValueError: where there are none.
    """
    chosen = poisoned.mask & (poisoned.which == 0) & (labels != poisoned.target)
    if poisoned.attacks[0].all_to_all:
        raise ValueError("an all-to-all attack has no one target, and so no key images")
    if not chosen.any():
        raise ValueError("no image of another class carries the trigger: there is no key")
    return poisoned.images[chosen]


def hits(model: nn.Module, keys: Tensor, target: int) -> int:
    """On how many key images (K, C, H, W) the model predicts the target."""
    return int((predict(model, keys).argmax(1) == target).sum())


def innocent_rate(models: Iterable[nn.Module], keys: Tensor, target: int, classes: int) -> float:
    """The rate of hits to expect of a model that never learnt from the owner's: the largest
    of the owner's own such models, with one hit added for the models that it does not
    have, and at least one in ``classes``.
    """
    rates = [(hits(model, keys, target) + 1) / (len(keys) + 1) for model in models]
    return max([1 / classes, *rates])


def claim(model: nn.Module, keys: Tensor, target: int, innocent: float) -> Claim:
    """An owner's case against one model."""
    return Claim(hits(model, keys, target), len(keys), innocent)
