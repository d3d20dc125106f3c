"""Losses that several parts share, each with its reduction written out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from abdlab.features import full


def kl(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) per sample, shape (N,), in nats: sum over classes of p (log p - log
    q), p and q softmaxed logits.

    Args:
        temperature: divides both logits first; no factor T^2 is applied here.
    """
    log_p = F.log_softmax(p_logits / temperature, dim=1)
    log_q = F.log_softmax(q_logits / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def log_kl(p_logits: Tensor, q_logits: Tensor, floor: float = 1e-12) -> Tensor:
    """log10 KL(p || q) per sample in float64; KL below ``floor`` (round-off, also
    negative) counts as ``floor``.
    """
    return kl(p_logits.double(), q_logits.double()).clamp_min(floor).log10()


def attention(feature: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H*W): the channel mean of squares, l2-normalised over
    positions (Zagoruyko & Komodakis 2017).

    A map of norm under 1e-6 is divided by 1e-6: torch's default of 1e-12 lets one dead
    map send gradients to infinity.
    """
    return F.normalize(full(feature).square().mean(1).flatten(1), dim=1, eps=1e-6)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer for one pair of layers: mean over batch and positions of (a_S
    - a_T)^2; a scalar.
    """
    return _apart(attention(student), attention(teacher))


def _apart(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`attention_loss` of two maps (B, H*W)."""
    return (student - teacher).square().mean()
