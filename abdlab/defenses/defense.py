"""What every defence is: hooks that the one distillation loop calls. Each does nothing
unless a defence overrides it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Hashable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from abdlab.defenses.plans import Plan, steps_of
from abdlab.errors import check_keys
from abdlab.sources.source import Batch


class Defense:
    """Base class. A defence sees the teacher, the student and the source's images;
    never clean or triggered data.
    """

    #: attributes that may change between pseudo-batches; each takes a :data:`Plan`
    tunable: tuple[str, ...] = ()
    #: from here on its :meth:`synthesis_term` and :meth:`student_term` may be captured
    #: as CUDA graphs: they draw nothing (see :meth:`draw`), ask the device nothing, and
    #: decide by :meth:`branch` alone
    captures: bool = False
    #: whether the generator of a source stays as it is for the next pseudo-batch;
    #: sources without one do not ask
    holds: bool = False

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def start(
        self, teacher: nn.Module, student: nn.Module, device: torch.device, seed: int, length: int
    ) -> None:
        """Bind to one run of ``length`` pseudo-batches, drawing from ``seed`` alone."""
        self.teacher, self.student, self.device, self.length = teacher, student, device, length
        self.rng = torch.Generator().manual_seed(seed)

    def plan(self, name: str, value: Plan) -> float:
        """Keep a tunable attribute's plan, to be followed; returns the value that it
        begins with.

        Raises:
            ValueError: for a plan that does not begin at 0 and go up.
        """
        steps = steps_of(value)
        starts = [step[0] if len(step) == 2 else None for step in steps]
        if (
            not starts
            or None in starts
            or starts[0] != 0
            or any(b <= a for a, b in itertools.pairwise(starts))
        ):
            raise ValueError(
                f"{name} is a number, or a plan [[0, number], [pseudo-batch, number], ...] that"
                f" goes up, not {value!r}"
            )
        self._plans = {**self.plans, name: steps}
        return steps[0][1]

    @property
    def plans(self) -> dict[str, list[tuple[int, float]]]:
        """What the tunable attributes were and will be: name -> (from that pseudo-batch
        on, value), in that order.
        """
        return getattr(self, "_plans", {})

    @property
    def _waiting(self) -> deque:
        """Changes that were asked for; a deque, so that one thread can ask while
        another one trains.
        """
        return self.__dict__.setdefault("_tuned", deque())

    def tune(self, **values: float) -> None:
        """Change tunable attributes from the next pseudo-batch on; its Step reports
        that as an event. Any thread may call it.

        Raises:
            ValueError: for an attribute that is not tunable, with a "did you mean".
        """
        check_keys(f"tunable setting of {self.name}", values, self.tunable)
        self._waiting.extend(values.items())

    def follow(self, index: int) -> list[str]:
        """Give the tunable attributes their values for pseudo-batch ``index``; returns
        what changes there, as sentences.
        """
        asked, events = {}, []
        while self._waiting:
            name, value = self._waiting.popleft()
            asked[name] = value
        for name, value in asked.items():
            if value != getattr(self, name):  # what was asked last holds for the rest of the run
                past = [
                    step
                    for step in self.plans.get(name, [(0, getattr(self, name))])
                    if step[0] < index
                ]
                self._plans = {**self.plans, name: [*past, (index, value)]}
        for name, steps in self.plans.items():
            if len(steps) == 1 and name not in asked:
                continue  # an attribute without a plan stays a plain one
            was = [value for since, value in steps if since < index] or [getattr(self, name)]
            value = [value for since, value in steps if since <= index][-1]
            if value != was[-1]:
                events.append(
                    f"{self.name}: {name} {was[-1]:g} -> {value:g} from pseudo-batch {index} on"
                )
            setattr(self, name, value)
        return events

    def before(self, index: int) -> list[str]:
        """Called before pseudo-batch ``index``; returns events to report, as sentences."""
        return []

    def optimizer(self, index: int, steps_left: int) -> tuple[Optimizer, LRScheduler | None] | None:
        """A new student optimiser from pseudo-batch ``index`` on, for ``steps_left``
        student steps; None keeps the old one.
        """
        return None

    def teacher_logits(self, images: Tensor) -> Tensor | None:
        """The teacher's logits (B, classes) on a source's images, where the defence
        gets them at little cost with something that its :meth:`synthesis_term` needs;
        None leaves the pass to the source. Sources that look into the teacher do not
        ask."""
        return None

    def synthesis_term(self, images: Tensor, teacher_logits: Tensor) -> Tensor | None:
        """A scalar that the source's own networks minimise besides their loss."""
        return None

    def observe(self, batch: Batch) -> None:
        """See the pseudo-batch, once, before the student steps on it. It may give
        ``batch.logits`` other values to learn from.
        """

    def sample_weights(self, batch: Batch) -> Tensor | None:
        """(B,) factors of the KD loss per sample."""
        return None

    def draw(self, batch: Batch) -> None:
        """Called before each student step: draw the random numbers of its
        :meth:`student_term`, into tensors that stay where they are.
        """

    def branch(self) -> Hashable:
        """All that its terms decide by in Python, as they are about to be computed, the
        batch's shapes aside.
        """
        return None

    def student_term(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """A scalar that the student minimises besides its KD loss; ``logits`` are its
        own on ``batch.images``.
        """
        return None

    def dropped(self) -> Collection[str]:
        """Names of the source's own student terms (never its KD loss) that the student
        is to learn without, in this pseudo-batch.
        """
        return ()

    def state(self) -> dict:
        """All that a resumed run needs, as nested dicts of tensors and numbers."""
        return {"rng": self.rng.get_state()}

    def restore(self, state: dict) -> None:
        self.rng.set_state(state["rng"].cpu())

    def report(self) -> dict:
        """What a reader of the results must know (plain values only)."""
        return {}
