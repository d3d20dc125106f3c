"""What every source of a student's inputs is: it makes batches, and says how the
student learns from one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from abdlab.graphs import Phases


@dataclass
class Batch:
    """One pseudo-batch: what the student sees in ``student_steps`` steps.

    Attributes:
        images: (B, C, H, W), detached; synthetic ones may leave [0, 1].
        logits: the teacher's (B, classes), detached.
        features: what the source compares of the teacher's layers (ZSKT: attention
            maps), by layer name, detached.
        labels: (B,), only for sources with real data.
        losses: detached scalars to report (the generator's, say).
        synthesised: the source made the images, and the defences' ``synthesis_term``
            had its say in that. False where they are found (patches of a photograph,
            real data), so that a defence can only weigh them.
    """

    images: Tensor
    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    synthesised: bool = True


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width) as a tuple; ValueError when it is none."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"shape is (channels, height, width), for example (3, 32, 32), not {tuple(shape)}"
        )
    return tuple(shape)


class Source:
    """Base class. ``len(source)`` is the run's length in pseudo-batches (one
    :class:`Step` each).

    A source holds settings until :meth:`start` binds it to one run; then it holds that
    run's networks too, so that a source serves one run at a time.
    """

    #: student steps on each pseudo-batch
    student_steps: int = 1
    #: the student's gradient is clipped to this norm; None leaves it
    clip: float | None = None
    #: pseudo-batches that a run takes of it, where that is not its own length: it is a
    #: member of a mix
    drawn: int | None = None
    #: its :meth:`student_loss` may be captured as a CUDA graph: it draws nothing, asks
    #: the device nothing, and decides by :meth:`branch` alone
    captures: bool = False
    #: names of the student's layers that :meth:`student_loss` records, once it is
    #: started
    recorded: tuple[str, ...] = ()
    #: the run's pieces; :func:`abdlab.distill.distill` hands others in where they are
    #: CUDA graphs
    phases: Phases = Phases()

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def horizon(self) -> int:
        """How many pseudo-batches this run takes of it: what the schedules of the
        source's own networks must last for.
        """
        return len(self) if self.drawn is None else self.drawn

    def steps_left(self, index: int) -> int:
        """Student steps from pseudo-batch ``index`` (0 is the first) to the run's end."""
        return (len(self) - index) * self.student_steps

    def start(
        self, teacher: nn.Module, student: nn.Module, device: torch.device, seed: int
    ) -> None:
        """Bind to one run and make what it needs (generator, optimisers), drawing from
        ``seed`` alone.
        """
        self.teacher, self.student, self.device = teacher, student, device
        self.rng = torch.Generator().manual_seed(seed)
        #: norms of its own networks' gradients, by the names of the losses: what
        #: :func:`take_step` returned last
        self.norms: dict[str, Tensor] = {}

    def branch(self) -> Hashable:
        """All that :meth:`student_loss` decides by in Python, the batch's shapes aside."""
        return None

    def optimizer(self, student: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
        """The student's optimiser and its schedule, which steps once per student step."""
        raise NotImplementedError

    def batch(self, defenses: Sequence[Any]) -> Batch:
        """The next pseudo-batch; the source's own networks learn here, with each
        defence's ``synthesis_term`` added.
        """
        raise NotImplementedError

    def student_loss(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(student's logits, KD loss per sample (B,), further named loss terms as
        scalars).
        """
        raise NotImplementedError

    def state(self) -> dict:
        """All that a resumed run needs, as nested dicts of tensors and numbers."""
        return {"rng": self.rng.get_state()}

    def restore(self, state: dict) -> None:
        self.rng.set_state(state["rng"].cpu())
