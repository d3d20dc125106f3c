"""What every defense is: hooks that the one distillation loop calls.

One pseudo-batch, as :func:`abdlab.distill.distill` runs it, with each hook at its place::

    start(teacher, student, ...)                  once, when the run begins
    for each pseudo-batch:
        events += before(index)                   a defense begins, ends, finds something
        optimizer, schedule = optimizer(...)      None keeps the student's
        images = source.generator(noise)
        logits = teacher(images)                  or teacher_logits(images), where it has them
        loss = source's own + synthesis_term(images, logits)     unless it holds the generator
        observe(batch)                            images and the teacher's logits, made
        for each student step:
            kd = source's KD loss per sample x sample_weights(batch)
            loss = mean(kd) + source's terms, less those dropped() + student_term(batch, logits)
    state() goes into every checkpoint, restore(state) comes out; report() into the metrics

Every hook does nothing unless a defense overrides it. Values that change while a run goes on
are :mod:`abdlab.defenses.plans`; what lets a CUDA graph hold a defense is
:class:`abdlab.graphs.Captured`. A whole defense:

>>> import torch
>>> from abdlab import ZSKT, build, distill
>>> from abdlab.losses import kl
>>> class Noise(Defense):
...     # the student also answers noisy images as the teacher answers the images
...     def __init__(self, *, weight: float = 1.0, size: float = 0.1):
...         self.weight, self.size = weight, size
...
...     def student_term(self, batch, logits):
...         noise = self.size * torch.randn(batch.images.shape, generator=self.rng)
...         answers = self.student(batch.images + noise.to(self.device))
...         return self.weight * kl(batch.logits, answers).mean()
>>> nets = build("wrn-10-1", width=4), build("wrn-10-1", width=4)
>>> source = ZSKT((3, 8, 8), pseudo_batches=2, batch_size=4, width=4)
>>> steps = list(distill(*nets, source, defenses=[Noise()], device="cpu"))
>>> sorted(steps[-1].losses)
['attention', 'generator', 'kd', 'noise']
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from abdlab.sources.source import Batch


class Defense:
    """Base class. A defense sees the teacher, the student and the source's images; never
    clean or triggered data.

    ``name`` is the class's in lower case; a row of the registry gives another one.
    """

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def start(
        self, teacher: nn.Module, student: nn.Module, device: torch.device, seed: int, length: int
    ) -> None:
        """Bind to one run of ``length`` pseudo-batches, drawing from ``seed`` alone."""
        self.teacher, self.student, self.device, self.length = teacher, student, device, length
        self.rng = torch.Generator().manual_seed(seed)

    def before(self, index: int) -> list[str]:
        """Called before pseudo-batch ``index``; returns events to report, as sentences."""
        return []

    def optimizer(self, index: int, steps_left: int) -> tuple[Optimizer, LRScheduler | None] | None:
        """A new student optimiser from pseudo-batch ``index`` on, for ``steps_left``
        student steps; None keeps the old one.
        """
        return None

    def teacher_logits(self, images: Tensor) -> Tensor | None:
        """The teacher's logits (B, classes) on a source's images, where the defense gets
        them at little cost with something that its :meth:`synthesis_term` needs; None
        leaves the pass to the source. Sources that look into the teacher do not ask.
        """
        return None

    def synthesis_term(self, images: Tensor, teacher_logits: Tensor) -> Tensor | None:
        """A scalar that the source's own networks minimise besides their loss."""
        return None

    def holds(self) -> bool:
        """Whether the generator of a source stays as it is for the next pseudo-batch;
        sources without one do not ask.
        """
        return False

    def observe(self, batch: Batch) -> None:
        """See the pseudo-batch, once, before the student steps on it. It may give
        ``batch.logits`` other values to learn from.
        """

    def sample_weights(self, batch: Batch) -> Tensor | None:
        """(B,) factors of the KD loss per sample."""
        return None

    def student_term(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """A scalar that the student minimises besides its KD loss; ``logits`` are its own
        on ``batch.images``.
        """
        return None

    def dropped(self) -> Collection[str]:
        """Names of the source's own student terms (never its KD loss) that the student is
        to learn without, in this pseudo-batch.
        """
        return ()

    def state(self) -> dict:
        """All that a resumed run needs, as nested dicts of tensors and numbers."""
        return {"rng": self.rng.get_state()}

    def restore(self, state: dict) -> None:
        """Go on from what :meth:`state` gave."""
        self.rng.set_state(state["rng"].cpu())

    def report(self) -> dict:
        """What a reader of the results must know (plain values only)."""
        return {}
