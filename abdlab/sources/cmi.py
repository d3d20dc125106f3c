"""Contrastive model inversion (Fang et al., IJCAI 2021, arXiv 2105.08584): images that
match the teacher and differ from each other.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class CMI(Pooled):
    """Per round a new generator and its noise are trained to make one batch, which
    joins the pool; then the student learns.

    The batch's loss: ``batch_norm`` x the batch-norm statistics loss + ``one_hot`` x
    cross-entropy with random targets - ``adversarial`` x mean KL(T || S) where both
    predict the same class, all on a global view (shift and flip), + ``contrastive`` x
    :func:`contrastive` between it and a local view (resized crop and flip). What is
    contrasted are means over positions of the inputs of the teacher's batch norms,
    through a head of two layers, against a bank of what earlier rounds' images had.
    Student and teacher are in eval mode there.

    Args:
        shape, rounds, synthesis_steps, kd_steps, synthesis_batch, batch_size, pool, lr,
            momentum, weight_decay, temperature, batch_norm, one_hot, shift, flip: see
            :class:`~abdlab.sources.pooled.Pooled`. Rounds and steps are those of the
            ABD paper.
        generator_lr: Adam with betas (.5, .999) for generator and noise, (.9, .999) for
            the head.
        z: noise dimensions. width: of the generator.
        adversarial, contrastive: weights (0 leaves the student's, or the local view's,
            passes out).
        contrast: temperature of the contrastive term.
        head: dimensions that it is computed in.
        bank: features of at most this many images, the latest ones (bounded memory:
            bank x 2 x channels of all batch norms x 4 bytes, 299 MB for WRN-16-2 when
            full, also in every checkpoint). negatives: drawn from it in each step.
        crop: range of the local view's share of the image's area; its sides' ratio is
            in [3/4, 4/3].

    Deviations from the reference implementation: the generator of a round starts from
    torch's own initialisation (there all weights from a Gaussian of std .02); the
    student's lr goes to 0 by step (there to 2e-4 by epoch); a batch of the student is
    never a small rest; the pool can be bounded.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        rounds: int = 200,
        synthesis_steps: int = 200,
        kd_steps: int = 400,
        synthesis_batch: int = 256,
        batch_size: int = 128,
        pool: int | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        temperature: float = 20.0,
        generator_lr: float = 1e-3,
        z: int = 256,
        width: int = 64,
        batch_norm: float = 1.0,
        one_hot: float = 1.0,
        adversarial: float = 0.5,
        contrastive: float = 0.8,
        contrast: float = 0.1,
        head: int = 128,
        bank: int = 40_960,
        negatives: int = 4096,
        crop: Sequence[float] = (0.25, 1.0),
        shift: int = 4,
        flip: bool = True,
    ):
        super().__init__(
            shape,
            rounds=rounds,
            synthesis_steps=synthesis_steps,
            kd_steps=kd_steps,
            synthesis_batch=synthesis_batch,
            batch_size=batch_size,
            pool=pool,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            temperature=temperature,
            batch_norm=batch_norm,
            one_hot=one_hot,
            shift=shift,
            flip=flip,
        )
        if min(bank, negatives) < 0 or contrast <= 0:
            raise ValueError(
                f"bank and negatives must not be below 0, contrast must be above, not {bank},"
                f" {negatives}, {contrast}"
            )
        if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
            raise ValueError(
                f"crop is a range of shares of the area within (0, 1], not {tuple(crop)}"
            )
        self.generator_lr, self.z, self.width, self.adversarial = (
            generator_lr,
            z,
            width,
            adversarial,
        )
        self.contrastive, self.contrast, self.head_size = contrastive, contrast, head
        self.bank_size, self.negatives, self.crop = bank, negatives, tuple(crop)

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
