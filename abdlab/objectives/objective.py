"""What every training objective is: a mini-batch in, named losses out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Objective:
    """Base class: cross-entropy alone. :func:`abdlab.train.train` calls :meth:`start` once,
    :meth:`losses` for every mini-batch, and :meth:`finish` at the end, also of a run that
    was stopped.

    >>> class Sure(Objective):  # answers far apart cost nothing: an objective of one's own
    ...     def losses(self, model, images, labels):
    ...         return {"margin": F.multi_margin_loss(model(images), labels)}
    >>> answers = nn.Flatten()  # a network whose logits are its images
    >>> Sure().losses(answers, torch.tensor([[[[3.0, 0.5]]]]), torch.tensor([1]))
    {'margin': tensor(1.7500)}
    """

    #: whether it plants the backdoor by itself: the training set stays clean, and the
    #: teacher's own ASR is to be low
    plants = False

    def start(self, model: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator) -> None:
        """Before the first step.

        Args:
            model: on its device, in train mode.
            images: the whole training set (N, C, H, W), poisoned or not; it may lie on
                another device. labels: (N,).
            rng: a CPU generator of its own, for all that the objective draws.

        Raises:
            ValueError: for a model that it cannot train.
        """
        self.rng = rng

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scalars, each a mean over images, whose sum is minimised.

        The model's running statistics may only record passes that users' images take too.
        """
        return {"cross_entropy": F.cross_entropy(model(images), labels)}

    def finish(self, model: nn.Module) -> None:
        """Leave the model as a plain network of its own kind."""
