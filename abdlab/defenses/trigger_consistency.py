"""Trigger consistency: from the first step the student answers images that carry the
teacher's own inverted triggers as the teacher answers them without.

After SKT (ICCV 2025, "Escaping DOV"), which draws its perturbations from real images
and asks for one batch in twenty; ours come from synthetic images and count in every
step. The teacher teaches clean images only: its answers to triggers are never asked.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from abdlab.data import new_seed
from abdlab.defenses.defense import Defense
from abdlab.defenses.plans import Plan, planned
from abdlab.errors import one_of
from abdlab.features import frozen, mode
from abdlab.inversion import Bank, invert
from abdlab.losses import kl
from abdlab.purifiers import PURIFIERS, Purifier, Unlearn, purify, rebuild, synthetic_pool
from abdlab.sources.source import Batch


def suspicious(logits: Tensor, cleaned: Tensor, targets: Sequence[int]) -> Tensor:
    """(B,) booleans: the images that the teacher (``logits``) takes for one of the
    targets and the cleaned teacher for something else.

    >>> suspicious(torch.eye(2)[[0, 0, 1]], torch.eye(2)[[0, 1, 0]], [0])
    tensor([False,  True, False])
    """
    wanted = torch.as_tensor(list(targets), dtype=torch.long, device=logits.device)
    before, after = logits.argmax(1), cleaned.argmax(1)
    return torch.isin(before, wanted) & (before != after)


class TriggerConsistency(Defense):
    """From the first step, the student answers images that carry the teacher's inverted
    triggers as the teacher answers them without.

    ``weight`` x mean KL(T(x) || S(A(x))) over the images x that the teacher predicts as no
    target, A drawn from a bank of triggers. Images of a target that a purified teacher
    predicts as something else are left out of KD. The first pseudo-batch makes pool,
    targets, triggers and purified teacher (10 to 40 seconds on digits); a checkpoint keeps
    them. Where no class is suspicious it does nothing, and its report says so.

    Args:
        weight: may be a plan.
        purifiers: names or made ones; "unlearn" among them finds targets and triggers.
        images: synthetic ones that all of this is done on.
        filter: leave suspicious images out.
        cleaned: the purified teacher only filters, or also "teach"es: its answers replace
            the teacher's.
        renew_every: pseudo-batches between new triggers, inverted on the student.
        size: triggers kept at most.
        without: the source's student terms that end.

    Raises:
        ValueError: for a value outside its range, or purifiers without "unlearn".

    >>> TriggerConsistency(weight=0.5, purifiers=["unlearn"]).dropped()
    ()
    """

    tunable = ("weight",)

    def __init__(
        self,
        *,
        weight: Plan = 1.0,
        purifiers: Sequence[str | Purifier] = ("unlearn", "bounded"),
        images: int = 384,
        filter: bool = True,
        cleaned: str = "filter",
        renew_every: int | None = None,
        size: int = 32,
        without: Sequence[str] = ("attention",),
    ):
        for name in (p for p in purifiers if isinstance(p, str)):
            PURIFIERS.find(name)
        if not any(p == "unlearn" or isinstance(p, Unlearn) for p in purifiers):
            raise ValueError(
                f"purifiers need 'unlearn' among them, which finds the targets, not {purifiers}"
            )
        one_of("cleaned", cleaned, "filter", "teach")
        if min(size, images, 1 if renew_every is None else renew_every) < 1:
            raise ValueError(
                "size, images and renew_every are at least 1, not"
                f" {size}, {images} and {renew_every}"
            )
        self.weight = planned(self, "weight", weight)
        self.purifiers, self.images = tuple(purifiers), images
        self.filter, self.cleaned = filter, cleaned
        self.renew_every, self.size, self.without = renew_every, size, tuple(without)
        self.given: tuple[nn.Module, Bank] | None = None
        self.purified, self.bank = None, None

    def give(self, purified: nn.Module, bank: Bank) -> TriggerConsistency:
        """Use a purified teacher and triggers that are there already, in place of
        making them; returns itself.
        """
        self.given = purified, bank
        return self

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.seen, self.renewed = 0, Bank()
        self.purified, self.bank = self.given or (None, None)

    def observe(self, batch: Batch):
        if self.bank is None:
            self._make(batch.images.shape[1:])
        self.purified.to(batch.images.device)
        if self.renew_every and self.bank and self.seen % self.renew_every == 0:
            self._renew(batch)
        self.seen += 1
        self.keep = None
        if self.bank:
            with torch.no_grad():
                answers = self.purified(batch.images)
            if self.filter:
                bad = suspicious(batch.logits, answers, self.bank.targets)
                self.keep = (~bad).to(batch.images.dtype)
            if self.cleaned == "teach":
                batch.logits, self.keep = answers, None

    def _make(self, shape: Sequence[int]) -> None:
        seed = new_seed(self.rng)
        pool = synthetic_pool(
            self.teacher, shape, images=self.images, device=self.device, seed=seed
        )
        steps = [PURIFIERS.find(p)() if isinstance(p, str) else p for p in self.purifiers]
        self.purified = purify(self.teacher, steps, shape, pool=pool, device=self.device, seed=seed)
        self.bank = Bank()
        for step in steps:
            if isinstance(step, Unlearn):
                self.bank = self.bank + step.bank

    def _renew(self, batch: Batch) -> None:
        """New triggers of the student, one per target and family."""
        images = batch.images.clamp(0, 1)
        seed = new_seed(self.rng)
        with torch.no_grad(), mode(self.student, training=False):
            predicted = self.student(images).argmax(1)
        targets = [c for c in self.bank.targets if bool((predicted != c).any())]
        if targets:
            found = invert(self.student, images, targets, steps=20, batch=8, seed=seed)
            room = max(1, self.size - len(self.bank))
            self.renewed = (self.renewed + found).latest(room)

    def sample_weights(self, batch: Batch):
        return self.keep

    def student_term(self, batch: Batch, logits: Tensor):
        if not self.bank:
            return None
        wanted = torch.as_tensor(self.bank.targets, device=batch.logits.device)
        rows = (~torch.isin(batch.logits.argmax(1), wanted)).nonzero().flatten()
        if len(rows) < 2:
            return None
        images = batch.images[rows]
        triggered = (self.bank + self.renewed).on(images, self.rng)
        # together with the clean batch: one change of a whole batch also changes its
        # statistics and is normalised away, which it will not be in use
        with mode(self.student, self.student.training), frozen(self.student, weights=False):
            out = self.student(torch.cat([batch.images, triggered]))[len(batch.images) :]
        return self.weight * kl(batch.logits[rows], out).mean()

    def dropped(self):
        return self.without if self.bank else ()

    def state(self):
        made = self.bank is not None
        return {
            **super().state(),
            "seen": self.seen,
            "bank": self.bank.state() if made else None,
            "renewed": self.renewed.state(),
            "purified": dict(self.purified.state_dict()) if made else None,
            "card": [dict(entry) for entry in getattr(self.purified, "purified", ())],
        }

    def restore(self, state):
        super().restore(state)
        self.seen = state["seen"]
        self.renewed = Bank.from_state(state["renewed"], self.device)
        if state["bank"] is not None:
            self.bank = Bank.from_state(state["bank"], self.device)
            self.purified = rebuild(copy.deepcopy(self.teacher), state["card"])
            self.purified.load_state_dict(state["purified"])
            self.purified.to(self.device).eval().requires_grad_(False)
            self.purified.purified = state["card"]

    def report(self):
        bank = self.bank or Bank()
        return {
            "targets": bank.targets,
            "triggers": len(bank),
            "renewed": len(self.renewed),
            "purified": [dict(entry) for entry in getattr(self.purified, "purified", ())],
        }
