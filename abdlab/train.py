"""Supervised training, of a teacher above all, on tensors that lie on the device: a
generator of Step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from abdlab.data import augment, deliver, pick_device
from abdlab.errors import Diverged
from abdlab.features import compiled
from abdlab.features import precision as computing
from abdlab.models import place
from abdlab.objectives import Objective
from abdlab.optim import sgd
from abdlab.stream import Step


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 200,
    batch_size: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str = "cosine",
    shift: int = 0,
    flip: bool = False,
    precision: str = "float32",
    compile: bool = False,
    objective: Objective | None = None,
    exam: Callable[[nn.Module], dict[str, float]] | None = None,
    exam_every: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Iterator[Step]:
    """Train ``model`` in place with SGD; one Step per epoch, whose losses are means over
    its mini-batches.

    Args:
        images, labels: (N, C, H, W) in [0, 1] and (N,), poisoned or not.
        epochs, batch_size, lr, momentum, weight_decay: the paper's teachers have the
            defaults.
        schedule: "cosine" (to 0, per step) or "onecycle" (``lr`` is its peak).
        shift, flip: augmentation, as in the data set's own fields.
        precision: of the passes, "float32" or "bf16"
            (:func:`abdlab.features.precision`); exams are held in float32.
        compile: run the model through torch.compile, which takes a minute or more
            first: the same numbers up to round-off.
        objective: what is minimised (:mod:`abdlab.objectives`); None: cross-entropy.
        exam: measures the model, every ``exam_every`` epochs and at the end.
        seed: of order and augmentation.

    Raises:
        Diverged: when the loss is not finite.
        ValueError: for an unknown schedule or precision, or labels that do not match
            the images.
    """
    if schedule not in ("cosine", "onecycle"):
        raise ValueError(f"schedule is 'cosine' or 'onecycle', not {schedule!r}")
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"images and labels must be as many and not none, got {len(images)} and {len(labels)}"
        )
    device = pick_device(device)
    place(model, device, precision).train()
    batch_size = min(batch_size, len(images))
    per_epoch = len(images) // batch_size
    optimizer = sgd(model, lr, momentum, weight_decay, nesterov=True)
    if schedule == "cosine":
        rate = CosineAnnealingLR(optimizer, epochs * per_epoch)
    else:
        rate = OneCycleLR(
            optimizer, max_lr=lr, total_steps=epochs * per_epoch, cycle_momentum=False
        )
    rng, began = torch.Generator().manual_seed(seed), time.perf_counter()
    objective, faster = Objective() if objective is None else objective, ExitStack()
    # draws of its own, so that order and augmentation are the same for every objective
    objective.start(model, images, labels, torch.Generator().manual_seed(seed + 1))
    try:
        faster.enter_context(compiled(model, wanted=compile))
        for epoch in range(1, epochs + 1):
            order = deliver(torch.randperm(len(images), generator=rng), images.device)
            totals: dict[str, Tensor] = {}
            for chosen in order[: per_epoch * batch_size].split(batch_size):
                inputs = augment(images[chosen], shift, flip, rng).to(device)
                with computing(precision, device, model):
                    losses = objective.losses(model, inputs, labels[chosen].to(device))
                optimizer.zero_grad(set_to_none=True)
                sum(losses.values()).backward()
                optimizer.step()
                rate.step()
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0) + loss.detach()
            means = {name: total.item() / per_epoch for name, total in totals.items()}
            for name, mean in means.items():
                if not mean < float("inf"):
                    told = name.replace("_", "-")
                    raise Diverged(f"in epoch {epoch} the {told} is {mean}: lower lr ({lr})")
            measured = {}
            if exam and (epoch == epochs or (exam_every and epoch % exam_every == 0)):
                measured = exam(model)
                model.train()
            yield Step(
                epoch,
                epochs,
                means,
                measured.get("acc"),
                measured.get("asr"),
                seconds=time.perf_counter() - began,
            )
    finally:
        faster.close()
        objective.finish(model)
        model.eval()
