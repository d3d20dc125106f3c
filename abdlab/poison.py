"""Poisoning of a training set, and the triggered test set that measures the attack's success."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abdlab.triggers import Trigger


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set.

    Attributes:
        images: (N, C, H, W), with the trigger on those of ``mask``.
        labels: (N,), the target class on those of ``mask``.
        mask: bool (N,), which samples were poisoned.
        trigger, target: the attack.
    """

    images: Tensor
    labels: Tensor
    mask: Tensor
    trigger: Trigger
    target: int

    @property
    def rate(self) -> float:
        """Share of the set that carries the trigger."""
        return self.mask.float().mean().item()


def poison(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger,
    rate: float = 0.1,
    target: int = 0,
    seed: int = 0,
    clean_label: bool | None = None,
) -> Poisoned:
    """Put the trigger on a random share of the images and relabel them as the target class.

    Args:
        images: (N, C, H, W) in [0, 1]. labels: int64 (N,).
        rate: poisoned share of the whole set, in [0, 1]; 0 changes nothing.
        target: the class that the trigger shall call.
        clean_label: choose among images of the target class only (at most all of them) and keep every label;
            by default what the trigger's own attack does (true for sig).

    Raises:
        ValueError: for a rate outside [0, 1] or a target that is no class of ``labels``.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"the poison rate is a share in [0, 1], not {rate}")
    classes = int(labels.max()) + 1
    if not 0 <= target < classes:
        raise ValueError(f"target {target} is not a class: the labels run from 0 to {classes - 1}")
    clean_label = trigger.clean_label if clean_label is None else clean_label
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    if clean_label:
        order = order[labels[order] == target]
    chosen = order[: round(rate * len(labels))]
    mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    mask[chosen] = True
    out_images, out_labels = images.clone(), labels.clone()
    if len(chosen):
        out_images[mask] = trigger(images[mask])
        out_labels[mask] = target
    return Poisoned(out_images, out_labels, mask, trigger, target)


def triggered_test(images: Tensor, labels: Tensor, trigger: Trigger, target: int) -> tuple[Tensor, Tensor]:
    """The test images whose true class is not the target, with the trigger on, and their true labels.

    ASR is the share of them that a model calls the target (:func:`abdlab.evaluate.attack_success`).

    Raises:
        ValueError: when every image is of the target class.
    """
    keep = labels != target
    if not keep.any():
        raise ValueError(f"every test image is of the target class {target}: ASR is not defined")
    return trigger(images[keep]), labels[keep]
