"""Shuffling Vaccine (Hong et al., ICML 2023, arXiv 2306.02368, section 4.1): close the
road through bad synthetic inputs.

Where paper and official code differ:

- The paper prints KL(T~ || T); the code has KL(T || T~) (``reverse``), in the synthesis term
  and in the verification's score. On digits (badnet_sq, the last two convolutions, four
  shuffles) the reverse score tells triggered from clean images with an AUC of .94 to .97, the
  printed one with .64 to .80.
- The code divides the synthesis term by the number of agreeing samples
  (``per="agreeing"``) and by that of the classes (``class_mean``).
- The code's weights ascend on suspicious samples (``ascent``), the paper's weaken them.

The paper's term has no upper limit even where T and T~ agree. Once the student is good it
outweighs the generator's own loss: on digits the generator then makes nothing but extreme
images of one class. With a ``cap`` only suspicious samples are pushed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from abdlab.defenses.defense import Defense
from abdlab.defenses.plans import Plan, planned
from abdlab.defenses.sample_weights import SampleWeights
from abdlab.defenses.shuffled_teacher import (
    CONVOLUTIONS,
    ShuffledTeacher,
    shuffled_layers,
    suspicion,
    tail_share,
)
from abdlab.errors import one_of
from abdlab.features import module_at
from abdlab.graphs import Captured
from abdlab.losses import kl


class VaccineNotFound(UserWarning):
    """No shuffle of the teacher passed verification, so that the Shuffling Vaccine
    stays off.
    """


class ShufflingVaccine(Defense, Captured):
    """A shuffled teacher forgets the classes but still answers to a trigger: keep the
    source away from where they agree.

    Where the source synthesises, its generator also maximises ``alpha`` x mean KL(T~ || T)
    over the samples on which T and T~ predict the same class. Where it does not (OOD), the
    student's loss on these samples is weighed
    (:func:`~abdlab.defenses.sample_weights.kd_weights`).

    Args:
        k: copies.
        layers: the shuffled convolutions, or how many of the last ones.
        alpha: of the synthesis term; may be a plan.
        per, class_mean, reverse, cap, ascent: see the module's head.
        form: "auto", as above; or "synthesis" or "weights" alone.
        kd_alpha: alpha of the weights; None takes
            :data:`~abdlab.defenses.sample_weights.KD_ALPHA`.
        warmup: share of the run whose images fill the verification pool.
        stop: share after which it is off (the paper's lambda).
        tries, sigma, threshold: the first of so many shuffles is used with which more than
            ``threshold`` of the pool scores below mean - sigma x std.
        pool: at most this many images for that (bounded memory).
        verify: False takes the first shuffle unseen.

    Raises:
        ValueError: for a value outside its range.

    Warns:
        VaccineNotFound: when no shuffle verifies; it is then off.

    >>> from abdlab import build
    >>> ShufflingVaccine(layers=2).layer_names(build("wrn-10-1"))
    ['stage3.0.conv2', 'stage3.0.shortcut']
    """

    tunable = ("alpha",)
    captures = True

    def __init__(
        self,
        *,
        k: int = 3,
        layers: int | Sequence[str] = 5,
        alpha: Plan = 0.1,
        per: str = "agreeing",
        class_mean: bool = True,
        form: str = "auto",
        ascent: bool = False,
        kd_alpha: float | None = None,
        reverse: bool = False,
        cap: float | None = None,
        warmup: float = 0.1,
        stop: float = 1.0,
        tries: int = 8,
        sigma: float = 3.0,
        threshold: float = 0.02,
        pool: int = 2048,
        verify: bool = True,
    ):
        one_of("per", per, "agreeing", "batch")
        one_of("form", form, "auto", "synthesis", "weights")
        SampleWeights(kd_alpha, ascent)
        if not 0 <= warmup < 1 or not 0 <= stop <= 1:
            raise ValueError(
                f"warmup and stop are shares of the run in [0, 1], not {warmup} and {stop}"
            )
        if tries < 1 or pool < 2:
            raise ValueError(
                f"tries must be at least 1 and pool at least 2, not {tries} and {pool}"
            )
        if k < 1 or layers in ([], (), 0):
            raise ValueError(
                f"k, the number of shuffled copies, and layers are at least 1, not {k} and {layers}"
            )
        if cap is not None and cap <= 0:
            raise ValueError(f"cap is a KL in nats above 0, or None, not {cap}")
        self.alpha = planned(self, "alpha", alpha)
        self.k, self.layers, self.per, self.class_mean = k, layers, per, class_mean
        self.form, self.ascent, self.kd_alpha = form, ascent, kd_alpha
        self.reverse, self.cap, self.warmup, self.stop = reverse, cap, warmup, stop
        self.tries, self.sigma, self.threshold = tries, sigma, threshold
        self.pool, self.verify = pool, verify

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.names = self.layer_names(teacher)
        self.vaccine: ShuffledTeacher | None = None
        self.shares: list[float] = []
        self.decided = False
        self.began: int | None = None
        self.last = round(self.stop * length)
        self.seen: list[Tensor] = []
        self.active = False
        # images, and the vaccine's logits on them
        self.ready: tuple[Tensor | None, Tensor | None] = (None, None)
        self.used: list[str] = []  # forms, in the order in which they were first used
        self.weigh = SampleWeights(self.kd_alpha, self.ascent)

    def layer_names(self, teacher: nn.Module) -> list[str]:
        """The convolutions that it shuffles in this teacher. Raises ValueError when
        they are not there.
        """
        if isinstance(self.layers, int):
            return shuffled_layers(teacher, self.layers)
        for name in self.layers:
            if not isinstance(module_at(teacher, name), CONVOLUTIONS):
                raise ValueError(f"{name} is no convolution, and only convolutions are shuffled")
        return list(self.layers)

    def before(self, index):
        events = []
        self.began = index if self.began is None else self.began
        warm = max(round(self.warmup * self.length), 1 if self.verify else 0)
        if not self.decided and index >= self.began + warm:
            events = self._decide()
        elif self.vaccine is not None and index == self.last:
            events = [f"shuffling vaccine: off from pseudo-batch {index} on"]
        self.active = self.vaccine is not None and index < self.last
        return events

    def branch(self):
        return self.active, self.alpha, self.vaccine

    def observe(self, batch):
        if not self.decided and self.verify:
            self.seen.append(batch.images.clone())
            while sum(map(len, self.seen)) - len(self.seen[0]) >= self.pool:
                self.seen.pop(0)

    def teacher_logits(self, images):
        if not self.active or self.form == "weights":
            return None
        logits, shuffled = self.vaccine.beside(images)
        self.ready = images, shuffled
        return logits

    def synthesis_term(self, images, teacher_logits):
        if not self.active or self.form == "weights":
            return None
        self._use("synthesis")
        (seen, shuffled), self.ready = self.ready, (None, None)
        if seen is not images:
            shuffled = self.vaccine(images)
        agree = shuffled.argmax(1) == teacher_logits.argmax(1)
        per_sample = kl(teacher_logits, shuffled) if self.reverse else kl(shuffled, teacher_logits)
        per_sample = per_sample.clamp_max(self.cap) if self.cap else per_sample
        per_sample = per_sample / teacher_logits.shape[1] if self.class_mean else per_sample
        per_sample = per_sample * agree
        count = agree.sum().clamp_min(1) if self.per == "agreeing" else len(images)
        return -self.alpha * per_sample.sum() / count

    @torch.no_grad()
    def sample_weights(self, batch):
        synthesised = self.form == "auto" and batch.synthesised
        if not self.active or self.form == "synthesis" or synthesised:
            return None
        self._use(self.weigh.form)
        return self.weigh(self.vaccine(batch.images).argmax(1) == batch.logits.argmax(1))

    def _use(self, form: str) -> None:
        if form not in self.used:
            self.used.append(form)

    def _decide(self) -> list[str]:
        self.decided = True
        if not self.verify:
            self.vaccine = ShuffledTeacher(self.teacher, self.names, self.k, self.rng)
            return ["shuffling vaccine: the first shuffle is used without verification"]
        images = torch.cat(self.seen)[-self.pool :]
        self.seen = []
        for number in range(1, self.tries + 1):
            vaccine = ShuffledTeacher(self.teacher, self.names, self.k, self.rng)
            scores = suspicion(vaccine, self.teacher, images, reverse=self.reverse)
            self.shares.append(tail_share(scores, self.sigma))
            if self.shares[-1] > self.threshold:
                self.vaccine = vaccine
                return [
                    f"shuffling vaccine: found at try {number}, {self.shares[-1]:.1%} of the"
                    " synthetic images are suspicious"
                ]
        message = (
            f"no shuffling vaccine was found in {self.tries} tries: at most {max(self.shares):.1%}"
            f" of the synthetic images score below mean - {self.sigma:g} std, {self.threshold:.1%}"
            " are needed. The vaccine is off; self-retrospection is the fall-back"
        )
        warnings.warn(message, VaccineNotFound, stacklevel=2)
        return [message]

    def state(self):
        return {
            **super().state(),
            "decided": self.decided,
            "began": self.began,
            "shares": self.shares,
            "seen": self.seen,
            "used": self.used,
            "weighed": self.weigh.count,
            "permutations": None if self.vaccine is None else self.vaccine.permutations,
        }

    def restore(self, state):
        super().restore(state)
        self.decided, self.began = state["decided"], state["began"]
        self.shares = list(state["shares"])
        self.seen = [part.to(self.device) for part in state["seen"]]
        self.used, self.weigh.count = list(state["used"]), state["weighed"].to(self.device)
        if state["permutations"] is not None:
            kept = state["permutations"]
            self.vaccine = ShuffledTeacher(self.teacher, self.names, self.k, permutations=kept)

    def report(self):
        share = self.weigh.share
        return {
            "found": self.vaccine is not None,
            "verified": self.verify and self.vaccine is not None,
            "tries": len(self.shares),
            "suspicious_shares": [round(s, 5) for s in self.shares],
            "layers": self.names,
            "forms": self.used,
            **({} if share is None else {"weighed_suspicious": round(share, 5)}),
        }
