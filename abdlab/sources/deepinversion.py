"""DeepInversion (Yin et al., CVPR 2020, arXiv 1912.08795): pixels are changed until the
teacher takes them for its training data.

The paper makes 1,000 batches, in its adaptive form one every 50 student steps; as
256,000 images of 3x32x32 the pool takes 786 MB. The student is in eval mode while
images are made.

Deviations: the competition is the paper's divergence, in nats (the code turns its KLs
round and clamps probabilities to [.01, .99]); images are kept inside [0, 1] as in the
code for ImageNet; the batch of the lowest loss is kept (the code means to, but goes on
changing it in place); the student's SGD is CMI's, as the paper's is not published.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.features import frozen, mode
from abdlab.models import normalization
from abdlab.sources.objectives import total_variation
from abdlab.sources.pooled import Pooled


def jensen_shannon(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; a
    scalar in [0, log 2] nats.

    Args:
        temperature: divides both logits (B, classes) first.
    """
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (p_logits, q_logits))
    entropy = lambda x: torch.special.entr(x).sum(1)  # noqa: E731
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).mean()


class _Pixels(nn.Module):
    """Images as parameters, in normalised units; each pass first brings them back to
    what lies in [0, 1].
    """

    def __init__(self, start: Tensor, mean: Tensor, std: Tensor):
        super().__init__()
        self.values, self.mean, self.std = nn.Parameter(start), mean, std

    def forward(self) -> Tensor:
        with torch.no_grad():
            self.values.copy_(self.values.clamp(-self.mean / self.std, (1 - self.mean) / self.std))
        return self.values * self.std + self.mean


@dataclass(kw_only=True, eq=False, repr=False)
class DeepInversion(Pooled):
    """Per round Adam changes the pixels of one batch, from Gaussian noise on; the batch
    joins the pool and the student learns from the pool.

    Their loss: ``one_hot`` x cross-entropy with random targets + ``batch_norm`` x the
    batch-norm statistics loss + ``tv`` x total variation + ``l2`` x their norm, the
    last two in normalised units. With ``compete`` (adaptive DeepInversion) +
    compete x (1 - :func:`jensen_shannon`): images on which both differ. The
    networks see the batch rolled by up to ``jitter`` pixels and, with ``flip``,
    mirrored at random, anew in each step.

    Args:
        shape, rounds, synthesis_steps, kd_steps, synthesis_batch, batch_size, pool, lr,
            temperature, batch_norm, one_hot, flip: see
            :class:`~abdlab.sources.pooled.Pooled`.
        shift: in pixels, only for what the student learns from.
        pixel_lr: Adam, in normalised units (those of the teacher's own
            :class:`~abdlab.models.Normalize`, or .5 and .25).
        tv: weight of total variation.
        compete: weight of the competition (paper: 0, adaptive 10).

    Deviations, and what the defaults cost, stand at the top of the file.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> sizes = dict(rounds=1, synthesis_steps=2, kd_steps=2, synthesis_batch=4)
    >>> steps = list(distill(teacher, student, DeepInversion((1, 8, 8), **sizes)))
    >>> sorted(steps[-1].losses)
    ['batch_norm', 'kd', 'l2', 'one_hot', 'tv']
    """

    #: weight of the batch's norm, temperature of both logits in the competition, and
    #: pixels of rolling: what leaves the image on one side comes in on the other
    l2, compete_temperature, jitter = 3e-8, 3.0, 2

    rounds: int = 1000
    synthesis_steps: int = 2000
    kd_steps: int = 50
    synthesis_batch: int = 256
    batch_size: int = 256
    lr: float = 0.1
    temperature: float = 3.0
    pixel_lr: float = 0.1
    batch_norm: float = 10.0
    one_hot: float = 1.0
    tv: float = 2.5e-5
    compete: float = 0.0
    shift: int = 4
    flip: bool = True

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        self.mean, self.std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1)
            for v in normalization(teacher, self.shape[0])
        )

    def begin(self):
        start = deliver(
            torch.randn(self.synthesis_batch, *self.shape, generator=self.rng), self.device
        )
        maker = _Pixels(start, self.mean, self.std)
        return maker, [Adam(maker.parameters(), lr=self.pixel_lr, fused=True)]

    def terms(self, images, targets):
        view = self._shaken(images)
        logits, _, losses = self.inversion(view, targets)
        values = (images - self.mean) / self.std
        losses |= {"tv": self.tv * total_variation(values), "l2": self.l2 * values.norm()}
        if self.compete:
            with mode(self.student, training=False), frozen(self.student):
                apart = jensen_shannon(logits, self.student(view), self.compete_temperature)
            losses["compete"] = self.compete * (1 - apart)
        return view, logits, losses, None

    def _shaken(self, images: Tensor) -> Tensor:
        """The whole batch rolled by one random offset and, half of the times, mirrored."""
        down, right = torch.randint(
            -self.jitter, self.jitter + 1, (2,), generator=self.rng
        ).tolist()
        view = images.roll((down, right), dims=(2, 3))
        mirrored = self.flip and torch.rand((), generator=self.rng) < 0.5
        return view.flip(3) if mirrored else view
