"""Zero-shot knowledge transfer by adversarial belief matching (Micaelli & Storkey,
NeurIPS 2019, arXiv 1905.09768).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.features import frozen, record
from abdlab.graphs import key_of
from abdlab.losses import _apart, attention, kl
from abdlab.sources.generated import Generated
from abdlab.sources.source import Batch


@dataclass(kw_only=True, eq=False, repr=False)
class ZSKT(Generated):
    """Trains a generator to find images on which student and teacher differ, and the
    student to agree on them.

    Per pseudo-batch: one generator step that maximises KL(T || S), then
    ``student_steps`` student steps on what the updated generator makes of the same
    noise. One teacher pass serves all of them: the official loop's updates, for less.

    Args:
        shape, pseudo_batches, batch_size, generator_lr, z, width, ema: see
            :class:`~abdlab.sources.generated.Generated`. Adam, cosine to 0.
        student_steps: on each pseudo-batch.
        student_lr: Adam, cosine to 0.
        temperature: of KL(T || S), without T^2 (GTSRB .5).
        class_mean: KL is also divided by the number of classes (official code); False:
            summed over them (paper).
        attention: weight of attention transfer (GTSRB 0).
        attention_layers: ``{teacher layer: student layer}`` to compare; None: each
            model's own ``stages``.

    Deviation: batch norms do not record the student's pass in the generator step (1 in
    11 of the official loop).

    Raises:
        ValueError: on :meth:`start`, when the layers to compare are unknown or differ in
            spatial size.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> source = ZSKT((1, 8, 8), pseudo_batches=2, batch_size=4, z=5, width=2)
    >>> [sorted(step.losses) for step in distill(teacher, student, source)][-1]
    ['attention', 'generator', 'kd']
    """

    clip = 5.0  # the paper's, of student and generator

    pseudo_batches: int = 80_000
    batch_size: int = 128
    student_steps: int = 10
    student_lr: float = 2e-3
    generator_lr: float = 1e-3
    z: int = 100
    width: int = 64
    temperature: float = 1.0
    class_mean: bool = True
    attention: float = 250.0
    attention_layers: Mapping[str, str] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.student_steps < 1:
            raise ValueError(f"student_steps must be at least 1, not {self.student_steps}")

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        self.pairs = self._pairs(teacher, student) if self.attention else {}
        self.recorded = tuple(self.pairs.values())

    def optimizer(self, student):
        adam = Adam(student.parameters(), lr=self.student_lr, fused=True)
        return adam, CosineAnnealingLR(adam, len(self) * self.student_steps)

    def batch(self, defenses: Sequence = ()) -> Batch:
        noise = self.phases.hold("noise", self.noise())
        key = key_of("generator", defenses)
        # the norms too are a piece's own: one that was captured earlier may be replayed
        # again
        batch, norms = self.phases.run(
            key,
            lambda: (self._make(noise, defenses), self.norms.copy()),
            [self.generator_optimizer],
        )
        self.norms = norms.copy()
        self.advance()
        return replace(batch, losses=dict(batch.losses))

    def _make(self, noise: Tensor, defenses: Sequence) -> Batch:
        """The generator's step and the batch that follows it, of noise that is drawn."""
        images = self.generator(noise)
        logits, losses = self.generator_terms(images, noise, defenses)
        losses = self.improve(images, logits, losses, defenses)
        with torch.no_grad(), record(self.teacher, list(self.pairs)) as features:
            images = self.shown(noise)
            logits = self.teacher(images)
            maps = {
                layer: attention(feature) for layer, feature in features.items()
            }  # once, for all student steps
        return Batch(images, logits, maps, losses=losses)

    def generator_terms(
        self, images: Tensor, noise: Tensor, defenses: Sequence
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the teacher's logits, what the generator minimises by name) on what it made of
        the noise.
        """
        with frozen(self.student):
            logits = self.ask(images, defenses)
            return logits, {"generator": -self._kd(logits, self.student(images)).mean()}

    def student_loss(self, batch: Batch):
        with record(self.student, list(self.pairs.values())) as features:
            logits = self.student(batch.images)
        terms = {}
        if self.pairs:
            terms["attention"] = self.attention * sum(
                _apart(attention(features[s]), batch.features[t]) for t, s in self.pairs.items()
            )
        return logits, self._kd(batch.logits, logits), terms

    def _kd(self, teacher: Tensor, student: Tensor) -> Tensor:
        per_sample = kl(teacher, student, self.temperature)
        return per_sample / teacher.shape[1] if self.class_mean else per_sample

    def _pairs(self, teacher: nn.Module, student: nn.Module) -> dict[str, str]:
        hint = "set attention=0, or attention_layers={'teacher layer': 'student layer', ...}"
        pairs = self.attention_layers
        if pairs is None:
            stages = [getattr(m, "stages", None) for m in (teacher, student)]
            if not all(
                isinstance(s, (tuple, list)) and all(isinstance(n, str) for n in s) for s in stages
            ):
                raise ValueError(
                    f"attention transfer does not know which layers of {type(teacher).__name__} and"
                    f" {type(student).__name__} to compare: {hint}"
                )
            if len(stages[0]) != len(stages[1]):
                raise ValueError(
                    "attention transfer needs as many stages in the teacher as in the student, not"
                    f" {len(stages[0])} and {len(stages[1])}: {hint}"
                )
            pairs = dict(zip(*stages, strict=True))
        probe = torch.zeros(2, *self.shape, device=self.device)
        with (
            torch.no_grad(),
            frozen(student),
            record(teacher, list(pairs)) as t,
            record(student, list(pairs.values())) as s,
        ):
            teacher(probe), student(probe)
        for a, b in pairs.items():
            if t[a].ndim != 4 or s[b].ndim != 4 or t[a].shape[-2:] != s[b].shape[-2:]:
                raise ValueError(
                    f"attention transfer cannot compare {a} {tuple(t[a].shape[1:])} with {b}"
                    f" {tuple(s[b].shape[1:])}: {hint}"
                )
        return dict(pairs)
