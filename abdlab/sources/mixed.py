"""Several sources in one run: each pseudo-batch comes from one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.sources.ood import OOD
from abdlab.sources.source import Batch, Source
from abdlab.sources.zskt import ZSKT

#: members of a mix and their weights, where settings name none
MEMBERS: dict[type[Source], float] = {ZSKT: 0.5, OOD: 0.5}


@dataclass(kw_only=True, eq=False, repr=False)
class Mixed(Source):
    """Each pseudo-batch is a member's: its batch, its student steps on it, its loss and
    its gradient clipping.

    Who comes when is drawn from the seed at the start: every member as often as its
    weight says (to the nearest whole number), in random order. So the schedules of a
    member's own networks last for exactly the pseudo-batches that are drawn of it.
    Defenses act on each pseudo-batch as they do on the member alone.

    Args:
        members: the sources, started by the mix.
        weights: one per member, at least 0, in proportion; by default all alike.
        pseudo_batches: length of the run; by default that of the first member alone.
        student: number of the member whose student optimiser trains the student; its
            own schedule gives way to a cosine to 0 over all student steps of the mix,
            because members can differ in student steps. Once started, the student.

    Raises:
        ValueError: for no members, or weights that are not one each.

    >>> patches = OOD((1, 8, 8), patches=40, batch_size=10)
    >>> mix = Mixed([ZSKT((1, 8, 8)), patches], weights=[1, 3], pseudo_batches=10)
    >>> mix.counts()
    [3, 7]
    """

    members: Sequence[Source] = field(kw_only=False)
    weights: Sequence[float] | None = None
    pseudo_batches: int | None = None
    student: int = 0

    def __post_init__(self):
        self.members = list(self.members)
        self.weights = (
            [1.0] * len(self.members) if self.weights is None else [float(w) for w in self.weights]
        )
        if not self.members or len(self.weights) != len(self.members):
            raise ValueError(
                f"a mix needs members, and as many weights, not {len(self.members)} members and"
                f" {len(self.weights)} weights"
            )
        if min(self.weights) < 0 or sum(self.weights) == 0:
            raise ValueError(f"weights are at least 0, and not all of them 0, not {self.weights}")
        if not 0 <= self.student < len(self.members):
            raise ValueError(
                f"student is the number of a member, 0 to {len(self.members) - 1}, not"
                f" {self.student}"
            )
        if self.pseudo_batches is None:
            self.pseudo_batches = len(self.members[0])
        if self.pseudo_batches < 1:
            raise ValueError(f"pseudo_batches must be at least 1, not {self.pseudo_batches}")
        self.first, self.position = self.student, 0

    @classmethod
    def make(cls, data, values, build):
        """Settings give the members as {name: weight}; each is built from its own
        section.
        """
        weights = cls._weights(values)
        if cls.name in weights:
            raise ValueError(f"a mix cannot be a member of itself: leave {cls.name!r} out")
        rest = {key: value for key, value in values.items() if key != "members"}
        members = [build(name) for name in weights]
        return cls(members, weights=[*weights.values()], **cls.options(data, rest))

    @classmethod
    def keys(cls):
        own = super().keys()
        return ["members", *(key for key in own if key != "weights")]

    @classmethod
    def depends_on(cls, values):
        return tuple(cls._weights(values))

    @staticmethod
    def _weights(values: Mapping[str, Any]) -> dict[str, float]:
        return values.get("members", {kind.name: weight for kind, weight in MEMBERS.items()})

    def __len__(self) -> int:
        return self.pseudo_batches

    def counts(self) -> list[int]:
        """Pseudo-batches of each member in a whole run; what rounding leaves goes to
        the largest remainders.
        """
        exact = [w / sum(self.weights) * self.pseudo_batches for w in self.weights]
        counts = [int(share) for share in exact]
        left = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[
            : self.pseudo_batches - sum(counts)
        ]
        return [count + (i in left) for i, count in enumerate(counts)]

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        order = torch.cat(
            [torch.full((count,), i, dtype=torch.int16) for i, count in enumerate(self.counts())]
        )
        self.order, self.position = order[torch.randperm(len(order), generator=self.rng)], 0
        self.turns = self.order.tolist()
        for member, drawn in zip(self.members, self.counts(), strict=True):
            member.drawn = max(drawn, 1)  # a schedule over nothing cannot be made
            member.start(
                teacher, student, device, int(torch.randint(2**62, (), generator=self.rng))
            )

    @property
    def member(self) -> Source:
        """Whose pseudo-batch the current one is; before the first one, the member that
        trains the student.
        """
        return self.members[self.turns[self.position - 1] if self.position else self.first]

    @property
    def student_steps(self) -> int:
        return self.member.student_steps

    @property
    def clip(self) -> float | None:
        return self.member.clip

    def steps_left(self, index: int) -> int:
        return sum(self.members[i].student_steps for i in self.turns[index:])

    def optimizer(self, student):
        optimizer, _ = self.members[self.first].optimizer(student)
        for group in optimizer.param_groups:  # what a schedule has left there
            group["lr"] = group.pop("initial_lr", group["lr"])
        return optimizer, CosineAnnealingLR(optimizer, self.steps_left(0))

    @property
    def captures(self) -> bool:
        return self.member.captures

    @property
    def recorded(self) -> tuple[str, ...]:
        return tuple(name for member in self.members for name in member.recorded)

    def branch(self):
        return self.members.index(self.member), self.member.branch()

    def batch(self, defenses: Sequence = ()) -> Batch:
        self.position += 1
        self.member.phases = self.phases
        batch = self.member.batch(defenses)
        self.norms = self.member.norms
        return batch

    def student_loss(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.member.student_loss(batch)

    def state(self):
        return {
            **super().state(),
            "order": self.order,
            "position": self.position,
            "members": [member.state() for member in self.members],
        }

    def restore(self, state):
        super().restore(state)
        self.order, self.position = state["order"].cpu(), state["position"]
        self.turns = self.order.tolist()
        for member, saved in zip(self.members, state["members"], strict=True):
            member.restore(saved)
