"""A stranger's network to a verdict, without any data: is there a backdoor, and towards
which class?

Four detectors look at the network alone, each with a threshold that was set on digits
teachers whose backdoors were known (:data:`THRESHOLDS`). What they missed there is part
of the verdict.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from abdlab.detectors import (
    changed_by_bounds,
    feature_answers,
    inclined,
    quartile_scores,
    share_scores,
)
from abdlab.features import mode
from abdlab.inversion import Bank, costs, outlier_index
from abdlab.probe import classes_of
from abdlab.purifiers.bounded import ALONE, agreement_curve, boundable, choose_k
from abdlab.purifiers.pool import rough_pool
from abdlab.suspects import THRESHOLD, gamma_scores, joint, largest_margins


@dataclass(frozen=True)
class Evidence:
    """What was measured on a network, before anybody judges it.

    Attributes:
        costs: (classes, families) nats that the cheapest inverted trigger costs.
        margins: (classes,) the largest margin in logits.
        inclined: (classes,) logarithm of what features of other classes say for each;
            None where the network has no layer to start features from.
        changed: (2, classes) synthetic images whose answer bounds change, and all; None
            where the network has nothing to bound.
        bank: the triggers that the costs are of, classes x families.
    """

    costs: Tensor
    margins: Tensor
    inclined: Tensor | None
    changed: Tensor | None
    bank: Bank = field(default_factory=Bank)


#: name -> scores (classes,) of evidence, larger for a more suspicious class; None where
#: the network gives no such evidence
DETECTORS: dict[str, Callable[[Evidence], Tensor | None]] = {
    "inversion": lambda e: outlier_index(e.costs),
    "MM-BD": lambda e: gamma_scores(e.margins),
    "FreeEagle": lambda e: None if e.inclined is None else quartile_scores(e.inclined),
    "bounds": lambda e: None if e.changed is None else share_scores(e.changed),
}


#: what an audit does, one after the other
STAGES = ("synthetic images", *DETECTORS)


#: synthetic images that it looks at: half of a purifier's, which learns from them
POOL = 192


def _silent(what: str, done: int, total: int) -> None:
    pass


def steps_for(shape: Sequence[int]) -> int:
    """Steps of inversion for images (C, H, W): 40 where thresholds were set, on 16 pixels
    a side; a mask over 32 takes three times as many to shrink to a trigger's size.
    """
    return 40 if min(shape[1:]) < 24 else 120


def measure(
    model: nn.Module,
    pool: Tensor,
    *,
    seed: int = 0,
    tell: Callable[[str, int, int], None] = _silent,
) -> Evidence:
    """All evidence on a network, from synthetic images (N, C, H, W) of its own; each
    detector's default settings.

    Args:
        tell: see :func:`audit`.
    """
    total = len(STAGES)
    classes, shape = classes_of(model, pool[:2], "the model"), tuple(pool.shape[1:])
    tell("inversion", 1, total)
    table, bank = costs(model, pool, steps=steps_for(shape), seed=seed)
    tell("MM-BD", 2, total)
    margins = largest_margins(model, shape, classes, seed=seed, device=pool.device)
    tell("FreeEagle", 3, total)
    try:
        answers = feature_answers(model, pool, classes, seed=seed)
    except ValueError:  # no layer that everything passes through
        answers = None
    tell("bounds", 4, total)
    changed = None
    if boundable(model):
        with torch.no_grad(), mode(model, training=False):
            k = choose_k(agreement_curve(model, pool), ALONE)
        changed = changed_by_bounds(model, pool, classes, k)
    return Evidence(table, margins, None if answers is None else inclined(answers), changed, bank)


#: A score above these makes a detector name the class. Set on the digits teachers of
#: :mod:`abdlab.studies.calibrate`, part "calibration".
THRESHOLDS = {"inversion": 1.32, "MM-BD": 7.4, "FreeEagle": 3.1, "bounds": 0.69}

#: the two whose joint score accuses a class (:func:`abdlab.suspects.joint`); all four have
#: their word about it
DECISIVE = ("inversion", "MM-BD")

#: what the verdict was right in (:func:`abdlab.studies.calibrate.report`): the part of the
#: study, clean teachers that it accused, teachers with a backdoor of which it accused the
#: right class, and the triggers of those that it missed
RECORD: dict = {"part": "held out", "alarms": (1, 20), "found": (16, 20), "missed": ("cl", "sig")}
#: how a verdict calls a part
_PARTS = {
    "held out": "that no threshold was set on",
    "calibration": "that its thresholds were set on (others are not measured yet)",
}


def named(scores: Mapping[str, Tensor], thresholds: Mapping[str, float]) -> dict[int, list[str]]:
    """Class -> the detectors whose score of it exceeds their threshold; the class that
    most of them name first, of equals the one that exceeds it further.

    >>> named({"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([3.0, 2.0])}, {"a": 1, "b": 1})
    {1: ['a', 'b'], 0: ['b']}
    """
    found: dict[int, list[str]] = {}
    beyond: dict[int, float] = {}
    for name, values in scores.items():
        for label in (values > thresholds[name]).nonzero().flatten().tolist():
            found.setdefault(label, []).append(name)
            excess = float(values[label]) / max(thresholds[name], 1e-6)
            beyond[label] = max(excess, beyond.get(label, 0.0))
    order = sorted(found, key=lambda label: (-len(found[label]), -beyond[label]))
    return {label: found[label] for label in order}


def turned(model: nn.Module, bank: Bank, images: Tensor) -> list[float]:
    """Of each trigger the share of images (N, C, H, W), those left out that the model
    predicts as its target anyway, that it turns into its target; NaN where all are.
    """
    with torch.no_grad(), mode(model, training=False):
        plain = torch.cat([model(part).argmax(1) for part in images.split(256)])
        shares = []
        for trigger in bank:
            rest = images[plain != trigger.target]
            hits = [model(trigger(part)).argmax(1) == trigger.target for part in rest.split(256)]
            shares.append(torch.cat(hits).float().mean().item() if hits else float("nan"))
    return shares


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found.

    Attributes:
        evidence: what was measured. scores: detector -> (classes,).
        thresholds: detector -> above which score it names a class.
        pool: (N, C, H, W), the network's own synthetic images.
        turned: of each of :attr:`triggers` the share of the pool that it turns.
        seconds: that it took.
    """

    evidence: Evidence
    scores: dict[str, Tensor]
    thresholds: dict[str, float]
    pool: Tensor
    turned: tuple[float, ...] = ()
    seconds: float = 0.0

    @property
    def named(self) -> dict[int, list[str]]:
        """Suspicious class -> the detectors that name it, most of them first."""
        return named(self.scores, self.thresholds)

    @property
    def target(self) -> int | None:
        """The class that a backdoor most likely turns images into; None where nothing
        was found.
        """
        return accused(self.scores)

    @property
    def triggers(self) -> Bank:
        """Of the inverted triggers for the class :attr:`nearest` those that are cheaper
        than any other class's of their family, the most of all first; at least one. The
        others show what the class looks like, and no backdoor.
        """
        costs, label = self.evidence.costs.clamp_min(1e-6), self.nearest
        others = torch.cat([costs[:label], costs[label + 1 :]]).amin(0)
        lead = (others / costs[label]).log().tolist()  # by family, as the bank is ordered
        own = [t for t in self.evidence.bank if t.target == label]
        order = sorted(range(len(own)), key=lambda i: -lead[i])
        return Bank(tuple(own[i] for i in order if lead[i] > 0 or i == order[0]))

    @property
    def nearest(self) -> int:
        """The accused class, or else the one whose inverted trigger stands out most."""
        found = self.target
        return int(outlier_index(self.evidence.costs).argmax()) if found is None else found

    def __str__(self) -> str:
        return self.verdict()

    def verdict(self, classes: Sequence[str] = ()) -> str:
        """The outcome in words, with how far it can be trusted.

        Args:
            classes: their names.
        """
        return say(self.scores, self.thresholds, classes)

    def state(self) -> dict:
        """All of it but the thresholds, as dicts of tensors and numbers."""
        own = {k: getattr(self.evidence, k) for k in ("costs", "margins", "inclined", "changed")}
        bank = self.evidence.bank.state()
        found = {"evidence": own, "bank": bank, "pool": self.pool, "turned": list(self.turned)}
        return {**found, "seconds": self.seconds}

    @classmethod
    def of(cls, state: Mapping) -> Audit:
        """What :meth:`state` wrote, judged by today's thresholds."""
        evidence = Evidence(**state["evidence"], bank=Bank.from_state(state["bank"]))
        turned = tuple(state["turned"])
        scores = scores_of(evidence)
        return cls(evidence, scores, dict(THRESHOLDS), state["pool"], turned, state["seconds"])

    def summary(self) -> dict:
        """Plain values for metrics.json."""
        return {
            "target": self.target,
            "named": {str(label): names for label, names in self.named.items()},
            "scores": {name: [round(v, 3) for v in s.tolist()] for name, s in self.scores.items()},
            "thresholds": dict(self.thresholds),
            "costs": [[round(v, 3) for v in row] for row in self.evidence.costs.tolist()],
            "changed_by_bounds": _plain(self.evidence.changed),
            "seconds": round(self.seconds, 1),
        }


def audit(
    model: nn.Module,
    shape: Sequence[int],
    *,
    pool: Tensor | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tell: Callable[[str, int, int], None] = _silent,
) -> Audit:
    """Is there a backdoor in a network, and towards which class? No data, one to several
    minutes on a CPU; the network and its weights stay as they are.

    Four detectors judge it: the costs of inverted triggers in four families
    (:mod:`abdlab.inversion`), MM-BD, FreeEagle (:mod:`abdlab.detectors`), and the
    answers that bounded activations change (:mod:`abdlab.purifiers.bounded`).

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits; see
            :func:`abdlab.probe.classes_of` for what else it may answer.
        shape: (C, H, W).
        pool: synthetic images of the model, if there are some; else they are made.
        tell: called with what is measured next, how many of :data:`STAGES` are done, and
            how many there are.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    >>> [*audit(net, (1, 8, 8), pool=torch.eye(64).view(64, 1, 8, 8)).scores]
    ['inversion', 'MM-BD']
    """
    began = time.perf_counter()
    own = copy.deepcopy(model).to(device).eval()
    classes_of(own, torch.zeros(2, *shape, device=device), "the model")
    if pool is None:
        tell(STAGES[0], 0, len(STAGES))
        pool = rough_pool(own, shape, images=POOL, device=device, seed=seed)
    evidence = measure(own, pool.to(device), seed=seed, tell=tell)
    found = Audit(evidence, scores_of(evidence), dict(THRESHOLDS), pool)
    shares = tuple(turned(own, found.triggers, pool.to(device)))
    tell("done", len(STAGES), len(STAGES))
    return replace(found, turned=shares, seconds=time.perf_counter() - began)


def scores_of(evidence: Evidence) -> dict[str, Tensor]:
    """Detector -> its scores (classes,), of those that have evidence."""
    found = {name: detect(evidence) for name, detect in DETECTORS.items()}
    return {name: scores for name, scores in found.items() if scores is not None}


@dataclass(frozen=True)
class Heritage:
    """What a student took over of the triggers that were inverted on its teacher.

    Attributes:
        target: the class that the triggers call. accused: whether the audit accused it.
        teacher, student: each trigger's share of images that it turns, in [0, 1].
        usual: what the other classes' triggers turn on the student, in the mean.
    """

    target: int
    accused: bool
    teacher: tuple[float, ...]
    student: tuple[float, ...]
    usual: float

    @property
    def share(self) -> float:
        """What the trigger that works best on the student turns, in [0, 1]."""
        return max((s for s in self.student if s == s), default=float("nan"))

    def verdict(self, classes: Sequence[str] = ()) -> str:
        """The outcome in words."""
        best = max((s for s in self.teacher if s == s), default=float("nan"))
        label = _class(self.target, classes)
        return (
            f"of {len(self.student)} triggers for {label} that were inverted on the teacher, the"
            f" best turns {self.share:.0%} of synthetic images on this model, and {best:.0%} on"
            f" the teacher (other classes' triggers on this model: {self.usual:.0%} in the mean)"
        )


def audit_student(student: nn.Module, found: Audit) -> Heritage:
    """Which of the teacher's inverted triggers still work on a student: a cheap audit,
    which sees what is inherited and nothing else.

    Args:
        found: the audit of its teacher.
    """
    where = next((p.device for p in student.parameters()), found.pool.device)
    pool, label = found.pool.to(where), found.nearest
    bank = found.triggers
    rest = Bank(tuple(t for t in found.evidence.bank if t.target != label))
    usual = [share for share in turned(student, rest, pool) if share == share]
    mean = sum(usual) / len(usual) if usual else float("nan")
    own = tuple(turned(student, bank, pool))
    return Heritage(label, found.target is not None, found.turned, own, mean)


def accused(scores: Mapping[str, Tensor]) -> int | None:
    """The class that stands accused: the one with the largest joint score of the
    detectors of :data:`DECISIVE`, where it exceeds :data:`abdlab.suspects.THRESHOLD`;
    None for none.
    """
    both = together(scores)
    label = int(both.argmax())
    return label if both[label] > THRESHOLD else None


def together(scores: Mapping[str, Tensor]) -> Tensor:
    """The joint score (classes,) of the detectors of :data:`DECISIVE`."""
    return joint(*(scores[name] for name in DECISIVE))


def say(
    scores: Mapping[str, Tensor], thresholds: Mapping[str, float], classes: Sequence[str] = ()
) -> str:
    """The outcome of an audit in words, with how far it can be trusted."""
    found, label = named(scores, thresholds), accused(scores)
    (alarms, clean), part = RECORD["alarms"], _PARTS[RECORD["part"]]
    if label is None:
        right, tried = RECORD["found"]
        missed = ", ".join(RECORD["missed"])
        return (
            f"nothing found, which is no proof: of {tried} digits teachers with a backdoor {part},"
            f" {tried - right or 'none'} {'was' if tried - right < 2 else 'were'} missed"
            f"{f' ({missed})' if missed else ''}, and other networks and triggers are not"
            " measured at all"
        )
    both = together(scores)
    own = found.get(label, [])
    told = ", ".join(
        f"{name} {float(scores[name][label]):.2f} where {thresholds[name]:.2f} is" for name in own
    )
    others = [c for c in both.argsort(descending=True).tolist() if both[c] > THRESHOLD][1:]
    also = f"; {' and '.join(_class(c, classes) for c in others)} less so" if others else ""
    return (
        f"{_class(label, classes)} is suspicious: {' and '.join(DECISIVE)} together"
        f" {float(both[label]):.2f} where {THRESHOLD:.2f} is; by themselves {len(own)} of"
        f" {len(scores)} detectors name it{f' ({told})' if told else ''}{also}. Of {clean} clean"
        f" digits teachers {part}, {alarms or 'none'} {'was' if alarms < 2 else 'were'} accused"
    )


def _plain(values: Tensor | None) -> list | None:
    return None if values is None else values.tolist()


def _class(label: int, classes: Sequence[str]) -> str:
    named_otherwise = len(classes) > label and classes[label] != str(label)
    return f"class {label}" + (f" ({classes[label]})" if named_otherwise else "")
