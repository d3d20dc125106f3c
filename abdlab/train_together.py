"""Several networks trained at once on one device, each step of each one launch: a poisoned
teacher of CIFAR-10 in a quarter of a minute, five of them in a minute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abdlab import graphs as cuda_graphs
from abdlab.data import deliver, pick_device
from abdlab.errors import Diverged
from abdlab.features import precision as computing
from abdlab.graphs import Phases
from abdlab.models import place
from abdlab.optim import sgd
from abdlab.stream import Step


def moved(images: Tensor, offsets: Tensor, mirrored: Tensor, shift: int) -> Tensor:
    """Each image shifted by its own offset (zeros move in), then mirrored where wanted.

    Args:
        images: (N, C, H, W).
        offsets: int64 (2, N), rows and columns in 0 to 2 x ``shift``; ``shift`` itself
            leaves an image where it is.
        mirrored: (N,), not 0 where an image is mirrored left-right.

    >>> square = torch.arange(4.0).view(1, 1, 2, 2)
    >>> moved(square, torch.tensor([[1], [2]]), torch.tensor([0]), 1).flatten().tolist()
    [1.0, 0.0, 3.0, 0.0]
    """
    n, _, height, width = images.shape
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    across = torch.where(mirrored[:, None] != 0, width - 1 - across, across)
    columns = offsets[1, :, None] + across
    index = torch.arange(n, device=images.device)[:, None, None]
    padded = F.pad(images, [shift] * 4)
    # (N, H, W, C) in memory, which is the channels_last that a GPU's networks have
    found = padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return found if images.is_cuda else found.contiguous()


def rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of one step: straight up to ``peak`` over the first ``warmup``
    of the run, then straight down to 0.

    >>> [round(rate_at(i, 10, 1.0, 0.2), 3) for i in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (steps - step) / max(1, steps - rising)


def train_together(
    models: Sequence[nn.Module],
    sets: Sequence[tuple[Tensor, Tensor]],
    *,
    epochs: int = 24,
    batch_size: int = 512,
    lr: float = 0.4,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup: float = 0.2,
    shift: int = 0,
    flip: bool = False,
    precision: str = "float32",
    graphs: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Iterator[list[Step]]:
    """Train each of ``models`` in place on its own set with SGD (Nesterov) and
    cross-entropy; per epoch, one Step of each.

    All of them see the same order, shifts and mirrorings, drawn once per epoch. On a CUDA
    device each network has a stream of its own; with ``graphs`` a step of it, images
    picked and moved included, is one launch (:mod:`abdlab.graphs`).
    :func:`abdlab.train.train` is for one network at leisure; its schedules are others.

    Args:
        sets: (images (N, C, H, W) in [0, 1], labels (N,)) for each, as many in all; on
            the device.
        lr, warmup: the rate's peak, and the share of the run that leads to it, see
            :func:`rate_at`.
        shift, flip: augmentation, as in the data set's own fields.
        precision: "float32" or "bf16".
        seed: of order and augmentation.

    Raises:
        Diverged: when a loss is not finite.
        ValueError: for sets that are not one per model and equally large; for graphs on
            a device without them.
    """
    device = pick_device(device)
    if graphs:
        cuda_graphs.check(device)
    sizes = {len(tensor) for pair in sets for tensor in pair}
    if not models or len(models) != len(sets) or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"train_together needs one set per model, all equally large and not empty, not"
            f" {len(models)} models and sets of {sorted(sizes)} images and labels"
        )
    count = sizes.pop()
    batch_size = min(batch_size, count)
    per_epoch = count // batch_size
    lanes = [
        _Lane(model, *pair, lr, momentum, weight_decay, shift, precision, graphs, device)
        for model, pair in zip(models, sets, strict=True)
    ]
    rng, began, step = torch.Generator().manual_seed(seed), time.perf_counter(), 0
    try:
        for epoch in range(1, epochs + 1):
            drawn = torch.stack(
                [
                    torch.randperm(count, generator=rng),
                    *torch.randint(0, 2 * shift + 1, (2, count), generator=rng),
                    torch.randint(0, 2 if flip else 1, (count,), generator=rng),
                ]
            )
            drawn = deliver(drawn, device)
            for lane in lanes:
                lane.begin()
            for part in drawn[:, : per_epoch * batch_size].split(batch_size, dim=1):
                rate = rate_at(step, epochs * per_epoch, lr, warmup)
                for lane in lanes:
                    lane.step(part, rate)
                step += 1
            # the draws stay until all lanes are through with them: this waits
            means = [lane.end() / per_epoch for lane in lanes]
            for number, mean in enumerate(means):
                if not mean < float("inf"):
                    raise Diverged(
                        f"in epoch {epoch} the cross-entropy of network {number} is {mean}: lower"
                        f" lr ({lr})"
                    )
            passed = time.perf_counter() - began
            yield [Step(epoch, epochs, {"cross_entropy": mean}, seconds=passed) for mean in means]
    finally:
        for lane in lanes:
            lane.phases = Phases()  # graphs hold memory of their own
            lane.model.eval()


class _Lane:
    """One network, its set and its stream."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        lr: float,
        momentum: float,
        weight_decay: float,
        shift: int,
        precision: str,
        graphs: bool,
        device: torch.device,
    ):
        self.model = place(model, device, precision).train().requires_grad_(True)
        self.images, self.labels = images.to(device), labels.to(device)
        self.optimizer = sgd(model, lr, momentum, weight_decay, nesterov=True)
        self.shift, self.precision, self.device = shift, precision, device
        self.phases, self.total = Phases(graphs), torch.zeros((), device=device)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None

    def on_stream(self):
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def begin(self) -> None:
        """A new epoch, whose draws were put on the device by the current stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with self.on_stream():
            self.total.zero_()

    def step(self, drawn: Tensor, rate: float) -> None:
        """``drawn``: (4, batch): which images, their offsets, whether mirrored."""
        with self.on_stream():
            drawn = self.phases.hold("drawn", drawn)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.phases.run("step", lambda: self._step(drawn), [self.optimizer])

    def _step(self, drawn: Tensor) -> None:
        chosen, offsets, mirrored = drawn[0], drawn[1:3], drawn[3]
        images = moved(self.images[chosen], offsets, mirrored, self.shift)
        with computing(self.precision, self.device, self.model):
            logits = self.model(images)
        loss = F.cross_entropy(logits, self.labels[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def end(self) -> float:
        """The epoch's summed losses; waits for them."""
        with self.on_stream():
            return self.total.item()
