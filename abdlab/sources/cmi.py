"""Contrastive model inversion (Fang et al., IJCAI 2021, arXiv 2105.08584): images that
match the teacher and differ from each other.

What is contrasted are means over positions of the inputs of the teacher's batch norms,
through a head of two layers, against a bank of what earlier rounds' images had. Student
and teacher are in eval mode while images are made. Rounds and steps are those of the
ABD paper. Adam has betas (.5, .999) for generator and noise, (.9, .999) for the head;
the local view's sides have a ratio in [3/4, 4/3].

Deviations from the reference implementation: the generator of a round starts from
torch's own initialisation (there all weights from a Gaussian of std .02); the student's
lr goes to 0 by step (there to 2e-4 by epoch); a batch of the student is never a small
rest; the pool can be bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from abdlab.data import deliver, random_views
from abdlab.features import frozen, full, mode
from abdlab.models import memory_format, seeded
from abdlab.optim import load_optimizer
from abdlab.sources.generator import Generator
from abdlab.sources.objectives import disagreement, norm_inputs
from abdlab.sources.pooled import Pooled, latest


def instance_means(inputs: dict[str, Tensor]) -> Tensor:
    """What entered each batch norm, (B, C) or (B, C, ...), averaged over positions and
    concatenated: (B, sum of C).
    """
    return torch.cat(
        [full(x).flatten(2).mean(2) if x.ndim > 2 else full(x) for x in inputs.values()], dim=1
    )


def contrastive(
    local: Tensor, whole: Tensor, bank_local: Tensor, bank_whole: Tensor, temperature: float
) -> Tensor:
    """Each local view is to be told from all others by its own global one; a scalar, in
    nats.

    Cross-entropy over the cosine similarities with all global views, divided by
    ``temperature``: its mean over the batch, plus its mean over the bank when that is
    not empty. Only local views take a gradient.

    Args:
        local, whole: (B, d) of unit length, of the batch. bank_local, bank_whole: (N,
            d), of earlier images; N may be 0.
    """
    with torch.autocast(local.device.type, enabled=False):  # a loss
        logits = (
            torch.cat([local, bank_local]) @ torch.cat([whole, bank_whole]).detach().T / temperature
        )
    losses = F.cross_entropy(
        logits, torch.arange(len(logits), device=logits.device), reduction="none"
    )
    new, old = losses[: len(local)], losses[len(local) :]
    return new.mean() + old.mean() if len(old) else new.mean()


class _Maker(nn.Module):
    """A generator, the noise that is trained with it, and the head that judges what it
    makes.
    """

    def __init__(self, generator: nn.Module, z: Tensor, head: nn.Module):
        super().__init__()
        self.generator, self.z, self.head = generator, nn.Parameter(z), head

    def forward(self) -> Tensor:
        return self.generator(self.z)


@dataclass(kw_only=True, eq=False, repr=False)
class CMI(Pooled):
    """Per round a new generator and its noise are trained to make one batch, which
    joins the pool; then the student learns from the pool.

    The batch's loss, on a global view (shift and flip): ``batch_norm`` x the batch-norm
    statistics loss + ``one_hot`` x cross-entropy with random targets - ``adversarial``
    x mean KL(T || S) where both predict the same class; + ``contrastive`` x
    :func:`contrastive` between it and a local view (resized crop and flip).

    Args:
        shape, rounds, synthesis_steps, kd_steps, synthesis_batch, batch_size, pool, lr,
            temperature, batch_norm, one_hot, shift, flip: see
            :class:`~abdlab.sources.pooled.Pooled`.
        generator_lr: Adam. z: noise dimensions. width: of the generator.
        adversarial, contrastive: weights; 0 leaves their passes out.
        bank: features of at most this many images, the latest, are contrasted with
            (WRN-16-2: 299 MB when full, also in every checkpoint). Once started, the
            features themselves.
        negatives: drawn from it in each step.

    Deviations, and the constants of the contrastive term, stand at the top of the file.

    >>> from abdlab import build, distill
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> sizes = dict(rounds=1, synthesis_steps=2, kd_steps=2, synthesis_batch=4, width=2)
    >>> steps = list(distill(teacher, student, CMI((1, 8, 8), **sizes)))
    >>> sorted(steps[-1].losses)
    ['adversarial', 'batch_norm', 'contrastive', 'kd', 'one_hot']
    """

    #: temperature of the contrastive term, the dimensions that it is computed in, and
    #: the range of the local view's share of the image's area (the paper's)
    contrast, head_size, crop = 0.1, 128, (0.25, 1.0)

    rounds: int = 200
    synthesis_steps: int = 200
    kd_steps: int = 400
    synthesis_batch: int = 256
    batch_size: int = 128
    lr: float = 0.1
    temperature: float = 20.0
    generator_lr: float = 1e-3
    z: int = 256
    width: int = 64
    batch_norm: float = 1.0
    one_hot: float = 1.0
    adversarial: float = 0.5
    contrastive: float = 0.8
    bank: int = 40_960
    negatives: int = 4096
    shift: int = 4
    flip: bool = True

    def __post_init__(self):
        super().__post_init__()
        if min(self.bank, self.negatives) < 0:
            raise ValueError(
                f"bank and negatives must not be below 0, not {self.bank} and {self.negatives}"
            )
        self.bank_size = self.bank  # the setting; ``bank`` is the features once there are some

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        wide = sum(self.channels.values())
        with seeded(seed):
            self.head = nn.Sequential(
                nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, self.head_size)
            ).to(device)
        self.head_optimizer = Adam(self.head.parameters(), lr=self.generator_lr, fused=True)
        self.bank = torch.empty(0, 2, wide, device=device)

    def begin(self):
        channels = self.shape[0]
        with seeded(int(torch.randint(2**62, (1,), generator=self.rng))):
            generator = Generator(
                self.shape, self.z, self.width, [0.0] * channels, [1.0] * channels, output="sigmoid"
            )
        z = torch.randn(self.synthesis_batch, self.z, generator=self.rng)
        maker = (
            _Maker(generator, z, self.head)
            .to(self.device, memory_format=memory_format(self.student))
            .train()
        )
        adam = Adam(
            [*maker.generator.parameters(), maker.z],
            lr=self.generator_lr,
            betas=(0.5, 0.999),
            fused=True,
        )
        return maker, [adam, self.head_optimizer]

    def terms(self, images, targets):
        view = random_views(images, self.rng, shift=self.shift, flip=self.flip)
        logits, inputs, losses = self.inversion(view, targets)
        if self.adversarial:
            with mode(self.student, training=False), frozen(self.student):
                losses["adversarial"] = self.adversarial * disagreement(
                    logits, self.student(view), agreeing_only=True
                )
        if not self.contrastive:
            return view, logits, losses, None
        with norm_inputs(self.teacher) as local_inputs:
            self.teacher(
                random_views(
                    images, self.rng, scale=self.crop, ratio=(3 / 4, 4 / 3), flip=self.flip
                )
            )
        local, whole = (
            instance_means(local_inputs),
            instance_means({k: x.detach() for k, x in inputs.items()}),
        )
        past = self.bank[
            deliver(
                torch.randperm(len(self.bank), generator=self.rng)[: self.negatives], self.device
            )
        ]
        with torch.no_grad():
            wholes = self._project(torch.cat([whole, past[:, 1]])).split([len(whole), len(past)])
        locals_ = self._project(torch.cat([local, past[:, 0]])).split([len(local), len(past)])
        losses["contrastive"] = self.contrastive * contrastive(
            locals_[0], wholes[0], locals_[1], wholes[1], self.contrast
        )
        return view, logits, losses, torch.stack([local.detach(), whole], dim=1)

    def remember(self, memory):
        if memory is not None and self.bank_size:
            self.bank = latest(self.bank, memory, self.bank_size)

    def state(self):
        return {
            **super().state(),
            "bank": self.bank,
            "head": self.head.state_dict(),
            "head_optimizer": self.head_optimizer.state_dict(),
        }

    def restore(self, state):
        super().restore(state)
        self.bank = state["bank"].to(self.device)
        self.head.load_state_dict(state["head"])
        load_optimizer(self.head_optimizer, state["head_optimizer"])

    def _project(self, features: Tensor) -> Tensor:
        """(N, features) to (N, head) of unit length; like a dead attention map, a dead
        answer must not send gradients to infinity.
        """
        return F.normalize(full(self.head(features)), dim=1, eps=1e-6)
