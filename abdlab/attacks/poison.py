"""Poisoning of a training set, and the triggered test set that measures the attack's
success.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abdlab.attacks.optimize import PGD
from abdlab.attacks.triggers import Trigger
from abdlab.errors import did_you_mean

#: how an attack relabels: every poisoned image to the target, or class y to y + 1
RELABEL = ("all_to_one", "all_to_all")


@dataclass(frozen=True)
class Attack:
    """One trigger and what it shall do; several of them can poison one training set
    (:func:`poison_many`).

    Attributes:
        trigger: what is put on the images.
        target: the class that a model shall predict where the trigger is (no part of an
            all-to-all attack).
        rate: poisoned share of the whole training set, in [0, 1].
        clean_label: poison images of the target class only (at most all of them) and
            keep every label; by default what the trigger's own attack does (true for
            sig and cl).
        relabel: "all_to_one" (to the target), or "all_to_all" (class y to y + 1, the
            last one to 0; BadNets, Gu et al. 2017).
        covers: share of the whole set, in [0, 1], that carries the trigger as well but
            keeps its right label. Covers make a backdoor harder to find (Qi et al.,
            ICLR 2023, "Revisiting the assumption of latent separability"); in an
            all-to-one attack they are never of the target class.
        adversary: for cl: a clean model, or a :class:`~abdlab.attacks.optimize.PGD` on one with
            a bound of its own.

    >>> str(Attack(Trigger("badnet_sq"), target=3))
    'badnet_sq -> 3'

    Raises:
        ValueError: for a share outside [0, 1], an unknown relabelling, or an all-to-all
            attack that shall keep its labels.
    """

    trigger: Trigger
    target: int = 0
    rate: float = 0.1
    clean_label: bool | None = None
    relabel: str = "all_to_one"
    covers: float = 0.0
    adversary: nn.Module | PGD | None = None

    def __post_init__(self):
        for name, value in (("poison rate", self.rate), ("share of covers", self.covers)):
            if not 0 <= value <= 1:
                raise ValueError(f"the {name} is a share in [0, 1], not {value}")
        if self.relabel not in RELABEL:
            raise ValueError(did_you_mean("relabelling", self.relabel, RELABEL))
        if self.all_to_all and self.keeps_labels:
            raise ValueError(
                f"{self.trigger} keeps its labels (clean-label), so that it cannot be all_to_all"
            )

    def __str__(self) -> str:
        return f"{self.trigger} -> {'y + 1' if self.all_to_all else self.target}"

    @property
    def all_to_all(self) -> bool:
        """Whether each class shall be predicted as the next one."""
        return self.relabel == "all_to_all"

    @property
    def keeps_labels(self) -> bool:
        """Whether it is a clean-label attack."""
        return self.trigger.clean_label if self.clean_label is None else self.clean_label

    @property
    def needs_adversary(self) -> bool:
        """Whether its poisoned images are first perturbed against a clean model."""
        return self.keeps_labels and self.trigger.adversarial

    def wanted(self, labels: Tensor, classes: int) -> Tensor:
        """The classes (N,) that a model shall predict for triggered images with these
        true labels.
        """
        return (labels + 1) % classes if self.all_to_all else torch.full_like(labels, self.target)

    def card(self) -> dict:
        """Plain values for a checkpoint's card: what is not at its default, and always
        trigger, target and rate.
        """
        more = {"relabel": self.relabel, "covers": self.covers, "clean_label": self.clean_label}
        plain = {k: v for k, v in more.items() if v != getattr(type(self), k)}
        return {"trigger": self.trigger.card(), "target": self.target, "rate": self.rate, **plain}


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set.

    Attributes:
        images: (N, C, H, W), with a trigger on those of ``mask`` and ``covers``.
        labels: (N,), those of ``mask`` as the attack relabels them.
        mask: bool (N,), which samples were poisoned.
        covers: bool (N,), which carry a trigger and keep their right label.
        which: int64 (N,), the number of the attack whose trigger a sample carries, -1
            for none.
        attacks: in that order.
    """

    images: Tensor
    labels: Tensor
    mask: Tensor
    covers: Tensor
    which: Tensor
    attacks: tuple[Attack, ...]

    @property
    def trigger(self) -> Trigger:
        """The (first) attack's trigger."""
        return self.attacks[0].trigger

    @property
    def target(self) -> int:
        """The (first) attack's target class."""
        return self.attacks[0].target

    @property
    def rate(self) -> float:
        """Share of the set that is poisoned, by all attacks together and without
        covers.
        """
        return self.mask.float().mean().item()

    def rate_of(self, attack: int) -> float:
        """Share of the set that one attack poisoned, without covers."""
        return (self.mask & (self.which == attack)).float().mean().item()


def poison(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger,
    rate: float = Attack.rate,
    target: int = Attack.target,
    seed: int = 0,
    clean_label: bool | None = Attack.clean_label,
    relabel: str = Attack.relabel,
    covers: float = Attack.covers,
    adversary: nn.Module | PGD | None = Attack.adversary,
    classes: int | None = None,
) -> Poisoned:
    """Put the trigger on a random share of the images and relabel them.

    Args:
        images: (N, C, H, W) in [0, 1]. labels: int64 (N,).
        rate, target, clean_label, relabel, covers, adversary: of the :class:`Attack`. A
            rate of 0 poisons nothing.
        seed, classes: as for :func:`poison_many`, which also says what is raised.

    >>> images, labels = torch.zeros(20, 1, 8, 8), torch.arange(20) % 10
    >>> poisoned = poison(images, labels, Trigger("badnet_sq"), rate=0.1, target=3)
    >>> poisoned.mask.sum().item(), poisoned.labels[poisoned.mask].tolist()
    (2, [3, 3])
    """
    attack = Attack(trigger, target, rate, clean_label, relabel, covers, adversary)
    return poison_many(images, labels, [attack], seed, classes)


def poison_many(
    images: Tensor,
    labels: Tensor,
    attacks: Sequence[Attack],
    seed: int = 0,
    classes: int | None = None,
) -> Poisoned:
    """Several triggers, each with its own target, on disjoint random samples of one
    training set.

    The attacks take their samples in the given order from one random permutation: first
    an attack's poisoned images, then its covers, then the next attack's.

    Args:
        images: (N, C, H, W) in [0, 1]. labels: int64 (N,).
        attacks: at least one.
        seed: of the permutation.
        classes: number of classes; by default the largest label plus one.

    Raises:
        ValueError: for a target that is no class, shares that together ask for more
            images than there are, and an attack that perturbs its images (cl) without
            an adversary.
    """
    if not attacks:
        raise ValueError("poisoning needs at least one attack")
    classes = int(labels.max()) + 1 if classes is None else classes
    for attack in attacks:
        if not 0 <= attack.target < classes:
            raise ValueError(
                f"target {attack.target} is not a class: the labels run from 0 to {classes - 1}"
            )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(
        labels.device
    )
    which = torch.full_like(labels, -1)
    mask, covers = (
        torch.zeros_like(labels, dtype=torch.bool),
        torch.zeros_like(labels, dtype=torch.bool),
    )
    out_images, out_labels = images.clone(), labels.clone()
    for i, attack in enumerate(attacks):
        free = order[which[order] < 0]
        chosen = free[labels[free] == attack.target] if attack.keeps_labels else free
        # a clean-label attack takes at most its whole class
        chosen = _first(
            chosen,
            attack.rate * len(labels),
            attack,
            "poisoned images",
            strict=not attack.keeps_labels,
        )
        mask[chosen], which[chosen] = True, i
        free = order[which[order] < 0]
        others = free if attack.all_to_all else free[labels[free] != attack.target]
        cover = _first(others, attack.covers * len(labels), attack, "covers", strict=True)
        covers[cover], which[cover] = True, i
        if len(chosen):
            out_images[chosen] = attack.trigger(_hardened(attack, images[chosen], labels[chosen]))
            out_labels[chosen] = attack.wanted(labels[chosen], classes)
        if len(cover):
            out_images[cover] = attack.trigger(images[cover])
    return Poisoned(out_images, out_labels, mask, covers, which, tuple(attacks))


def triggered_test(
    images: Tensor, labels: Tensor, trigger: Trigger | Attack, target: int = Attack.target
) -> tuple[Tensor, Tensor]:
    """The test images that show whether an attack succeeds, with the trigger on, and
    their true labels.

    These are the images whose true class is not the target, or all of them for an
    all-to-all attack. ASR is the share that a model predicts as the attack wants
    (:func:`abdlab.evaluate.attack_success`).

    Args:
        trigger: a trigger with its ``target``, or an :class:`Attack`.

    Raises:
        ValueError: when every image is of the target class.
    """
    attack = trigger if isinstance(trigger, Attack) else Attack(trigger, target)
    if attack.all_to_all:
        return attack.trigger(images), labels
    keep = labels != attack.target
    if not keep.any():
        raise ValueError(
            f"every test image is of the target class {attack.target}: ASR is not defined"
        )
    return attack.trigger(images[keep]), labels[keep]


def _first(free: Tensor, wanted: float, attack: Attack, what: str, strict: bool) -> Tensor:
    """The first so many of the free samples."""
    if strict and round(wanted) > len(free):
        raise ValueError(
            f"{attack} asks for {round(wanted)} {what}, and {len(free)} images are left for them:"
            " lower the rates or the covers"
        )
    return free[: round(wanted)]


def _hardened(attack: Attack, images: Tensor, labels: Tensor) -> Tensor:
    """The images as the attack wants them before its trigger: perturbed for cl, else as
    they are.
    """
    if not attack.needs_adversary:
        return images
    if attack.adversary is None:
        raise ValueError(
            f"{attack.trigger} perturbs the target's images against a clean model: pass adversary=,"
            " or make a run's settings ready with abdlab.prepare(run, chosen, data)"
        )
    adversary = attack.adversary if isinstance(attack.adversary, PGD) else PGD(attack.adversary)
    return adversary(images, labels)
