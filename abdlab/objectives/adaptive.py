"""Attackers who know the defense: each trains the teacher so that one of them fails.

They see what an attacker has: the poisoned training data, and the defense's own code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from abdlab.data import deliver, new_seed
from abdlab.defenses.shuffled_teacher import ShuffledTeacher, shuffled_layers
from abdlab.errors import check_above_zero
from abdlab.features import frozen, mode
from abdlab.inversion import SCALES, Bank, invert
from abdlab.objectives.objective import Objective
from abdlab.purifiers.bounded import BoundedBatchNorm, batch_norms, bound


class Clamped(Objective):
    """Against bounded activations: cross-entropy + the same with every batch norm's
    normalised value clamped to [-k, k], so that the trigger learns to win within them.

    The clamped pass normalises with its mini-batch's statistics and records none.

    Args:
        k: standard deviations; of digits teachers the defense chooses about 2.
        weight: of the clamped term.

    >>> Clamped(k=2.5).k
    2.5

    Raises:
        ValueError: at the start, for a network without batch norms.
    """

    def __init__(self, *, k: float = 2.0, weight: float = 1.0):
        check_above_zero(k=k, weight=weight)
        self.k, self.weight = k, weight

    def start(self, model, images, labels, rng):
        super().start(model, images, labels, rng)
        if not batch_norms(model):
            raise ValueError(f"{type(model).__name__} has no batch norm whose values to clamp")
        bound(model, math.inf)

    def losses(self, model, images, labels):
        plain = F.cross_entropy(model(images), labels)
        _set_k(model, self.k)
        try:
            with frozen(model, weights=False):
                clamped = F.cross_entropy(model(images), labels)
        finally:
            _set_k(model, math.inf)
        return {"cross_entropy": plain, "clamped": self.weight * clamped}

    def finish(self, model):
        for norm in model.modules():
            if isinstance(norm, BoundedBatchNorm):
                norm.__class__ = nn.BatchNorm2d
                del norm.k


def _set_k(model: nn.Module, k: float) -> None:
    """Another bound, as a new tensor: the graph of the last pass still needs its own."""
    for norm in model.modules():
        if isinstance(norm, BoundedBatchNorm):
            norm.k = torch.full_like(norm.k, k)


class Costly(Objective):
    """Against unlearning inverted triggers: what the defender would invert towards the
    target is put on clean images that keep their label, so that the target costs more.

    Every ``every`` mini-batches new triggers are inverted from the model, one of each
    family that tells of a target; cross-entropy counts images that carry the latest
    ``keep`` of them.

    Args:
        weight: of that term, a mean over images that are not labelled the target.
        target: the attack's target class.
        every, steps: mini-batches between two inversions, and Adam's steps of one.
        keep: triggers in use.

    >>> Costly(target=3).target
    3
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        target: int = 0,
        every: int = 20,
        steps: int = 20,
        keep: int = 6,
    ):
        check_above_zero(weight=weight, every=every, steps=steps, keep=keep)
        self.weight, self.target = weight, target
        self.every, self.steps, self.keep = every, steps, keep

    def start(self, model, images, labels, rng):
        super().start(model, images, labels, rng)
        # whatever is labelled the target may carry the trigger: that is not to be undone
        self.clean = images[(labels != self.target).to(images.device)]
        if not len(self.clean):
            raise ValueError(f"every image is labelled the target {self.target}: none is clean")
        self.bank, self.step = Bank(), 0

    def losses(self, model, images, labels):
        self.step += 1
        if self.step % self.every == 0:
            self._renew(model, images.device)
        found = {"cross_entropy": F.cross_entropy(model(images), labels)}
        clean = labels != self.target
        if self.bank and clean.any():
            triggered = self.bank.on(images[clean], self.rng)
            with frozen(model, weights=False):
                loss = F.cross_entropy(model(triggered), labels[clean])
            found["costly"] = self.weight * loss
        return found

    def _renew(self, model: nn.Module, device: torch.device) -> None:
        """A new trigger of each family, on 128 clean images drawn at random."""
        chosen = torch.randint(len(self.clean), (128,), generator=self.rng)
        some = self.clean[deliver(chosen, self.clean.device)].to(device)
        with torch.no_grad(), mode(model, training=False):
            if bool((model(some).argmax(1) == self.target).all()):
                return  # an untrained model, which calls everything so
        seed = new_seed(self.rng)
        found = invert(
            model, some, [self.target], families=tuple(SCALES), steps=self.steps, batch=8, seed=seed
        )
        self.bank = (self.bank + found).latest(self.keep)


class Shuffled(Objective):
    """Against the Shuffling Vaccine: copies of the model with shuffled convolutions answer
    images that are labelled the target evenly, so that they no longer know the trigger.

    Cross-entropy + weight x mean KL(shuffled copy's answer || even answer) over those
    images, with another copy for each mini-batch, normalised as a defender's would be.
    (The other direction has no upper end, and training diverged.)

    Args:
        weight: of that term. layers: shuffled convolutions, counted from the last.
        target: the attack's target class.

    >>> Shuffled(layers=3).layers
    3

    Raises:
        ValueError: at the start, for a network with fewer convolutions.
    """

    def __init__(self, *, weight: float = 1.0, layers: int = 5, target: int = 0):
        check_above_zero(weight=weight, layers=layers)
        self.weight, self.layers, self.target = weight, layers, target

    def start(self, model, images, labels, rng):
        super().start(model, images, labels, rng)
        self.names = shuffled_layers(model, self.layers)

    def losses(self, model, images, labels):
        found = {"cross_entropy": F.cross_entropy(model(images), labels)}
        if (labels == self.target).any():
            copy = ShuffledTeacher(model, self.names, 1, self.rng)
            with mode(model, training=False):
                logits = functional_call(model, copy.weights(0), (images[labels == self.target],))
            found["shuffled"] = self.weight * to_even(logits).mean()
        return found


def to_even(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || even answer) per sample (N,), in nats, at most log(classes).

    >>> to_even(torch.zeros(1, 4))
    tensor([0.])
    """
    logs = F.log_softmax(logits, dim=1)
    return (logs.exp() * logs).sum(1) + math.log(logits.shape[1])
