"""Wide-ResNet, ResNet, VGG and MobileNetV2 with their normalisation inside.

All of them register their convolutions in the order in which they run, so that "the
last five" means the same to a reader and to the Shuffling Vaccine, and no layer
overwrites another one's output, so that what :func:`abdlab.features.record` kept stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel; mean and std are buffers, so they travel with the
    weights.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Network(nn.Module):
    """What all families share: images (N, channels, H, W) in [0, 1] to logits (N,
    classes).

    They are normalised, made into :meth:`maps`, averaged over all positions and
    classified by one linear layer, ``fc``. ``stages`` name the modules whose outputs
    end each spatial size, largest first: attention transfer compares them.

    Args:
        classes: number of logits.
        channels: of the input images.
        width: channels of the first convolution; each family says how the others scale
            with it.
        mean, std: per channel in [0, 1] units; one number serves all channels.
        sizes: further numbers that must be positive, by name.

    Raises:
        ValueError: when a size is not positive; in the forward pass, on images too
            small for the halvings between the stages.
    """

    stages: tuple[str, ...]

    def __init__(
        self,
        classes: int,
        channels: int,
        width: int,
        mean: Sequence[float],
        std: Sequence[float],
        **sizes: int,
    ):
        super().__init__()
        for name, value in {
            **sizes,
            "classes": classes,
            "channels": channels,
            "width": width,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.normalize = Normalize(mean, std)

    def maps(self, x: Tensor) -> Tensor:
        """The last feature maps (N, C, h, w) of normalised images."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        halvings = len(self.stages) - 1
        if min(x.shape[-2:]) < 2**halvings:
            raise ValueError(
                f"{type(self).__name__} halves its images {halvings} times: they must be at least"
                f" {2**halvings} pixels high and wide, not {x.shape[-2]}x{x.shape[-1]}"
            )
        return self.fc(F.adaptive_avg_pool2d(self.maps(self.normalize(x)), 1).flatten(1))

    def finish(self, inside: int, classes: int) -> None:
        """Add ``fc``, draw the convolutions' weights (He et al. 2015, fan out) and zero
        biases; no layer shall work in place.
        """
        self.fc = nn.Linear(inside, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if hasattr(module, "inplace"):
                module.inplace = False


class Block(nn.Module):
    """Pre-activation block of two 3x3 convolutions; the shortcut is a 1x1 convolution
    where the width changes.
    """

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        same = inside == outside and stride == 1
        # its stride is taken before it: the same numbers, and never oneDNN's strided
        # 1x1 weight gradient (see place)
        self.stride, self.shortcut = (
            stride,
            None if same else nn.Conv2d(inside, outside, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(act))))
        return out + (
            x if self.shortcut is None else self.shortcut(act[:, :, :: self.stride, :: self.stride])
        )


class WideResNet(Network):
    """WRN-d-k (Zagoruyko & Komodakis, BMVC 2016, arXiv 1605.07146).

    Args:
        depth: 6n + 4, at least 10 (n blocks in each of three stages).
        widen: the k of WRN-d-k, at least 1.
        classes, channels, width, mean, std: see :class:`Network`; the stages have
            width*k, 2*width*k, 4*width*k channels.

    Raises:
        ValueError: when the depth is not 6n + 4; on images under 4 pixels high or wide.
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(
        self,
        depth: int,
        widen: int,
        classes: int = 10,
        channels: int = 3,
        width: int = 16,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
    ):
        super().__init__(classes, channels, width, mean, std, widen=widen)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(
                f"a Wide-ResNet's depth is 6n + 4 (10, 16, 22, 28, 34, 40, ...), not {depth}"
            )
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        inside = width
        for stage, (scale, stride) in enumerate(((1, 1), (2, 2), (4, 2)), start=1):
            outside, blocks = width * widen * scale, []
            for i in range((depth - 4) // 6):
                blocks.append(Block(inside, outside, stride if i == 0 else 1))
                inside = outside
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(inside)
        self.finish(inside, classes)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.stage3(self.stage2(self.stage1(self.conv1(x))))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with its batch norm, and a shortcut that is added
    before the last ReLU (He et al., CVPR 2016).

    Where the size changes, the shortcut is a 1x1 convolution with batch norm
    (``project``) or pads with channels of zeros. Names and numbers are those of
    torchvision's block, which adds and rectifies in place and so overwrites outputs.
    """

    def __init__(self, inside: int, outside: int, stride: int, project: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        # the shortcut's stride is taken before it, as in Block
        self.stride, self.downsample = stride, None
        if (inside != outside or stride > 1) and project:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
            )
        elif inside != outside:
            self.downsample = nn.ZeroPad3d(
                (0, 0, 0, 0, 0, outside - inside)
            )  # of (N, C, H, W) it pads C, H and W

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + (skip if self.downsample is None else self.downsample(skip)))


class ResNet(Network):
    """ResNets of basic blocks (He et al., CVPR 2016, arXiv 1512.03385) for small
    images.

    ResNet-20 is the paper's own for CIFAR-10 (section 4.2: three stages, shortcuts
    without weights). ResNet-18 and -34 are its ImageNet networks as they are commonly
    used on CIFAR: the first convolution is 3x3 with stride 1 and no max pool follows.
    State dicts have torchvision's names (and ``normalize``).

    Args:
        blocks: per stage; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34, (3, 3, 3)
            ResNet-20.
        project: shortcuts between stages are 1x1 convolutions (the paper's option B);
            False pads with zeros (option A).
        classes, channels, width, mean, std: see :class:`Network`; the stages have
            width, 2*width, 4*width, ... channels.

    Raises:
        ValueError: on images under 8 (three stages: 4) pixels high or wide.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        project: bool = True,
        classes: int = 10,
        channels: int = 3,
        width: int = 64,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
    ):
        super().__init__(classes, channels, width, mean, std)
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = tuple(f"layer{i}" for i in range(1, len(blocks) + 1))
        inside = width
        for i, (stage, count) in enumerate(zip(self.stages, blocks, strict=True)):
            outside, stride = width * 2**i, 1 if i == 0 else 2
            first = BasicBlock(inside, outside, stride, project)
            self.add_module(
                stage,
                nn.Sequential(
                    first, *(BasicBlock(outside, outside, 1, project) for _ in range(count - 1))
                ),
            )
            inside = outside
        self.finish(inside, classes)

    def maps(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x


class VGG(Network):
    """VGG with batch norm (Simonyan & Zisserman, ICLR 2015, arXiv 1409.1556) for small
    images.

    torchvision's features with two changes: the last of the five max pools is left out,
    since a global average pool takes its place, and one linear layer replaces the
    three, as is common on CIFAR. So 16x16 images reach the last stage as one pixel.

    Args:
        depth: 11 or 16.
        classes, channels, width, mean, std: see :class:`Network`; the stages have width
            times 1, 2, 4, 8 and 8 channels.

    Raises:
        ValueError: for another depth; on images under 16 pixels high or wide.
    """

    def __init__(
        self,
        depth: int,
        classes: int = 10,
        channels: int = 3,
        width: int = 64,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
    ):
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__(classes, channels, width, mean, std)
        plans = {11: "A", 16: "D"}
        if depth not in plans:
            raise ValueError(f"a VGG's depth is 11 or 16, not {depth}")
        plan = [step if step == "M" else step * width // 64 for step in cfgs[plans[depth]][:-1]]
        self.features = make_layers(plan, batch_norm=True)
        self.features[0] = nn.Conv2d(channels, width, 3, padding=1)
        ends = [i - 1 for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        self.stages = tuple(f"features.{i}" for i in (*ends, len(self.features) - 1))
        self.finish(plan[-1], classes)

    def maps(self, x: Tensor) -> Tensor:
        return self.features(x)


class MobileNetV2(Network):
    """MobileNetV2 (Sandler et al., CVPR 2018, arXiv 1801.04381) for small images.

    torchvision's features; deviations, as is common on CIFAR: the first convolution and
    the second group of blocks (24 channels) have stride 1, so that 32x32 images end as
    4x4 maps. No dropout: its random numbers would not be the run's own.

    Args:
        classes, channels, width, mean, std: see :class:`Network`; width/32 is the
            paper's multiplier of all layers but the last convolution, which has at
            least 1280 channels. Channels are rounded to whole numbers, not to multiples
            of 8.

    Raises:
        ValueError: on images under 8 pixels high or wide.
    """

    stages = (
        "features.3",
        "features.6",
        "features.13",
        "features.17",
    )  # the last blocks; features.18 is a lone convolution

    def __init__(
        self,
        classes: int = 10,
        channels: int = 3,
        width: int = 32,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
    ):
        from torchvision.models import mobilenet_v2

        super().__init__(classes, channels, width, mean, std)
        # expansion, channels, blocks, stride: the paper's table 2, with stride 1 before
        # the 24 channels
        groups = [
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        whole = mobilenet_v2(
            weights=None, width_mult=width / 32, inverted_residual_setting=groups, round_nearest=1
        )
        self.features = whole.features
        self.features[0][0] = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.finish(whole.last_channel, classes)

    def maps(self, x: Tensor) -> Tensor:
        return self.features(x)
