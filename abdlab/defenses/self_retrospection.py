"""Self-Retrospection (Hong et al., ICML 2023, arXiv 2306.02368, section 4.2): unlearn
what a universal change can trigger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.data import deliver
from abdlab.defenses.late import Late
from abdlab.defenses.inverted_triggers import Stamps
from abdlab.defenses.plans import Plan
from abdlab.features import frozen, mode
from abdlab.losses import kl
from abdlab.models import normalization
from abdlab.sources.source import Batch


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


class SelfRetrospection(Late):
    """Late in the run, the student also learns to keep its answer under the worst
    universal perturbation of the batch.

    min over S of max over one delta per batch of ``weight`` x mean KL(S(x) || S(x +
    delta)), added to the KD loss from ``start`` on, with a fresh Adam of its own.

    Args:
        start: share of the run, in [0, 1), from which it acts (paper: the last ~1 % of
            pseudo-batches, so .99).
        weight: of the term. It and ``inner_steps`` can be plans
            (:data:`~abdlab.defenses.plans.Plan`).
        fraction: share of the batch, in (0, 1], that carries delta (at least one
            image).
        per: what the sum over these images is divided by: the number of "perturbed"
            ones, or the whole "batch". The official code perturbs 2 images of 128 and
            divides by 128: ``fraction=2/128, per="batch"``, about 1/64 of the paper's
            term.
        lr: of the student's fresh Adam, cosine to 0 over the rest (paper: 1e-4 to
            5e-4); None keeps the source's own.
        inner_steps, inner_lr: Adam steps for delta, lr in normalised units (paper: 10
            to 20 and .1).
        penalty: of ||delta||^2 in normalised units (paper: .001).
        init_std: delta starts from a Gaussian of this std in normalised units, new in
            every student step. 0 is the official code's start: a stationary point,
            where round-off decides the direction.
        perturb: "student" (paper) or "teacher" (the official code's sweeps): whose
            answer delta shall change.
        order: 1 differentiates the term only directly; 2 adds the implicit gradient
            through delta.
        implicit_steps, implicit_lr: fixed-point iterations and step of order 2 (paper:
            5 and .1).
        delta_every: student steps between new deltas; each pseudo-batch begins with a
            new one. 1 is the paper's; a larger number saves most of the time (the
            images of a pseudo-batch stay the same over its student steps).
        anchor: what the perturbed answer is drawn to: "student" is the paper's KL(S(x)
            || S(x + delta)), whose gradient also moves the clean answer; "detached"
            holds the clean answer fixed; "teacher" takes T(x) instead. The latter two
            are ours: with the first, small students on digits drift to one class for
            every input.
        statistics: batch norm of the perturbed passes normalises with the "batch" (as
            the official code) or with the student's "running" statistics (as the
            student will be used); "mixed" (ours) passes clean and perturbed images as
            one batch: one change of a whole batch also changes its statistics and is
            normalised away, which it will not be when the student is used. None records
            anything, clean or perturbed.
        shape: "additive" is the paper's delta. "stamp" (ours) takes triggers inverted
            as in Neural Cleanse (Wang et al., S&P 2019), (1 - mask) x image + mask x
            pattern: on digits delta is dense and unlike any trigger, and a student that
            resists it still obeys the trigger. inner_lr and init_std are then before a
            sigmoid, penalty is in nats per pixel of the mask, and delta_every is not
            used: every student step draws anew which image carries which stamp.
        target: the class that stamps call; None takes the one that the teacher is
            stamped into most cheaply, found in the first pseudo-batch (the report says
            which).
        stamps: so many stamps are kept, all found when it begins; an image carries one
            of them.
        stamp_every: pseudo-batches between new stamps, each from a start of its own;
            the oldest then goes.
        renewals: how many new stamps there are after the first ones, evenly over what
            is left of the run, in place of stamp_every: one setting for runs of 300 and
            of 10,000 pseudo-batches, of the same cost in both. None takes stamp_every.
        natural: a new stamp is kept only while its objective is at most this factor of
            that of the cheapest class but the target, on the teacher. A dearer one is
            no backdoor but what the target class looks like, and who unlearns that
            forgets the class. None keeps all.
        margin: stamps of the student may lie no further than so many pixels from where
            the teacher's own do: the teacher's trigger stays where it is, while a
            student that has unlearnt it is stamped with whatever else looks like the
            class. None lets them lie anywhere.
        balance: with stamps, an image of the target class counts so many times as much
            as another one, in the term and in the KD loss (both stay means of weight
            1). Stamps teach the student what is not the target; of what is, a
            pseudo-batch has few images, and fewer once the covered ones have another
            label.
        without: names of the source's student terms that end where it begins, such as
            ["attention"]: on images that carry the trigger the teacher attends to the
            trigger, and a student that copies its attention learns the backdoor again.
        cover: learn synthetic images that carry the trigger with another label. Those
            that the teacher calls the target are covered where its own inverted
            triggers lie, with the pixels of another image; where it then calls them
            something else, that is what the student learns from there on. On digits
            about 4 in 10 of the images that it calls the target are such, and no clean
            test image is taken for one.
        hold: a source's generator learns no more where it begins (ours). It is paid for
            images on which student and teacher disagree: from there on those with the
            trigger, by which the teacher would teach the backdoor again. Sources that
            invert the teacher into a pool go on.

    Raises:
        ValueError: for shares outside their ranges, order 2 with stamps or mixed
            statistics, or order 2 with the teacher perturbed: delta does not depend on
            the student there, so that the implicit gradient is zero.
    """

    tunable = ("weight", "inner_steps")

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
        implicit_lr: float = 0.1,
        delta_every: int = 1,
        anchor: str = "student",
        statistics: str = "batch",
        shape: str = "additive",
        target: int | None = None,
        stamps: int = 8,
        stamp_every: int = 4,
        renewals: int | None = None,
        natural: float | None = None,
        margin: int | None = None,
        balance: float = 1.0,
        cover: bool = False,
        without: Sequence[str] = (),
        hold: bool = False,
    ):
        if not 0 <= start < 1 or not 0 < fraction <= 1:
            raise ValueError(
                f"start is a share in [0, 1) and fraction one in (0, 1], not {start} and {fraction}"
            )
        if perturb not in ("student", "teacher") or statistics not in ("batch", "running", "mixed"):
            raise ValueError(
                "perturb is 'student' or 'teacher' and statistics 'batch', 'running' or 'mixed',"
                f" not {perturb!r} and {statistics!r}"
            )
        if shape not in ("additive", "stamp"):
            raise ValueError(f"shape is 'additive' or 'stamp', not {shape!r}")
        if min(stamps, stamp_every) < 1 or (
            shape == "stamp" and self.plan("inner_steps", inner_steps) < 1
        ):
            raise ValueError(
                f"stamps, stamp_every and their inner_steps are at least 1, not {stamps},"
                f" {stamp_every}, {inner_steps}"
            )
        if renewals is not None and renewals < 0:
            raise ValueError(f"renewals is a number of stamps, 0 or more, or None, not {renewals}")
        if margin is not None and margin < 0:
            raise ValueError(f"margin is a number of pixels, 0 or more, or None, not {margin}")
        if balance <= 0:
            raise ValueError(f"balance is a factor above 0, not {balance}")
        if natural is not None and natural <= 0:
            raise ValueError(f"natural is a factor above 0, or None, not {natural}")
        if per not in ("perturbed", "batch"):
            raise ValueError(f"per is 'perturbed' or 'batch', not {per!r}")
        if anchor not in ("student", "detached", "teacher"):
            raise ValueError(f"anchor is 'student', 'detached' or 'teacher', not {anchor!r}")
        if delta_every < 1:
            raise ValueError(
                f"delta_every counts student steps and is at least 1, not {delta_every}"
            )
        if order not in (1, 2):
            raise ValueError(f"order is 1 or 2, not {order}")
        if order == 2 and anchor != "student":
            raise ValueError(
                f"order 2 is the paper's gradient and needs anchor='student', not {anchor!r}"
            )
        if order == 2 and (shape == "stamp" or statistics == "mixed"):
            raise ValueError(
                "order 2 is the paper's gradient and needs shape='additive' and no mixed statistics"
            )
        if order == 2 and perturb == "teacher":
            raise ValueError(
                "order 2 needs perturb='student': a perturbation of the teacher does not depend on"
                " the student"
            )
        self.start_share, self.fraction, self.lr = start, fraction, lr
        self.weight, self.inner_steps = (
            self.plan("weight", weight),
            self.plan("inner_steps", inner_steps),
        )
        self.inner_lr, self.penalty, self.init_std = inner_lr, penalty, init_std
        self.perturb, self.order, self.statistics, self.per = perturb, order, statistics, per
        self.shape, self.target, self.stamps, self.stamp_every, self.renewals = (
            shape,
            target,
            stamps,
            stamp_every,
            renewals,
        )
        self.natural, self.margin, self.balance, self.cover = natural, margin, balance, cover
        self.without, self.hold = tuple(without), hold
        self.implicit_steps, self.implicit_lr, self.delta_every, self.anchor = (
            implicit_steps,
            implicit_lr,
            delta_every,
            anchor,
        )

    @property
    def name(self) -> str:
        return "sr"

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.first = self.first_of(length)
        self.began: int | None = None
        self.scale: Tensor | None = None
        self.bank = Stamps(
            self.target,
            self.stamps,
            self.inner_lr,
            self.penalty,
            self.init_std,
            self.natural,
            self.margin,
            self.rng,
        )
        self.seen = 0  # pseudo-batches since it began
        self.every = self.stamp_every
        if self.renewals is not None:
            self.every = max(1, (length - self.first) // (self.renewals + 1))
        self.initial = self.delta = (
            None  # where delta starts, and where it ended: both stay where they are in memory
        )
        self.steps, self.renews, self.drawn = 0, False, False

    def first_of(self, length: int) -> int:
        """The pseudo-batch from which it acts in a run of ``length``: at least the last
        one.
        """
        return min(round(self.start_share * length), length - 1)

    def before(self, index):
        if index < self.first or self.began is not None:
            return []
        self.began = index
        return [f"self-retrospection: on from pseudo-batch {index}"]

    def optimizer(self, index, steps_left):
        if index != self.began or self.lr is None:
            return None
        adam = Adam(self.student.parameters(), lr=self.lr, fused=True)
        return adam, CosineAnnealingLR(adam, steps_left)

    def observe(self, batch: Batch):
        self.steps = 0
        if self.began is None or self.shape != "stamp":
            return
        images = batch.images[: self._count(batch)]
        if self.seen == 0:
            self.bank.begin(
                self.teacher,
                self._victim,
                images,
                batch.logits.shape[1],
                self.inner_steps,
                self.cover,
            )
        elif self.seen % self.every == 0 and (
            self.renewals is None or self.seen // self.every <= self.renewals
        ):
            self.bank.renew(self._victim, images, self.inner_steps)
        if self.cover:
            self.bank.relabel(self.teacher, batch)
        self.seen += 1

    @property
    def captures(self):
        return self.began is None or self.shape == "additive"

    @property
    def holds(self):
        return self.hold and self.began is not None

    def draw(self, batch: Batch):
        if self.began is None or self.shape == "stamp":
            return
        self.renews, self.drawn = self.steps % self.delta_every == 0, True
        self.steps += 1
        if self.renews:
            start = self.init_std * torch.randn((1, *batch.images.shape[1:]), generator=self.rng)
            self.initial = _in_place(self.initial, deliver(start, batch.images.device))

    def branch(self):
        return self.began is None, self.weight, self.inner_steps, self.renews

    def dropped(self):
        return () if self.began is None else self.without

    def sample_weights(self, batch: Batch):
        return None if self.began is None else self._balance(batch.logits)

    def student_term(self, batch: Batch, logits: Tensor):
        if self.began is None:
            return None
        images = batch.images[: self._count(batch)]
        if self.scale is None:
            std = normalization(self.teacher, images.shape[1])[1]
            self.scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
        by_batch = self.statistics != "running"
        with (
            mode(self.student, self.student.training and by_batch),
            frozen(self.student, weights=False),
        ):
            moved = self._moved(batch, images)
            if self.statistics == "mixed":
                own, perturbed = self.student(torch.cat([images, moved])).chunk(2)
            else:
                # batch statistics depend on the company, so that a part of the batch
                # needs a pass of its own
                own = (
                    logits
                    if by_batch and len(images) == len(batch.images)
                    else self.student(images)
                )
                perturbed = self.student(moved)
            if self.anchor != "student":
                own = own.detach() if self.anchor == "detached" else batch.logits[: len(images)]
            weight = self.weight * (len(images) / len(batch.images) if self.per == "batch" else 1)
            balance, each = self._balance(batch.logits[: len(images)]), kl(own, perturbed)
            term = weight * (each if balance is None else balance * each).mean()
            if self.order == 2:
                term = term + weight * self._implicit(images, self.delta)
        return term

    @property
    def _victim(self) -> nn.Module:
        """Whose answer the perturbation shall change."""
        return self.student if self.perturb == "student" else self.teacher

    def _balance(self, logits: Tensor) -> Tensor | None:
        """(B,) weights of mean 1 for images with these logits of the teacher; None
        where all count alike.
        """
        if self.shape != "stamp" or self.balance == 1:
            return None
        weights = torch.where(logits.argmax(1) == self.bank.target, self.balance, 1.0)
        return weights / weights.mean()

    def _count(self, batch: Batch) -> int:
        return max(1, round(self.fraction * len(batch.images)))

    def _moved(self, batch: Batch, images: Tensor) -> Tensor:
        """The images, each changed by delta or by one of the stamps."""
        if self.shape == "stamp":
            return self.bank.on(images)
        if not self.drawn:
            self.draw(batch)
        self.drawn = False
        if self.renews:
            self.delta = _in_place(self.delta, self._delta(batch, images))
        return images + self.delta * self.scale

    def _delta(self, batch: Batch, images: Tensor) -> Tensor:
        start, victim = self.initial, self._victim
        with frozen(victim):
            with torch.no_grad():
                clean = batch.logits[: len(images)] if victim is self.teacher else victim(images)
            return universal_delta(
                victim,
                images,
                clean,
                start,
                self.scale,
                self.inner_steps,
                self.inner_lr,
                self.penalty,
            )

    def _implicit(self, images: Tensor, delta: Tensor) -> Tensor:
        """A scalar of value 0 whose gradient is the implicit one."""
        found = implicit_gradient(
            self.student,
            images,
            delta,
            self.scale,
            self.penalty,
            self.implicit_lr,
            self.implicit_steps,
        )
        weights = [p for p in self.student.parameters() if p.requires_grad]
        surrogate = sum((p * g.detach()).sum() for p, g in zip(weights, found, strict=True))
        return surrogate - surrogate.detach()

    def state(self):
        return {
            **super().state(),
            "began": self.began,
            "stamps": self.bank.state(),
            "seen": self.seen,
        }

    def restore(self, state):
        super().restore(state)
        self.began = state["began"]
        if "stamps" in state:  # not in older checkpoints
            self.bank.restore(state["stamps"], self.device)
            self.seen = state["seen"]

    def report(self):
        report = {"from_pseudo_batch": self.began, "order": self.order, "perturb": self.perturb}
        return {**report, **self.bank.report()} if self.shape == "stamp" else report
