import copy

import pytest
import torch
from torch import nn

from abdlab.features import record
from abdlab.models import Normalize, WideResNet, build, normalization


def wrn_parameters(depth, widen, classes=10, channels=3, width=16):
    """The number of weights of WRN-depth-widen, counted from the paper's table: convolutions, batch norms, classifier."""
    blocks, inside = (depth - 4) // 6, width
    total = 9 * channels * width
    for scale in (1, 2, 4):
        outside = scale * width * widen
        for block in range(blocks):
            first = block == 0
            total += 2 * inside + 9 * inside * outside + 2 * outside + 9 * outside * outside
            if first and (inside != outside or scale > 1):
                total += inside * outside
            inside = outside
    return total + 2 * inside + inside * classes + classes


@pytest.mark.parametrize(
    ("depth", "widen", "options"),
    [
        (10, 1, {}),
        (16, 1, {"classes": 43}),
        (16, 2, {}),
        (10, 2, {"width": 8, "channels": 1}),
        (22, 3, {"width": 4}),
        (10, 1, {"width": 1}),
    ],
)
def test_parameter_counts(depth, widen, options):
    model = build(f"wrn-{depth}-{widen}", **options)
    assert sum(p.numel() for p in model.parameters()) == wrn_parameters(depth, widen, **options)


def test_wrn_16_2_has_the_papers_size():
    assert sum(p.numel() for p in build("wrn-16-2").parameters()) == pytest.approx(0.7e6, rel=0.02)


@pytest.mark.parametrize("depth", [4, 9, 11, 17, 0])
def test_a_depth_is_6n_plus_4(depth):
    with pytest.raises(ValueError, match=rf"depth is 6n \+ 4 .*, not {depth}"):
        WideResNet(depth, 1)


@pytest.mark.parametrize("bad", [{"widen": 0}, {"classes": 0}, {"channels": 0}, {"width": 0}])
def test_sizes_are_positive(bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        WideResNet(10, **{"widen": 1, **bad})


@pytest.mark.parametrize("name", ["wrn-16", "resnet-18-1", "wrn-16-2-1", "wrn", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="models are named wrn-DEPTH-WIDEN"):
        build(name)


def test_a_name_with_a_wrong_depth():
    with pytest.raises(ValueError, match="not 12"):
        build("wrn-12-1")


def test_stages_halve_the_side_and_double_the_channels():
    model = build("wrn-10-2", width=4, channels=1).eval()
    with record(model, model.stages) as acts:
        logits = model(torch.rand(3, 1, 16, 12))
    assert {name: tuple(act.shape) for name, act in acts.items()} == {
        "stage1": (3, 8, 16, 12),
        "stage2": (3, 16, 8, 6),
        "stage3": (3, 32, 4, 3),
    }
    assert logits.shape == (3, 10)


def test_blocks_per_stage_and_shortcuts():
    model = build("wrn-16-1", width=4)
    assert [len(getattr(model, stage)) for stage in model.stages] == [2, 2, 2]
    shortcuts = [[block.shortcut is not None for block in getattr(model, stage)] for stage in model.stages]
    assert shortcuts == [[False, False], [True, False], [True, False]]


def test_normalize_by_hand():
    layer = Normalize((0.5, 0.2), (0.25, 0.1))
    x = torch.tensor([0.75, 0.1]).view(1, 2, 1, 1)
    assert layer(x).flatten().tolist() == pytest.approx([1.0, -1.0])


def test_normalisation_is_inside_the_model():
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    model = build("wrn-10-1", width=4, mean=mean, std=std).eval()
    plain = build("wrn-10-1", width=4, mean=(0.0,), std=(1.0,)).eval()  # the same weights: the seed is the same
    x = torch.rand(4, 3, 8, 8)
    normalised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(model(x), plain(normalised), atol=1e-6)
    assert {"normalize.mean", "normalize.std"} <= model.state_dict().keys()


def test_the_mean_image_is_the_zero_of_the_network():
    model = build("wrn-10-1", width=4, mean=(0.3,), std=(0.2,), channels=1).eval()
    with record(model, ["conv1"]) as acts:
        model(torch.full((1, 1, 8, 8), 0.3))
    assert acts["conv1"].abs().max() < 1e-6


def test_build_draws_from_its_seed_alone():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, second, other = build("wrn-10-1", width=4), build("wrn-10-1", width=4), build("wrn-10-1", width=4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_card_rebuilds_the_model():
    model = build("WRN-10-1", width=4, classes=3, channels=1, mean=(0.1,), std=(0.3,), seed=5)
    again = build(**model.card)
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [(k, v.shape) for k, v in model.state_dict().items()]
    assert torch.equal(again.normalize.std, model.normalize.std)
    assert model.card["name"] == "wrn-10-1"


def test_a_copied_model_answers_alike():
    model = build("wrn-10-1", width=4).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_normalization_reads_the_models_own_layer():
    assert normalization(build("wrn-10-1", width=4, channels=1, mean=(0.25,), std=(0.5,)), 1) == ([0.25], [0.5])
    assert normalization(build("wrn-10-1", width=4, mean=(0.25,), std=(0.5,)), 3) == ([0.25] * 3, [0.5] * 3)
    assert normalization(nn.Linear(2, 2), 2) == ([0.5, 0.5], [0.25, 0.25])
