"""What every defence is: hooks that the one distillation loop calls. Each does nothing unless a defence overrides it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from abdlab.sources.source import Batch


class Defense:
    """Base class. A defence sees the teacher, the student and the source's images; never clean or triggered data."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def start(self, teacher: nn.Module, student: nn.Module, device: torch.device, seed: int, length: int) -> None:
        """Bind to one run of ``length`` pseudo-batches, drawing from ``seed`` alone."""
        self.teacher, self.student, self.device, self.length = teacher, student, device, length
        self.rng = torch.Generator().manual_seed(seed)

    def before(self, index: int) -> list[str]:
        """Called before pseudo-batch ``index``; returns events to report, as sentences."""
        return []

    def optimizer(self, index: int, steps_left: int) -> tuple[Optimizer, LRScheduler | None] | None:
        """A new student optimiser from pseudo-batch ``index`` on, for ``steps_left`` student steps; None keeps the old one."""
        return None

    def synthesis_term(self, images: Tensor, teacher_logits: Tensor) -> Tensor | None:
        """A scalar that the source's own networks minimise besides their loss."""
        return None

    def observe(self, batch: Batch) -> None:
        """See the pseudo-batch, once, before the student steps on it."""

    def sample_weights(self, batch: Batch) -> Tensor | None:
        """(B,) factors of the KD loss per sample."""
        return None

    def student_term(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """A scalar that the student minimises besides its KD loss; ``logits`` are its own on ``batch.images``."""
        return None

    def state(self) -> dict:
        """All that a resumed run needs, as nested dicts of tensors and numbers."""
        return {"rng": self.rng.get_state()}

    def restore(self, state: dict) -> None:
        self.rng.set_state(state["rng"].cpu())

    def report(self) -> dict:
        """What a reader of the results must know (plain values only)."""
        return {}
