"""Zero-shot knowledge transfer by adversarial belief matching (Micaelli & Storkey,
NeurIPS 2019, arXiv 1905.09768).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.evaluate import kl
from abdlab.features import frozen, full, record
from abdlab.sources.generated import Generated
from abdlab.sources.source import Batch


def attention(feature: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H*W): the channel mean of squares, l2-normalised over
    positions (Zagoruyko & Komodakis 2017).

    A map of norm under 1e-6 is divided by 1e-6: torch's default of 1e-12 lets one dead
    map send gradients to infinity.
    """
    return F.normalize(full(feature).square().mean(1).flatten(1), dim=1, eps=1e-6)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer for one pair of layers: mean over batch and positions of (a_S
    - a_T)^2; a scalar.
    """
    return _apart(attention(student), attention(teacher))


def _apart(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`attention_loss` of two maps (B, H*W)."""
    return (student - teacher).square().mean()


class ZSKT(Generated):
    """A generator seeks images on which student and teacher differ; the student learns
    to agree on them.

    Per pseudo-batch: one generator step that maximises KL(T || S), then
    ``student_steps`` student steps on the images that the updated generator makes of
    the same noise, with one teacher pass for all of them. These are the updates of the
    official loop, which runs generator and teacher anew in every student step.

    Args:
        shape: (channels, height, width) of the images.
        pseudo_batches: length of the run (paper: 80,000; GTSRB 10,000).
        batch_size: images per pseudo-batch.
        student_steps: student steps on each.
        student_lr: Adam, cosine to 0 over the run.
        generator_lr: Adam, cosine to 0 over the run.
        z: noise dimensions.
        width: of the generator.
        temperature: of KL(T || S), without T^2 (paper: 1; GTSRB .5): the KD loss, and
            what the generator maximises.
        class_mean: that KL is also divided by the number of classes (official code);
            False: summed over them (paper).
        attention: weight of attention transfer (paper: 250; GTSRB 0).
        attention_layers: names of the layers to compare, in the teacher and in the
            student; by default each model's own ``stages``. A mapping ``{teacher layer:
            student layer}`` names them explicitly.
        clip: gradient norm of student and generator.
        mean, std: per channel, of the normalisation that the images are emitted in; by
            default the teacher's own :class:`~abdlab.models.Normalize` layer, or 0.5
            and 0.25.
        ema: of the generator's weights, see
            :class:`~abdlab.sources.generated.Generated`.

    Deviation: the student's batch-norm statistics do not record the generator step's
    pass (the official loop lets them, so that 1 pass in 11 sees images that the student
    does not train on).

    Raises:
        ValueError: on :meth:`start`, when attention transfer is on and the layers to
            compare are not known or differ in spatial size.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        pseudo_batches: int = 80_000,
        batch_size: int = 128,
        student_steps: int = 10,
        student_lr: float = 2e-3,
        generator_lr: float = 1e-3,
        z: int = 100,
        width: int = 64,
        temperature: float = 1.0,
        class_mean: bool = True,
        attention: float = 250.0,
        attention_layers: Mapping[str, str] | None = None,
        clip: float = 5.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        ema: float | None = None,
    ):
        super().__init__(
            shape,
            pseudo_batches=pseudo_batches,
            batch_size=batch_size,
            generator_lr=generator_lr,
            z=z,
            width=width,
            clip=clip,
            mean=mean,
            std=std,
            ema=ema,
        )
        if student_steps < 1:
            raise ValueError(f"student_steps must be at least 1, not {student_steps}")
        self.student_steps, self.student_lr, self.temperature = (
            student_steps,
            student_lr,
            temperature,
        )
        self.class_mean, self.attention, self.attention_layers = (
            class_mean,
            attention,
            attention_layers,
        )

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        self.pairs = self._pairs(teacher, student) if self.attention else {}
        self.recorded = tuple(self.pairs.values())

    def optimizer(self, student):
        adam = Adam(student.parameters(), lr=self.student_lr, fused=True)
        return adam, CosineAnnealingLR(adam, len(self) * self.student_steps)

    def batch(self, defenses: Sequence = ()) -> Batch:
        noise = self.phases.hold("noise", self.noise())
        key = (
            ("generator", *(d.branch() for d in defenses))
            if all(d.captures for d in defenses)
            else None
        )
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
