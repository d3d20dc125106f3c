"""Supervised training, of a teacher above all, on tensors that lie on the device: a
generator of Step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from abdlab.data import augment, deliver, pick_device
from abdlab.errors import Diverged
from abdlab.features import compiled
from abdlab.features import precision as computing
from abdlab.models import place
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
    exam: Callable[[nn.Module], dict[str, float]] | None = None,
    exam_every: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Iterator[Step]:
    """Train ``model`` in place with SGD and cross-entropy; one Step per epoch.

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
    faster = ExitStack()
    try:
        faster.enter_context(compiled(model, wanted=compile))
        for epoch in range(1, epochs + 1):
            order = deliver(torch.randperm(len(images), generator=rng), images.device)
            total = torch.zeros((), device=device)
            for chosen in order[: per_epoch * batch_size].split(batch_size):
                inputs = augment(images[chosen], shift, flip, rng).to(device)
                with computing(precision, device, model):
                    logits = model(inputs)
                loss = F.cross_entropy(logits, labels[chosen].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                rate.step()
                total += loss.detach()
            mean = total.item() / per_epoch
            if not mean < float("inf"):
                raise Diverged(f"in epoch {epoch} the cross-entropy is {mean}: lower lr ({lr})")
            measured = {}
            if exam and (epoch == epochs or (exam_every and epoch % exam_every == 0)):
                measured = exam(model)
                model.train()
            yield Step(
                epoch,
                epochs,
                {"cross_entropy": mean},
                measured.get("acc"),
                measured.get("asr"),
                seconds=time.perf_counter() - began,
            )
    finally:
        faster.close()
        model.eval()
