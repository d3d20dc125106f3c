"""What defenses share that act late in a run: a start, and a fresh optimiser."""

from __future__ import annotations

from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.defenses.defense import Defense


class Late(Defense):
    """Base class. Until it begins, a run is the same as one without it, so that both can
    share their first part.

    Args:
        start: share of the run, in [0, 1), from which it acts.
        lr: of the student's fresh Adam, cosine to 0 over the rest; None keeps the source's
            own optimiser.

    Raises:
        ValueError: for a start outside [0, 1), or a negative lr.
    """

    #: how its event calls it
    title = ""

    def __init__(self, start: float, lr: float | None):
        if not 0 <= start < 1:
            raise ValueError(f"start is a share of the run in [0, 1), not {start}")
        if lr is not None and lr < 0:
            raise ValueError(f"lr is at least 0, or None, not {lr}")
        self.start_share, self.lr = start, lr

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.first = self.first_of(length)
        self.began: int | None = None

    def first_of(self, length: int) -> int:
        """The pseudo-batch from which it acts in a run of ``length``: at least the last
        one.
        """
        return min(round(self.start_share * length), length - 1)

    def before(self, index):
        if index < self.first or self.began is not None:
            return []
        self.began = index
        return [f"{self.title or self.name}: on from pseudo-batch {index}"]

    def optimizer(self, index, steps_left):
        if index != self.began or self.lr is None:
            return None
        adam = Adam(self.student.parameters(), lr=self.lr, fused=True)
        return adam, CosineAnnealingLR(adam, steps_left)

    def state(self):
        return {**super().state(), "began": self.began}

    def restore(self, state):
        super().restore(state)
        self.began = state["began"]

    def report(self):
        return {"from_pseudo_batch": self.began}
