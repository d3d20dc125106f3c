"""Trigger-activated change by hand, spatial maps, and Grad-CAM against its definition."""

import pytest
import torch
from torch import nn

from abdlab import activations


class Tiny(nn.Module):
    """1x1 convolution to two channels (x, 2x), mean over positions as logits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_change_per_channel_by_hand():
    clean, triggered = torch.ones(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    triggered[:, :, 0, 0] = 4  # one pixel moves by 3: norms 3 and 6
    assert activations.triggered_change(Tiny(), clean, triggered, relative=False)[
        "conv"
    ].tolist() == [3, 6]
    # clean norms are 2 and 4 per image, 3 on average
    assert activations.triggered_change(Tiny(), clean, triggered)["conv"].tolist() == [1, 2]


def test_in_how_many_channels_a_change_lives_by_hand():
    # (1 + 4)^2 / (1 + 16)
    assert activations.participation(torch.tensor([1.0, 2.0])) == pytest.approx(25 / 17)
    assert activations.participation(7 * torch.tensor([1.0, -2.0])) == pytest.approx(25 / 17)
    assert activations.participation(torch.ones(5)) == pytest.approx(5)
    assert activations.participation(torch.tensor([0.0, 3.0, 0.0])) == pytest.approx(1)
    assert activations.participation(torch.zeros(3)) == 0


def test_change_does_not_depend_on_the_batch_size():
    x, y = torch.rand(7, 1, 4, 4), torch.rand(7, 1, 4, 4)
    whole = activations.triggered_change(Tiny(), x, y, batch=100)["conv"]
    torch.testing.assert_close(activations.triggered_change(Tiny(), x, y, batch=2)["conv"], whole)


def test_change_refuses_sets_that_do_not_match():
    with pytest.raises(ValueError, match="the same images"):
        activations.triggered_change(Tiny(), torch.rand(2, 1, 4, 4), torch.rand(3, 1, 4, 4))


def test_spatial_map_points_at_the_bright_pixel():
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 1, 2] = 3
    found = activations.spatial_map(Tiny(), image, "conv")
    assert found.shape == (1, 4, 4)
    assert found[0, 1, 2] == 1
    assert found.sum() == 1


def test_grad_cam_equals_its_definition_and_leaves_the_model_alone():
    model = Tiny().requires_grad_(False)
    image = torch.rand(2, 1, 4, 4)
    found = activations.grad_cam(model, image, "conv", 1)
    # d logit_1 / d channel is 0 for channel 0 and 1/16 for channel 1: the map is
    # channel 1, 2x, scaled to 1
    expected = image[:, 0] / image[:, 0].amax((1, 2), keepdim=True)
    torch.testing.assert_close(found, expected)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert not model.conv._forward_hooks
    assert not model.conv._backward_hooks


def test_convolutions_are_found_by_type():
    assert activations.convolutions(
        nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv1d(1, 1, 1))
    ) == ["0", "2"]


class Tokens(torch.nn.Module):
    """A network with tokens in place of maps, as a ViT has."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Linear(16, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.embed(x.flatten(2)).mean(1))


MAPS = {
    "map": activations.spatial_map,
    "cam": lambda *given: activations.grad_cam(*given, 0),
}


@pytest.mark.parametrize("draw", MAPS.values(), ids=MAPS)
def test_a_layer_without_a_map_is_one_sentence(draw):
    with pytest.raises(ValueError, match="embed of Tokens has no spatial map"):
        draw(Tokens(), torch.rand(2, 3, 4, 4), "embed")
