"""Unlearn: the triggers that a network itself shows when they are inverted are trained
out of a copy of it, on images made from it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver, new_seed
from abdlab.inversion import FAMILIES, Bank, costs, invert
from abdlab.losses import kl
from abdlab.purifiers.bounded import (
    ALONE,
    agreement_curve,
    batch_norms,
    bound,
    choose_k,
    statistics,
)
from abdlab.purifiers.pool import rough_pool, synthetic_pool
from abdlab.purifiers.purifier import Purifier, same_weights
from abdlab.suspects import largest_margins, suspects, suspicion

#: A family tells of a target where it costs at most this factor of what the cheapest
#: other class costs there. Of digits teachers (seed 0), stamp and additive told of
#: badnet_sq and trojan_wm, blend of blend too; where a family does not tell, its
#: triggers are what the class looks like, and unlearning them costs accuracy: l2_inv
#: 99.6/100 to 91.4/88.7 in one round (notebooks/studies/tuning_purifiers.md).
TELLING = 0.8


#: Where no class is suspicious enough, the likeliest one is unlearnt on trial. One image
#: in so many is held out then;
HELD_OUT = 3

#: of those that the teacher predicts as the class, there must be so many,
WITNESSES = 4

#: and the copy must still predict at least this share of them as the class. Of digits
#: teachers a target kept .83 (badnet_sq) and .71 (trojan_wm), and .04 of a third whose
#: images all carry the trigger; the likeliest class of five clean teachers 0 to .35
#: (notebooks/studies/tuning_purifiers.md).
STAYS = 0.5


def telling(table: Tensor, targets: Sequence[int]) -> dict[int, list[str]]:
    """For each target the families of triggers in which it is cheap; all of them where it
    is in none.

    Args:
        table: (classes, families) in nats, families in the order of
            :data:`abdlab.inversion.FAMILIES`.

    >>> telling(torch.tensor([[1.0, 1.0, 3.0, 9.0], [2.0, 1.1, 3.0, 3.0]]), [0])
    {0: ['stamp']}
    """
    cheapest = table[[c for c in range(len(table)) if c not in targets]].amin(0)
    found = {
        c: [
            f
            for f, own, other in zip(FAMILIES, table[c], cheapest, strict=True)
            if own <= TELLING * other
        ]
        for c in targets
    }
    return {c: families or list(FAMILIES) for c, families in found.items()}


def cheap(bank: Bank, table: Tensor, targets: Sequence[int], natural: float) -> Bank:
    """Those triggers of the bank that cost at most ``natural`` times what the cheapest
    class that is no target costs in the same family.

    Args:
        table: (classes, families) in nats, families in the order of
            :data:`abdlab.inversion.FAMILIES`.
    """
    others = [c for c in range(len(table)) if c not in targets]
    limits = dict(zip(FAMILIES, (natural * table[others].amin(0)).tolist(), strict=True))
    return Bank(tuple(t for t in bank if t.cost <= limits[t.family]))


@torch.no_grad()
def staying(before: nn.Module, after: nn.Module, images: Tensor, target: int) -> float:
    """Of the images (N, C, H, W) that one network predicts as a class, the share that
    another one does too; 0 where they are fewer than :data:`WITNESSES`.
    """
    own = images[_answers(before, images).argmax(1) == target]
    if len(own) < WITNESSES:
        return 0.0
    return (_answers(after, own).argmax(1) == target).float().mean().item()


def between(before: dict, after: dict, way: float) -> dict:
    """The state dict at this share of the way from one to another; what does not float
    is the later one's.

    >>> between({"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}, 0.75)
    {'w': tensor(2.5000)}
    """
    return {
        name: torch.lerp(before[name], value, way) if value.is_floating_point() else value
        for name, value in after.items()
    }


def unlearning_loss(
    model: nn.Module, images: Tensor, answers: Tensor, triggered: Tensor, wanted: Tensor
) -> Tensor:
    """Mean KL(answers || model(images)) + mean KL(wanted || model(triggered)), in nats;
    a scalar.

    Args:
        answers, wanted: the teacher's logits on the images, and on those that
            ``triggered`` are without their triggers.
    """
    out = model(torch.cat([images, triggered]))
    kept, changed = out[: len(images)], out[len(images) :]
    return kl(answers, kept).mean() + kl(wanted, changed).mean()


class Unlearn(Purifier):
    """Invert triggers that call the suspects; train the copy to answer images with one as
    the teacher answers them without, and all others as before; again, until fresh triggers
    cost what other classes' do.

    Args:
        targets: classes; None finds them (:func:`abdlab.suspects.suspects`), or tries
            the likeliest, and keeps all as it was where that would itself be forgotten.
        scans: look for suspects up to so often, on the copy after each time: several
            targets hide each other. All found are then unlearnt together.
        rounds: at most so many. starts: new triggers per round, target and family.
        steps: of Adam per round, on batches of ``batch`` images with and as many
            without a trigger. lr: of Adam.
        natural: triggers that cost more than this factor of the cheapest other class's
            are left: they are what the class looks like.
        guard: so many images of the targets come from the *bounded* network; of a
            target's, those stay that both networks predict as it.
        strength: of stamps, see :meth:`abdlab.inversion.Bank.on`.
        way: in (0, 1], how far to go from the weights before to the unlearnt ones
            (Wortsman et al., CVPR 2022).
    """

    def __init__(
        self,
        *,
        targets: Sequence[int] | None = None,
        scans: int = 1,
        rounds: int = 3,
        starts: int = 3,
        steps: int = 40,
        batch: int = 48,
        lr: float = 3e-4,
        natural: float = 1.0,
        guard: int = 128,
        strength: float = 3.0,
        way: float = 1.0,
    ):
        if min(scans, rounds, starts, steps) < 1 or batch < 2:
            raise ValueError("scans, rounds, starts and steps are at least 1, batch at least 2")
        if not natural > 0:
            raise ValueError(f"natural is a factor above 0, not {natural}")
        if guard < 0:
            raise ValueError(f"guard is a number of images, 0 for none, not {guard}")
        if strength < 1:
            raise ValueError(f"strength is a factor, 1 or more, not {strength}")
        if not 0 < way <= 1:
            raise ValueError(f"way is a share above 0, at most 1, not {way}")
        self.targets, self.scans, self.rounds = targets, scans, rounds
        self.starts, self.steps, self.batch = starts, steps, batch
        self.lr, self.natural, self.guard = lr, natural, guard
        self.strength, self.way = strength, way
        #: the triggers that were unlearnt last
        self.bank = Bank()

    def passes(self, classes):
        each = self.starts * 4 * 8 * 60 + 4 * self.batch * self.steps
        again = self.scans > 1  # all of them together, at the end
        return (self.scans + again) * self.rounds * each + self.scans * classes * 4 * 8 * 40

    def clean(self, model, origin, pool, rng):
        # rough images: those that the suspects' threshold was set on, and whose answers,
        # near borders, keep accuracy while triggers are unlearnt
        rough = rough_pool(origin, pool.shape[1:], device=pool.device, seed=new_seed(rng))
        both = torch.cat([pool, rough])
        images = rough if len(set(_answers(origin, rough).argmax(1).tolist())) > 1 else both
        table, _ = costs(origin, images, seed=new_seed(rng))
        if self.targets is not None:
            return self._forget(model, origin, both, rough, [*self.targets], table, rng)
        before = copy.deepcopy(model.state_dict())
        reports = [self._scan(model, origin, origin, pool, rough, table, [], rng)]
        first, bank = copy.deepcopy(model.state_dict()), self.bank
        targets = reports[0]["targets"]
        while reports[-1]["triggers"] and len(reports) < self.scans and len(targets) < len(table):
            later, _ = costs(model, images, seed=new_seed(rng))
            reports.append(self._scan(model, model, origin, pool, rough, later, targets, rng))
            if reports[-1]["triggers"]:
                targets = list(dict.fromkeys(targets + reports[-1]["targets"]))
        if len(reports) == 1:
            return reports[0]
        if targets == reports[0]["targets"]:
            model.load_state_dict(first)
            self.bank, report = bank, reports[0]
        else:  # one by one, the first ones come back while the last go
            model.load_state_dict(before)
            report = self._forget(model, origin, both, rough, targets, table, rng)
        return {**report, "scans": reports}

    def _scan(self, model, seen, origin, pool, rough, table, known, rng) -> dict:
        """Unlearn the suspects of the network ``seen``, whose costs these are; without one,
        the likeliest class that is not known, on trial.
        """
        shape = tuple(pool.shape[1:])
        margins = largest_margins(seen, shape, len(table), seed=new_seed(rng), device=pool.device)
        targets = suspects(table, margins)
        if targets:
            both = torch.cat([pool, rough])
            return self._forget(model, origin, both, rough, targets, table, rng)
        order = suspicion(table, margins).argsort(descending=True).tolist()
        likeliest = next(c for c in order if c not in known)
        return self._try(model, origin, pool, rough, table, likeliest, rng)

    def _try(self, model, origin, pool, rough, table, likeliest, rng) -> dict:
        """Unlearn a class on trial; take it where the class itself stays.

        What is unlearnt of a natural class is the class: the copy predicts none of its
        images any more. A trigger is not what its target looks like.
        """
        witnesses = pool[::HELD_OUT]
        rest = torch.arange(len(pool)) % HELD_OUT > 0
        trial = copy.deepcopy(model)
        both = torch.cat([pool[rest.to(pool.device)], rough])
        report = self._forget(trial, origin, both, rough, [likeliest], table, rng)
        share = staying(origin, trial, witnesses, likeliest)
        told = {"tried": likeliest, "stays": round(share, 3)}
        if share < STAYS:
            self.bank = Bank()
            return {"targets": [], "triggers": 0, "found": [], "guards": 0, **told}
        model.load_state_dict(trial.state_dict())
        return {**report, **told}

    def _forget(self, model, origin, pool, rough, targets, table, rng) -> dict:
        """Train the model until fresh triggers towards the targets are as dear as any."""
        self.bank, history, guards = Bank(), [], 0
        before = copy.deepcopy(model.state_dict())
        safe = _bounded(origin, pool, rough)
        if self.guard and safe is not None:
            made = self._guards(safe, origin, pool, targets, new_seed(rng))
            pool, guards = torch.cat([pool, made]), len(made)
        answers = _answers(origin, pool)
        target = torch.isin(answers.argmax(1), torch.tensor(targets, device=pool.device))
        # of a target's images only those without its trigger: the others bring it back
        checked = _answers(model if safe is None else safe, pool)
        kept = ~target | (checked.argmax(1) == answers.argmax(1))
        rows = kept.nonzero().flatten().cpu(), (~target).nonzero().flatten().cpu()
        victims = [origin, *[model] * self.rounds]
        if same_weights(origin, model):
            victims = victims[1:]
        adam = Adam(model.parameters(), lr=self.lr)
        told = telling(table, targets)
        families = [f for f in FAMILIES if any(f in of for of in told.values())]
        for victim in victims:
            found = invert(
                victim,
                pool,
                targets,
                families=families,
                starts=self.starts,
                steps=60,
                batch=8,
                seed=new_seed(rng),
            )
            found = Bank(tuple(t for t in found if t.family in told[t.target]))
            found = cheap(found, table, targets, self.natural)
            history.append(len(found))
            if found:
                self.bank = self.bank + found
            elif victim is model:
                break
            if self.bank:
                self._train(model, adam, pool, answers, rows, rng)
        if self.way < 1:
            model.load_state_dict(between(before, model.state_dict(), self.way))
        report = {"targets": targets, "triggers": len(self.bank), "found": history}
        return {**report, "guards": guards}

    def _guards(self, safe, origin, pool, targets, seed) -> Tensor:
        """Images of the targets, made from the bounded origin and by the origin's own answer
        of that class too.
        """
        made = synthetic_pool(
            safe,
            pool.shape[1:],
            images=self.guard,
            doublings=0,
            classes=targets,
            device=pool.device,
            seed=seed,
        )
        wanted = torch.tensor(targets, device=pool.device)
        return made[torch.isin(_answers(origin, made).argmax(1), wanted)]

    def _train(self, model, adam, pool, answers, rows, rng) -> None:
        """``steps`` of Adam; ``rows``: of the images that stay, of those that get triggers."""

        def some(rows: Tensor) -> Tensor:
            chosen = torch.randint(len(rows), (self.batch,), generator=rng)
            return deliver(rows[chosen], pool.device)

        for _ in range(self.steps):
            i, j = map(some, rows)
            triggered = self.bank.on(pool[j], rng, self.strength)
            loss = unlearning_loss(model, pool[i], answers[i], triggered, answers[j])
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()


def _bounded(model: nn.Module, pool: Tensor, rough: Tensor) -> nn.Module | None:
    """A bounded copy, k by the rule on rough images; None where there is nothing to bound."""
    recorded = None if batch_norms(model) else statistics(model, pool)
    if recorded == {}:
        return None
    k = choose_k(agreement_curve(model, rough), ALONE)
    return bound(copy.deepcopy(model), k, recorded)


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """(N, classes) logits."""
    return torch.cat([model(part) for part in images.split(256)])
