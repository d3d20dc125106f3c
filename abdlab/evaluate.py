"""ACC, ASR, agreement and suspicion scores: numbers about a model, in eval mode, without gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abdlab.features import mode
from abdlab.poison import triggered_test
from abdlab.triggers import Trigger


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch: int = 1000) -> Tensor:
    """Logits (N, classes) in eval mode, ``batch`` images at a time; the model's own mode is restored."""
    with mode(model, training=False):
        return torch.cat([model(part) for part in images.split(batch)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """ACC: share of the images, in [0, 1], whose label the model predicts."""
    return (predict(model, images).argmax(1) == labels).float().mean().item()


def attack_success(model: nn.Module, triggered: Tensor, target: int) -> float:
    """ASR: share, in [0, 1], of triggered images of *other* classes that the model calls ``target``.

    Pass what :func:`abdlab.poison.triggered_test` returns, which leaves the target's own images out.
    """
    return (predict(model, triggered).argmax(1) == target).float().mean().item()


def agreement(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Share of the images, in [0, 1], on which both models predict the same class."""
    return (predict(model, images).argmax(1) == predict(other, images).argmax(1)).float().mean().item()


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) per sample, shape (N,), in nats: sum over classes of p (log p - log q), p and q softmaxed logits.

    Args:
        temperature: divides both logits first; no factor T^2 is applied here.
    """
    log_p = F.log_softmax(p_logits / temperature, dim=1)
    log_q = F.log_softmax(q_logits / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def log_kl(p_logits: Tensor, q_logits: Tensor, floor: float = 1e-12) -> Tensor:
    """log10 KL(p || q) per sample in float64; KL below ``floor`` (round-off, also negative) counts as ``floor``."""
    return kl(p_logits.double(), q_logits.double()).clamp_min(floor).log10()


@dataclass(frozen=True)
class Exam:
    """What a model is measured with: call it on a model for ``{"acc": ..., "asr": ...}``, shares in [0, 1].

    A training loop never looks inside; it hands the numbers on.
    """

    images: Tensor
    labels: Tensor
    triggered: Tensor | None = None
    target: int | None = None

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, trigger: Trigger | None = None, target: int = 0) -> Exam:
        """From clean test images, and the trigger when ASR is wanted too."""
        if trigger is None:
            return cls(images, labels)
        return cls(images, labels, triggered_test(images, labels, trigger, target)[0], target)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        found = {"acc": accuracy(model, self.images, self.labels)}
        if self.triggered is not None:
            found["asr"] = attack_success(model, self.triggered, self.target)
        return found
