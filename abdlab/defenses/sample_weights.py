"""Weights of suspicious samples in the student's loss: the Shuffling Vaccine where a source
does not synthesise (Hong et al., ICML 2023, arXiv 2306.02368, section 4.1, OOD).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: alpha of the two forms: the suspicious samples are divided by it, or ascended with it
#: (as in the official sweeps)
KD_ALPHA = {"weights": 10.0, "ascent": 0.1}


def kd_weights(suspicious: Tensor, alpha: float, ascent: bool = False) -> Tensor:
    """Factors (N,) of the student's loss per sample, whose mean over the batch is then
    taken.

    Args:
        suspicious: (N,) booleans, the phi of the paper.
        alpha: a suspicious sample's factor is 1/alpha, the others' 1 (paper: 1 - phi +
            phi / alpha), so that a number above 1 weakens suspicious samples.
        ascent: instead, the official code's mean over the others - alpha x mean over
            the suspicious. Where one of the two is empty its mean is 0 (there it is
            NaN): a batch of only suspicious samples is ascended on, alpha x its mean.

    >>> kd_weights(torch.tensor([True, False]), alpha=10.0)
    tensor([0.1000, 1.0000])
    """
    phi = suspicious.to(torch.get_default_dtype())
    if not ascent:
        return 1 - phi + phi / alpha
    others = 1 - phi
    return len(phi) * (others / others.sum().clamp_min(1) - alpha * phi / phi.sum().clamp_min(1))


class SampleWeights:
    """Weighs the samples of a run, and counts how many were suspicious.

    Args:
        alpha: see :func:`kd_weights`; None takes that of :data:`KD_ALPHA`.
        ascent: the official code's weights, not the paper's.

    Raises:
        ValueError: for an alpha of 0 or below.
    """

    def __init__(self, alpha: float | None, ascent: bool):
        if alpha is not None and alpha <= 0:
            raise ValueError(
                "kd_alpha divides, or weighs, the loss of suspicious samples and is above 0, not"
                f" {alpha}"
            )
        self.form = "ascent" if ascent else "weights"
        self.alpha = KD_ALPHA[self.form] if alpha is None else alpha
        self.count = torch.zeros(2, dtype=torch.long)  # suspicious ones, of how many

    def __call__(self, suspicious: Tensor) -> Tensor:
        """The factors (N,) of samples of which some (N,) are suspicious."""
        seen = torch.stack([suspicious.sum(), torch.tensor(len(suspicious)).to(suspicious.device)])
        self.count = self.count.to(suspicious.device) + seen
        return kd_weights(suspicious, self.alpha, self.form == "ascent")

    @property
    def share(self) -> float | None:
        """The share of all samples that were suspicious, in [0, 1]; None before the first."""
        suspicious, seen = self.count.tolist()
        return suspicious / seen if seen else None
