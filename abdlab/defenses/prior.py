"""A prior on what a generator makes: images as the teacher saw them, of every class.

After a purifier, few images of a bare adversarial generator are of the former target:
what the backdoored teacher took for that class was the trigger. The student then never
learns the class itself.
"""

from __future__ import annotations

from torch import Tensor

from abdlab.defenses.defense import Defense
from abdlab.sources.objectives import batch_norm_loss, class_balance, norm_inputs


class Prior(Defense):
    """The source's generator also makes images whose statistics are those that the
    teacher's batch norms recorded, and all classes alike.

    Adds ``batch_norm`` x the distance of the statistics (DeepInversion, Yin et al., CVPR
    2020, eq. 4) + ``balance`` x sum_c p_c log p_c of the teacher's mean prediction p
    (DAFL, Chen et al., ICCV 2019, eq. 5) to what a source's own networks minimise. Both
    are of the whole batch. Ours is their use for sources without such terms (ZSKT, DFAD),
    together with a purified teacher; a source that synthesises nothing (OOD) is left as
    it is.

    Args:
        batch_norm: weight of the statistics, 0 or more. balance: weight of the classes'
            balance, 0 or more.

    Raises:
        ValueError: for a weight below 0; on the first images, for a teacher without batch
            norms when ``batch_norm`` is above 0.

    >>> Prior(batch_norm=0.1).batch_norm
    0.1
    """

    def __init__(self, *, batch_norm: float = 0.01, balance: float = 0.5):
        if min(batch_norm, balance) < 0:
            raise ValueError(
                f"batch_norm and balance are weights of 0 or more, not {batch_norm} and {balance}"
            )
        self.batch_norm, self.balance = batch_norm, balance
        self.inputs: dict[str, Tensor] | None = None

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.inputs = None

    def teacher_logits(self, images: Tensor):
        if not self.batch_norm:
            return None
        with norm_inputs(self.teacher) as self.inputs:
            return self.teacher(images)

    def synthesis_term(self, images: Tensor, teacher_logits: Tensor):
        term = self.balance * class_balance(teacher_logits)
        if self.batch_norm:
            if self.inputs is None:  # the source looked into the teacher itself
                self.teacher_logits(images)
            term = term + self.batch_norm * batch_norm_loss(self.teacher, self.inputs)
        self.inputs = None
        return term
