"""One photograph as the only data (Asano & Saeed, ICLR 2023, arXiv 2112.00725): patches
of it, whatever the teacher was trained on. The more it shows, the better.

The settings are those of ABD: 50,000 patches as in the paper's code, 300 epochs, lr
halved at epochs 150 and 300.

Deviations: the paper's code also shears, and crops the photograph to half of its
shorter side before each patch; patches here have no black corners. The paper's own
distillation is longer (1,000 epochs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR

from abdlab.data import augment, deliver
from abdlab.home import at_home
from abdlab.losses import kl
from abdlab.models import seeded
from abdlab.sources.source import Batch, Source

#: photographs that scikit-learn brings along, 427x640 pixels each
EMBEDDED = ("china", "flower")


def photograph(image: str | Path) -> Tensor:
    """A photograph as uint8 (3, H, W): one of :data:`EMBEDDED`, or a file.

    Raises:
        FileNotFoundError: when ``image`` is neither.
        ValueError: when the file is no readable image.
    """
    from PIL import Image, UnidentifiedImageError

    if str(image) in EMBEDDED:
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{image}.jpg")
    elif not (file := at_home(image)).is_file():
        raise FileNotFoundError(
            f"there is no image {str(image)!r}: name a file, or an embedded photograph:"
            f" {', '.join(EMBEDDED)}"
        )
    else:
        try:
            with Image.open(file) as opened:
                pixels = np.asarray(opened.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{image} is not a readable image: {error}") from error
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def make_patches(
    photo: Tensor,
    count: int,
    shape: Sequence[int],
    seed: int,
    scale: Sequence[float],
    degrees: float,
    jitter: float,
) -> Tensor:
    """``count`` patches of one photograph, uint8 (count, C, H, W) on the CPU, each by
    its own draws from ``seed``.

    A crop of ``scale`` of the photograph's area (aspect 3/4 to 4/3), resized so large
    that no corner is black after the rotation by up to +-``degrees``; then the centre
    of (H, W), and colour jitter half of the time: brightness, contrast and saturation
    by up to ``jitter``, hue by a quarter of it. One channel: grey.
    """
    from torchvision.transforms import v2  # a second of CPU, for this source alone

    channels, *size = shape
    if channels == 1:
        photo = v2.functional.rgb_to_grayscale(photo)
    larger = []
    for side, other in (size, size[::-1]):
        # the box around a turned patch grows until its diagonal stands upright; a pixel
        # more for the interpolation
        angle = min(math.radians(degrees), math.atan2(other, side))
        larger.append(
            math.ceil(side * math.cos(angle) + other * math.sin(angle)) + (1 if degrees else 0)
        )
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(larger, scale=tuple(scale), antialias=True),
            v2.RandomRotation(degrees, interpolation=v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(size),
            v2.RandomApply([v2.ColorJitter(jitter, jitter, jitter, min(jitter / 4, 0.5))], 0.5),
        ]
    )
    patches = torch.empty(count, *shape, dtype=torch.uint8)
    with seeded(seed):
        for patch in patches:
            patch.copy_(transform(photo))
    return patches


def cutmix(images: Tensor, beta: float, rng: torch.Generator) -> tuple[Tensor, float]:
    """CutMix (Yun et al., ICCV 2019, arXiv 1905.04899) without labels: the teacher
    answers to the mixed image.

    One box for the whole batch, of about 1 - lambda of the area, lambda ~ Beta(beta,
    beta), around a uniform centre; in it, every image shows another one of the batch.

    Args:
        images: (B, C, H, W); not changed.
        rng: a CPU generator.

    Returns:
        (B, C, H, W), and lambda: the exact share of its pixels that each image keeps,
        after the image's border cut the box.
    """
    height, width = images.shape[-2:]
    # torch has no Beta distribution that takes a generator
    share = np.random.default_rng(int(torch.randint(2**62, (), generator=rng))).beta(beta, beta)
    order = deliver(torch.randperm(len(images), generator=rng), images.device)
    box = []
    for side in (height, width):
        half, centre = (
            round(side * math.sqrt(1 - share)) / 2,
            int(torch.randint(side, (), generator=rng)),
        )
        box.append(slice(max(0, centre - math.floor(half)), min(side, centre + math.ceil(half))))
    mixed = images.clone()
    mixed[:, :, box[0], box[1]] = images[order][:, :, box[0], box[1]]
    pasted = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
    return mixed, 1 - pasted / (height * width)


@dataclass(kw_only=True, eq=False, repr=False)
class OOD(Source):
    """The student agrees with the teacher on patches of one photograph, which need not
    show anything that the teacher knows.

    The patches are made once per run, on the CPU (about 1 ms each), and stay on the
    device as uint8: 50,000 of 3x32x32 take 154 MB. Each pseudo-batch is one student
    step on patches in random order, mixed by CutMix.

    Loss: KL(T || S) at the temperature, mean over batch and classes, without T^2.

    Args:
        shape: (channels, height, width) of the patches; 1 channel is grey, 3 are
            colour.
        image: "china" or "flower", scikit-learn's photographs, or an image's path.
        patches: how many are made.
        epochs: passes over them. batch_size: at most ``patches``.
        lr: Adam. drops, gamma: shares of the run after which lr is multiplied by gamma.
        temperature: of the KD loss.
        class_mean: the KD loss is also divided by the number of classes (the official
            code); False: summed over classes.
        cutmix_share: share of the pseudo-batches that CutMix mixes.
        shift, flip: augmentation of every batch.

    Deviations stand at the top of the file.

    Raises:
        FileNotFoundError, ValueError: when the photograph cannot be read, at once.

    >>> source = OOD((1, 8, 8), patches=40, batch_size=10, epochs=2)
    >>> len(source)
    8
    """

    captures = True
    #: of a patch: the range of the share of the photograph's area that it shows, its
    #: largest rotation in degrees, its largest change of colour (of hue: a quarter). The
    #: paper has all three; how much is ours
    scale, degrees, jitter = (0.002, 1.0), 30.0, 0.4
    #: of CutMix's Beta distribution (paper)
    cutmix_beta = 0.25

    shape: Sequence[int] = field(kw_only=False)
    image: str | Path = "china"
    patches: int = 50_000
    epochs: int = 300
    batch_size: int = 512
    lr: float = 1e-3
    drops: Sequence[float] = (0.5, 1.0)
    gamma: float = 0.5
    temperature: float = 8.0
    class_mean: bool = True
    cutmix_share: float = 1.0
    shift: int = 0
    flip: bool = True

    def __post_init__(self):
        if len(self.shape) != 3 or self.shape[0] not in (1, 3) or min(self.shape) < 1:
            raise ValueError(
                f"shape is (channels, height, width) with 1 or 3 channels, not {tuple(self.shape)}"
            )
        if self.epochs < 1 or not 2 <= self.batch_size <= self.patches:
            raise ValueError(
                "epochs must be at least 1 and batch_size from 2 to the number of patches, not"
                f" {self.epochs} and {self.batch_size} of {self.patches}"
            )
        if not 0 <= self.cutmix_share <= 1:
            raise ValueError(
                f"cutmix_share is a share of the pseudo-batches in [0, 1], not {self.cutmix_share}"
            )
        self.shape, self.photo = tuple(self.shape), photograph(self.image)

    @property
    def per_epoch(self) -> int:
        return self.patches // self.batch_size

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def start(self, teacher, student, device, seed):
        super().start(teacher, student, device, seed)
        pool = make_patches(
            self.photo, self.patches, self.shape, seed, self.scale, self.degrees, self.jitter
        )
        self.pool = pool.to(device)
        self.order, self.position = torch.empty(0, dtype=torch.long), self.per_epoch

    def optimizer(self, student):
        adam = Adam(student.parameters(), lr=self.lr, fused=True)
        return adam, MultiStepLR(
            adam, [round(share * len(self)) for share in self.drops], self.gamma
        )

    def batch(self, defenses: Sequence = ()) -> Batch:
        if self.position == self.per_epoch:
            self.order, self.position = torch.randperm(self.patches, generator=self.rng), 0
        chosen = self.order[self.position * self.batch_size : (self.position + 1) * self.batch_size]
        self.position += 1
        images = self._mixed(chosen, self.rng)
        with torch.no_grad():
            logits = self.teacher(images)
        return Batch(images, logits, synthesised=False)

    def student_loss(self, batch: Batch):
        logits = self.student(batch.images)
        kd = kl(batch.logits, logits, self.temperature)
        return logits, kd / logits.shape[1] if self.class_mean else kd, {}

    def synthesize(self, n: int, seed: int = 0) -> Tensor:
        """``n`` images (n, C, H, W) such as the student sees, without touching the
        run's own random numbers.
        """
        rng = torch.Generator().manual_seed(seed)
        return self._mixed(torch.randint(self.patches, (n,), generator=rng), rng)

    def state(self):
        # the patches themselves are made again from the seed
        return {**super().state(), "order": self.order, "position": self.position}

    def restore(self, state):
        super().restore(state)
        self.order, self.position = state["order"].cpu(), state["position"]

    def _mixed(self, chosen: Tensor, rng: torch.Generator) -> Tensor:
        images = self.pool[deliver(chosen, self.pool.device)].float() / 255
        images = augment(images, self.shift, self.flip, rng)
        if self.cutmix_share and torch.rand((), generator=rng) < self.cutmix_share:
            images, _ = cutmix(images, self.cutmix_beta, rng)
        return images
