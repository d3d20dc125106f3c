"""What every purifier is: a teacher in, a new one out, before anybody learns from it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from abdlab.probe import classes_of
from abdlab.purifiers.pool import synthetic_pool


class Purifier:
    """Base class. A purifier sees a network and what it makes from it itself; never
    clean or triggered data. Subclasses define :meth:`clean`.
    """

    #: what a reader of the results must know of the latest call, plain values only
    report: dict

    def needs_pool(self, teacher: nn.Module) -> bool:
        """Whether it looks at the synthetic images of this teacher at all."""
        return True

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def passes(self, classes: int) -> int:
        """About how many images go forwards and backwards through a network of so many
        classes, those of the pool not counted: for estimates of time.
        """
        return 1920

    def clean(
        self, model: nn.Module, origin: nn.Module, pool: Tensor, rng: torch.Generator
    ) -> dict:
        """Change ``model``, a copy in eval mode with weights that take gradients, in
        place; returns the report.

        Args:
            origin: a frozen copy of the teacher as it was before any purifier.
            pool: (N, C, H, W) synthetic images of it; none, N = 0, where
                :meth:`needs_pool` says so.
            rng: draws all random numbers.
        """
        raise NotImplementedError

    def purify(
        self,
        teacher: nn.Module,
        shape: Sequence[int],
        *,
        pool: Tensor | None = None,
        origin: nn.Module | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> nn.Module:
        """A purified copy of the teacher on ``device``, in eval mode, frozen. The
        teacher stays as it is.

        Its ``purified`` attribute lists what was done, one dict per purifier, for the
        card of its file.

        Args:
            teacher: maps images (N, C, H, W) in [0, 1] to logits.
            shape: (C, H, W).
            origin: the teacher before other purifiers changed it; None: ``teacher``.
            pool: synthetic images (N, C, H, W) of the origin; None makes them.

        Raises:
            RuntimeError: when the teacher's weights changed: a purifier's error.
        """
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        origin = copy.deepcopy(teacher if origin is None else origin).to(device)
        origin.requires_grad_(False).eval()
        model = copy.deepcopy(teacher).to(device)
        model.purified = list(getattr(teacher, "purified", ()))
        model.requires_grad_(True).eval()
        for network in (origin, model):
            classes_of(network, torch.zeros(2, *shape, device=device), "the teacher")
        if pool is None:
            pool = torch.empty(0, *shape)
            if self.needs_pool(teacher):
                pool = synthetic_pool(origin, shape, device=device, seed=seed)
        rng = torch.Generator().manual_seed(seed)
        self.report = self.clean(model, origin, pool.to(device), rng)
        after = teacher.state_dict()
        if not all(torch.equal(value, after[key]) for key, value in before.items()):
            raise RuntimeError(f"{self.name} changed the teacher that it was to copy")
        model.purified = [*model.purified, {"name": self.name, **self.report}]
        return model.eval().requires_grad_(False)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models are the same network with the same weights."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
