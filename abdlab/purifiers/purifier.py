"""What every purifier is: a teacher in, a new one out, before anybody learns from it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from abdlab.features import mode
from abdlab.purifiers.pool import synthetic_pool


class Purifier:
    """Base class. A purifier sees a network and what it makes from it itself; never
    clean or triggered data. Subclasses define :meth:`clean`.
    """

    #: what a reader of the results must know of the latest call, plain values only
    report: dict

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def clean(self, model: nn.Module, pool: Tensor, rng: torch.Generator) -> dict:
        """Change ``model``, a copy of the teacher in eval mode with weights that take
        gradients, in place; returns the report.

        Args:
            pool: (N, C, H, W) synthetic images of this very model.
            rng: draws all random numbers.
        """
        raise NotImplementedError

    def purify(
        self,
        teacher: nn.Module,
        shape: Sequence[int],
        *,
        pool: Tensor | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> nn.Module:
        """A purified copy of the teacher on ``device``, in eval mode, frozen. The
        teacher stays as it is.

        Its ``purified`` attribute lists what was done, one dict per purifier, for the
        card of its file.

        Args:
            teacher: maps images (N, C, H, W) in [0, 1] to logits.
            shape: (C, H, W). pool: synthetic images of the teacher (N, C, H, W);
                None makes them.

        Raises:
            RuntimeError: when the teacher's weights changed: a purifier's error.
        """
        before = {key: value.clone() for key, value in teacher.state_dict().items()}
        model = copy.deepcopy(teacher).to(device)
        model.requires_grad_(True).eval()
        if pool is None:
            pool = synthetic_pool(model, shape, device=device, seed=seed)
        with mode(model, training=False):
            self.report = self.clean(model, pool.to(device), torch.Generator().manual_seed(seed))
        after = teacher.state_dict()
        if any(not torch.equal(value, after[key]) for key, value in before.items()):
            raise RuntimeError(f"{self.name} changed the teacher that it was to copy")
        model.purified = [*getattr(teacher, "purified", ()), {"name": self.name, **self.report}]
        return model.eval().requires_grad_(False)
