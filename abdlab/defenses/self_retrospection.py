"""Self-Retrospection (Hong et al., ICML 2023, arXiv 2306.02368, section 4.2): unlearn
what a universal change can trigger.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver
from abdlab.defenses.late import Late
from abdlab.defenses.plans import Plan, planned
from abdlab.errors import one_of
from abdlab.features import frozen, mode
from abdlab.graphs import Captured
from abdlab.losses import kl
from abdlab.models import normalization
from abdlab.sources.source import Batch

#: step of the fixed-point iterations of order 2 (paper)
IMPLICIT_LR = 0.1


def inner_objective(logits: Tensor, perturbed: Tensor, delta: Tensor, penalty: float) -> Tensor:
    """-mean KL(clean || perturbed) + penalty x ||delta||^2: what the universal
    perturbation minimises; a scalar.
    """
    return penalty * delta.square().sum() - kl(logits, perturbed).mean()


def universal_delta(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    delta: Tensor,
    scale: Tensor,
    steps: int,
    lr: float,
    penalty: float,
) -> Tensor:
    """One perturbation for the whole batch, by Adam on :func:`inner_objective`.

    Args:
        model: whose answer it shall change; its weights take no gradient.
        images: (B, C, H, W). logits: the model's own on them, detached (computed once,
            not in every step).
        delta: (1, C, H, W) start, in normalised units. scale: (1, C, 1, 1), from
            normalised units to pixels (the std).
        steps, lr: of Adam, lr in normalised units. penalty: of the squared l2 norm in
            normalised units.

    Returns:
        (1, C, H, W), detached, in normalised units.
    """
    delta = delta.clone().requires_grad_()
    # the plain one counts its steps on the host, which a CUDA graph cannot
    adam = Adam([delta], lr=lr, **({"fused": True, "capturable": True} if delta.is_cuda else {}))
    for _ in range(steps):
        loss = inner_objective(logits, model(images + delta * scale), delta, penalty)
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        adam.step()
    return delta.detach()


def implicit_gradient(
    student: nn.Module,
    images: Tensor,
    delta: Tensor,
    scale: Tensor,
    penalty: float,
    step: float,
    iterations: int,
) -> tuple[Tensor, ...]:
    """The gradient that reaches the student's weights through delta's dependence on
    them (paper, eq. of section 4.2).

    delta is taken as a fixed point of gradient descent Phi(delta, w) = delta - step x d
    inner / d delta. With v = sum_i (dPhi/ddelta)^i dKL/ddelta, accumulated over
    ``iterations`` terms, it is (dPhi/dw)^T v.

    Returns:
        one tensor per trainable parameter of the student, zeros where there is no path.
    """
    weights = [p for p in student.parameters() if p.requires_grad]
    delta = delta.clone().requires_grad_()
    logits, perturbed = student(images), student(images + delta * scale)
    outer = kl(logits, perturbed).mean()
    (outer_grad,) = torch.autograd.grad(outer, [delta], retain_graph=True)
    (inner_grad,) = torch.autograd.grad(
        inner_objective(logits, perturbed, delta, penalty), [delta], create_graph=True
    )
    phi = delta - step * inner_grad
    v = outer_grad
    for _ in range(iterations - 1):
        (pushed,) = torch.autograd.grad(phi, [delta], grad_outputs=v, retain_graph=True)
        v = pushed + outer_grad
    return torch.autograd.grad(
        phi, weights, grad_outputs=v, allow_unused=True, materialize_grads=True
    )


def _in_place(buffer: Tensor | None, value: Tensor) -> Tensor:
    """The buffer, holding the value: a new one for a value of another shape, type or
    device.
    """
    if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (
        value.shape,
        value.dtype,
        value.device,
    ):
        return value.clone()
    return buffer.copy_(value)


class SelfRetrospection(Late, Captured):
    """Late in the run, the student also learns to keep its answer under the worst
    universal perturbation of the batch.

    min over S of max over delta of ``weight`` x mean KL(S(x) || S(x + delta)), with a
    fresh Adam (paper, section 4.2).

    Args:
        start: share of the run from which it acts (paper: the last ~1 %).
        weight, inner_steps: may be plans (:mod:`abdlab.defenses.plans`).
        fraction: share of the batch, in (0, 1], that carries delta.
        per: the sum over these images is divided by the number of "perturbed" ones or of
            the "batch". The official code: ``fraction=2/128, per="batch"``.
        lr: of the fresh Adam (paper: 1e-4 to 5e-4); None keeps the source's.
        inner_lr, penalty: of delta, in normalised units.
        init_std: of delta's Gaussian start; 0 is the official code's.
        perturb: whose answer delta changes: "student" (paper), "teacher" (official code).
        order: 2 adds the gradient through delta, in ``implicit_steps`` iterations.
        anchor: KL is from "student" (paper), its "detached" answer or "teacher" (ours).
        statistics: of batch norm in that pass: "batch" (official code), "running", or
            "mixed" (ours): clean and perturbed images as one batch.

    Raises:
        ValueError: for a value outside its range, or where order 2 has no meaning.

    >>> SelfRetrospection(start=0.5, inner_steps=10).first_of(80_000)
    40000
    """

    tunable = ("weight", "inner_steps")
    title = "self-retrospection"
    captures = True

    def __init__(
        self,
        *,
        start: float = 0.99,
        weight: Plan = 1.0,
        fraction: float = 1.0,
        per: str = "perturbed",
        lr: float | None = 5e-4,
        inner_steps: Plan = 10,
        inner_lr: float = 0.1,
        penalty: float = 1e-3,
        init_std: float = 0.1,
        perturb: str = "student",
        order: int = 1,
        implicit_steps: int = 5,
        anchor: str = "student",
        statistics: str = "batch",
    ):
        super().__init__(start, lr)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is a share of the batch in (0, 1], not {fraction}")
        one_of("per", per, "perturbed", "batch")
        one_of("perturb", perturb, "student", "teacher")
        one_of("anchor", anchor, "student", "detached", "teacher")
        one_of("statistics", statistics, "batch", "running", "mixed")
        one_of("order", order, 1, 2)
        if order == 2 and anchor != "student":
            raise ValueError(
                f"order 2 is the paper's gradient and needs anchor='student', not {anchor!r}"
            )
        if order == 2 and statistics == "mixed":
            raise ValueError("order 2 is the paper's gradient and needs no mixed statistics")
        if order == 2 and perturb == "teacher":
            raise ValueError(
                "order 2 needs perturb='student': a perturbation of the teacher does not depend on"
                " the student"
            )
        self.weight = planned(self, "weight", weight)
        self.inner_steps = planned(self, "inner_steps", inner_steps)
        self.fraction, self.per, self.perturb = fraction, per, perturb
        self.inner_lr, self.penalty, self.init_std = inner_lr, penalty, init_std
        self.order, self.implicit_steps = order, implicit_steps
        self.anchor, self.statistics = anchor, statistics

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.scale: Tensor | None = None
        # where delta starts, and where it ended: both stay where they are in memory
        self.initial = self.delta = None
        self.drawn = False

    def draw(self, batch: Batch):
        if self.began is None:
            return
        shape = (1, *batch.images.shape[1:])
        start = self.init_std * torch.randn(shape, generator=self.rng)
        self.initial = _in_place(self.initial, deliver(start, batch.images.device))
        self.drawn = True

    def branch(self):
        return self.began is None, self.weight, self.inner_steps

    def student_term(self, batch: Batch, logits: Tensor):
        if self.began is None:
            return None
        images = batch.images[: max(1, round(self.fraction * len(batch.images)))]
        if self.scale is None:
            std = normalization(self.teacher, images.shape[1])[1]
            self.scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
        by_batch = self.statistics != "running"
        training = self.student.training and by_batch
        with mode(self.student, training), frozen(self.student, weights=False):
            moved = self._moved(batch, images)
            if self.statistics == "mixed":
                own, perturbed = self.student(torch.cat([images, moved])).chunk(2)
            else:
                # batch statistics depend on the company, so that a part of the batch
                # needs a pass of its own
                whole = by_batch and len(images) == len(batch.images)
                own = logits if whole else self.student(images)
                perturbed = self.student(moved)
            if self.anchor != "student":
                own = own.detach() if self.anchor == "detached" else batch.logits[: len(images)]
            weight = self.weight * (len(images) / len(batch.images) if self.per == "batch" else 1)
            term = weight * kl(own, perturbed).mean()
            if self.order == 2:
                term = term + weight * self._implicit(images, self.delta)
        return term

    def _moved(self, batch: Batch, images: Tensor) -> Tensor:
        """The images, each with a new delta."""
        if not self.drawn:
            self.draw(batch)
        self.drawn = False
        self.delta = _in_place(self.delta, self._delta(batch, images))
        return images + self.delta * self.scale

    def _delta(self, batch: Batch, images: Tensor) -> Tensor:
        victim = self.student if self.perturb == "student" else self.teacher
        with frozen(victim):
            with torch.no_grad():
                own = self.perturb == "teacher"
                clean = batch.logits[: len(images)] if own else victim(images)
            settings = self.inner_steps, self.inner_lr, self.penalty
            return universal_delta(victim, images, clean, self.initial, self.scale, *settings)

    def _implicit(self, images: Tensor, delta: Tensor) -> Tensor:
        """A scalar of value 0 whose gradient is the implicit one."""
        settings = self.scale, self.penalty, IMPLICIT_LR, self.implicit_steps
        found = implicit_gradient(self.student, images, delta, *settings)
        weights = [p for p in self.student.parameters() if p.requires_grad]
        surrogate = sum((p * g.detach()).sum() for p, g in zip(weights, found, strict=True))
        return surrogate - surrogate.detach()

    def report(self):
        return {**super().report(), "order": self.order, "perturb": self.perturb}
