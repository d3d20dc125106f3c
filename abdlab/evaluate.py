"""ACC, ASR, robust accuracy, agreement and suspicion scores: numbers about a model, in eval mode,
without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from abdlab.attacks.poison import Attack, triggered_test
from abdlab.attacks.triggers import Trigger
from abdlab.features import mode


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch: int = 1000) -> Tensor:
    """Logits (N, classes) in eval mode, ``batch`` images at a time; the model's own
    mode is restored.
    """
    with mode(model, training=False):
        return torch.cat([model(part) for part in images.split(batch)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """ACC: share of the images, in [0, 1], whose label the model predicts."""
    return (predict(model, images).argmax(1) == labels).float().mean().item()


def attack_success(model: nn.Module, triggered: Tensor, target: int | Tensor) -> float:
    """ASR: share, in [0, 1], of triggered images that the model calls what the attack
    wants.

    Args:
        triggered: what :func:`abdlab.attacks.poison.triggered_test` returns, which leaves the
            target's own images out.
        target: the class, or one class per image (N,) for an all-to-all attack.
    """
    return (predict(model, triggered).argmax(1) == target).float().mean().item()


def agreement(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Share of the images, in [0, 1], on which both models predict the same class."""
    return (
        (predict(model, images).argmax(1) == predict(other, images).argmax(1)).float().mean().item()
    )


@dataclass(frozen=True)
class Exam:
    """What a model is measured with: call it on a model for ``{"acc": ..., "asr":
    ...}``, shares in [0, 1].

    Without labelled images nothing can be known, and it says {"acc": None}. With
    several attacks "asr" is their mean, and each has its own ("asr/badnet_sq"; a
    second one of that name is "asr/badnet_sq-2"). A training loop never looks inside;
    it hands the numbers on.

    Attributes:
        images, labels: clean test images (N, C, H, W) and their classes (N,).
        attacks: name -> triggered images, and the class (or classes, one per image)
            that they shall be called.
        true: name of an attack -> the true classes (N,) of its triggered images, for
            :meth:`details`.
    """

    images: Tensor
    labels: Tensor
    attacks: dict[str, tuple[Tensor, int | Tensor]] = field(default_factory=dict)
    true: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        images: Tensor,
        labels: Tensor,
        trigger: Trigger | Attack | Sequence[Attack] | None = None,
        target: int = Attack.target,
        classes: int | None = None,
    ) -> Exam:
        """From clean test images, and what attacks the model when ASR is wanted too.

        Args:
            trigger: a trigger with its ``target``, an attack, or several.
            classes: how many there are, for all-to-all attacks; by default the largest
                label plus one.
        """
        if isinstance(trigger, Trigger):
            trigger = Attack(trigger, target)
        if len(labels) == 0:
            return cls(images, labels)
        classes = int(labels.max()) + 1 if classes is None else classes
        found, classes_of = {}, {}
        for attack in [trigger] if isinstance(trigger, Attack) else trigger or ():
            same = sum(name.partition("-")[0] == str(attack.trigger) for name in found)
            triggered, true = triggered_test(images, labels, attack)
            wanted = attack.wanted(true, classes) if attack.all_to_all else attack.target
            name = f"{attack.trigger}-{same + 1}" if same else str(attack.trigger)
            found[name], classes_of[name] = (triggered, wanted), true
        return cls(images, labels, found, classes_of)

    @property
    def triggered(self) -> Tensor | None:
        """The (first) attack's triggered images."""
        return next(iter(self.attacks.values()))[0] if self.attacks else None

    @property
    def target(self) -> int | Tensor | None:
        """What the (first) attack wants them to be called."""
        return next(iter(self.attacks.values()))[1] if self.attacks else None

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        if len(self.labels) == 0:
            return {"acc": None}
        found = {"acc": accuracy(model, self.images, self.labels)}
        each = {name: attack_success(model, *attack) for name, attack in self.attacks.items()}
        if each:
            found["asr"] = sum(each.values()) / len(each)
        return {
            **found,
            **({f"asr/{name}": asr for name, asr in each.items()} if len(each) > 1 else {}),
        }

    def details(self, model: nn.Module, classes: int) -> Details | None:
        """What a finished model answers, class by class; None without labelled images.

        Args:
            classes: how many the model tells apart.
        """
        if len(self.labels) == 0:
            return None
        answers = predict(model, self.images).argmax(1)
        triggered = {
            name: confusion(predict(model, self.attacks[name][0]).argmax(1), true, classes)
            for name, true in self.true.items()
        }
        return Details(confusion(answers, self.labels, classes), triggered)


@dataclass(frozen=True)
class Details:
    """What a model answers, class by class: counts, of true classes (rows) by predicted
    ones (columns), int64 (classes, classes).

    Attributes:
        clean: of the clean test images.
        triggered: name of an attack -> of its triggered images.

    >>> both = Details(torch.tensor([[3, 1], [0, 2]]), {"sig": torch.tensor([[0, 0], [3, 1]])})
    >>> both.per_class, both.robust
    ([0.75, 1.0], {'robust': 0.25})
    """

    clean: Tensor
    triggered: dict[str, Tensor]

    @property
    def per_class(self) -> list[float | None]:
        """ACC of each class, a share in [0, 1]; None of a class without test images."""
        right, count = self.clean.diagonal().tolist(), self.clean.sum(1).tolist()
        return [r / n if n else None for r, n in zip(right, count, strict=True)]

    @property
    def robust(self) -> dict[str, float]:
        """Robust accuracy: share of the triggered images, in [0, 1], that are given
        their true class. It is at most 1 - ASR. Of several attacks each, and "robust",
        their mean; empty where there is no trigger.
        """
        each = {k: (c.diagonal().sum() / c.sum()).item() for k, c in self.triggered.items()}
        found = {"robust": sum(each.values()) / len(each)} if each else {}
        return found | ({f"robust/{k}": v for k, v in each.items()} if len(each) > 1 else {})

    def card(self) -> dict:
        """Plain values, as a run keeps them."""
        triggered = {name: counts.tolist() for name, counts in self.triggered.items()}
        return {"clean": self.clean.tolist(), "triggered": triggered}


def confusion(answers: Tensor, true: Tensor, classes: int) -> Tensor:
    """Counts of true classes (rows) by predicted ones (columns), int64 (classes,
    classes), on the CPU.

    >>> confusion(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    places = (true * classes + answers).cpu()
    return torch.bincount(places, minlength=classes**2).reshape(classes, classes)


def trigger_size(images: Tensor, trigger: Trigger) -> dict[str, float]:
    """How much a trigger changes images, each a mean over the images (N, C, H, W).

    Returns:
        l0: share of pixels, in [0, 1], that change in any channel. l2: norm of the
            change, in [0, 1] units.
        linf: its largest absolute value. ssim: structural similarity, 1 for no change
            (scikit-image's; Wang et al. 2004), with
        windows of 7x7 pixels, or the largest odd size that fits: images have at least
        3x3 pixels.
    """
    from skimage.metrics import structural_similarity

    triggered = trigger(images)
    change = (triggered - images).abs().flatten(2)
    window = min(7, (min(images.shape[-2:]) - 1) // 2 * 2 + 1)
    similar = [
        structural_similarity(a, b, data_range=1.0, channel_axis=0, win_size=window)
        for a, b in zip(
            images.cpu().double().numpy(), triggered.cpu().double().numpy(), strict=True
        )
    ]
    return {
        "l0": (change.amax(1) > 1e-6).float().mean().item(),  # round-off is no change
        "l2": change.flatten(1).norm(dim=1).mean().item(),
        "linf": change.flatten(1).amax(1).mean().item(),
        "ssim": sum(map(float, similar)) / len(similar),
    }
