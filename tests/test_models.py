"""The model families: sizes, counts and answers against the published networks, and
what the other parts rely on.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abdlab import (
    ZSKT,
    SelfRetrospection,
    ShufflingVaccine,
    distill,
    load_model,
    save_model,
    settings,
)
from abdlab.features import record
from abdlab.models import (
    MODELS,
    VGG,
    BasicBlock,
    Normalize,
    WideResNet,
    build,
    memory_format,
    normalization,
    place,
)

FAMILIES = ["wrn-10-2", "resnet-18", "resnet-20", "resnet-34", "vgg-11", "vgg-16", "mobilenet-v2"]


@pytest.fixture
def seen(wrn):
    """Makes networks in eval mode whose batch-norm layers have seen data;
    ``width=None`` is the published width.
    """
    return wrn


def wrn_parameters(depth, widen, classes=10, channels=3, width=16):
    """The number of weights of WRN-depth-widen, counted from the paper's table:
    convolutions, batch norms, classifier.
    """
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


# weights and convolutions (for 10 classes and 3 channels) at the published width
PUBLISHED = {
    "wrn-16-1": (175_066, 15, 16),  # .18 M
    "wrn-16-2": (691_674, 16, 16),  # .69 M
    "wrn-40-1": (563_930, 39, 16),  # .56 M
    "wrn-40-2": (2_243_546, 40, 16),  # 2.24 M
    "resnet-18": (11_173_962, 20, 64),  # 11.17 M
    "resnet-20": (269_722, 19, 16),  # .27 M in He et al., table 6
    "resnet-34": (21_282_122, 36, 64),  # 21.28 M
    "vgg-11": (9_231_114, 8, 64),  # 9.23 M
    "vgg-16": (14_728_266, 13, 64),  # 14.73 M
    "mobilenet-v2": (
        2_236_682,
        52,
        32,
    ),  # torchvision's 3,504,872 with 10 instead of 1000 classes of 1281 weights each
}


@pytest.mark.parametrize("name", MODELS)
def test_every_name_is_the_published_network(name):
    model = build(name)
    weights, convolutions, width = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == weights
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    assert (
        model.card["width"]
        == width
        == next(m for m in model.modules() if isinstance(m, nn.Conv2d)).out_channels
    )
    assert model.training


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("width", [1, 3, 8])
def test_width_is_the_first_convolutions(name, width):
    model = build(name, width=width, channels=1, classes=4).eval()
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).out_channels == width
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize("depth", [4, 9, 11, 17, 0])
def test_a_depth_is_6n_plus_4(depth):
    with pytest.raises(ValueError, match=rf"depth is 6n \+ 4 .*, not {depth}"):
        WideResNet(depth, 1)


@pytest.mark.parametrize("bad", ["widen", "classes", "channels", "width"])
def test_sizes_are_positive(bad):
    with pytest.raises(ValueError, match=f"{bad} must be at least 1, not 0"):
        WideResNet(10, **{"widen": 1, bad: 0})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bad", ["classes", "channels", "width"])
def test_sizes_are_positive_in_every_family(name, bad):
    with pytest.raises(ValueError, match=f"{bad} must be at least 1, not 0"):
        build(name, **{bad: 0})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet18", "resnet-18"),
        ("resnet-18-1", "resnet-18"),
        ("vgg11_bn", "vgg-11"),
        ("mobilenetv2", "mobilenet-v2"),
        ("wrn-16", "wrn-16-2"),
        ("wrn_16_2", "wrn-16-2"),
        ("wrn-16-2-1", "wrn-16-2"),
    ],
)
def test_unknown_names(name, near):
    with pytest.raises(
        ValueError,
        match=(
            f"did you mean '{near}'.* known are {', '.join(MODELS)}, and any other wrn-DEPTH-WIDEN"
        ),
    ):
        build(name)


@pytest.mark.parametrize("name", ["", "alexnet", "zzz"])
def test_names_that_are_like_no_other(name):
    with pytest.raises(
        ValueError,
        match=f"unknown model '{name}': .*{', '.join(MODELS)}, and any other wrn-DEPTH-WIDEN",
    ):
        build(name)


def test_a_vgg_has_11_or_16_layers():
    with pytest.raises(ValueError, match="depth is 11 or 16, not 12"):
        VGG(12)


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
    shortcuts = [
        [block.shortcut is not None for block in getattr(model, stage)] for stage in model.stages
    ]
    assert shortcuts == [[False, False], [True, False], [True, False]]


def test_normalize_by_hand():
    layer = Normalize((0.5, 0.2), (0.25, 0.1))
    x = torch.tensor([0.75, 0.1]).view(1, 2, 1, 1)
    assert layer(x).flatten().tolist() == pytest.approx([1.0, -1.0])


def test_normalisation_is_inside_the_model():
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    model = build("wrn-10-1", width=4, mean=mean, std=std).eval()
    plain = build(
        "wrn-10-1", width=4, mean=(0.0,), std=(1.0,)
    ).eval()  # the same weights: the seed is the same
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
    first, second, other = (
        build("wrn-10-1", width=4),
        build("wrn-10-1", width=4),
        build("wrn-10-1", width=4, seed=1),
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_card_rebuilds_the_model():
    model = build("WRN-10-1", width=4, classes=3, channels=1, mean=(0.1,), std=(0.3,), seed=5)
    again = build(**model.card)
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in model.state_dict().items()
    ]
    assert torch.equal(again.normalize.std, model.normalize.std)
    assert model.card["name"] == "wrn-10-1"


def test_a_copied_model_answers_alike():
    model = build("wrn-10-1", width=4).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_normalization_reads_the_models_own_layer():
    assert normalization(build("wrn-10-1", width=4, channels=1, mean=(0.25,), std=(0.5,)), 1) == (
        [0.25],
        [0.5],
    )
    assert normalization(build("wrn-10-1", width=4, mean=(0.25,), std=(0.5,)), 3) == (
        [0.25] * 3,
        [0.5] * 3,
    )
    assert normalization(nn.Linear(2, 2), 2) == ([0.5, 0.5], [0.25, 0.25])


def stage_shapes(name, *sizes, channels=3):
    """(channels, height, width) of every stage's output."""
    model = build(name, width=4, channels=channels).eval()
    with record(model, model.stages) as acts:
        assert model(torch.rand(2, channels, *sizes)).shape == (2, 10)
    return [tuple(acts[stage].shape[1:]) for stage in model.stages]


def pyramid(widths, heights, breadths=None):
    return list(zip(widths, heights, breadths or heights, strict=True))


@pytest.mark.parametrize(
    ("names", "widths", "even", "odd"),
    [
        (["wrn-16-2"], (8, 16, 32), (32, 16, 8), ((19, 10, 5), (17, 9, 5))),
        (["resnet-20"], (4, 8, 16), (32, 16, 8), ((19, 10, 5), (17, 9, 5))),
        (
            ["resnet-18", "resnet-34"],
            (4, 8, 16, 32),
            (32, 16, 8, 4),
            ((19, 10, 5, 3), (17, 9, 5, 3)),
        ),
        (["mobilenet-v2"], (3, 4, 12, 40), (32, 16, 8, 4), ((19, 10, 5, 3), (17, 9, 5, 3))),
        (
            ["vgg-11", "vgg-16"],
            (4, 8, 16, 32, 32),
            (32, 16, 8, 4, 2),
            ((19, 9, 4, 2, 1), (17, 8, 4, 2, 1)),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_stages_are_the_ends_of_the_spatial_sizes(names, widths, even, odd):
    for name in names:
        assert stage_shapes(name, 32, 32) == pyramid(widths, even)
        assert stage_shapes(name, 16, 16, channels=1) == pyramid(
            widths, [side // 2 for side in even]
        )
        assert stage_shapes(name, 19, 17) == pyramid(widths, *odd), (
            "strides round up, VGG's pools round down"
        )


@pytest.mark.parametrize(
    ("name", "halvings", "least"),
    [
        ("wrn-10-1", 2, 4),
        ("resnet-20", 2, 4),
        ("resnet-18", 3, 8),
        ("mobilenet-v2", 3, 8),
        ("vgg-11", 4, 16),
    ],
)
def test_images_too_small_for_the_halvings_are_an_error(name, halvings, least):
    model = build(name, width=2).eval()
    assert model(torch.rand(1, 3, least, least)).isfinite().all()
    said = (
        f"halves its images {halvings} times: they must be at least {least} pixels high and wide,"
        f" not {least}x{least - 1}"
    )
    with pytest.raises(ValueError, match=said):
        model(torch.rand(1, 3, least, least - 1))


def with_weights_of(theirs, ours, fc="fc"):
    """Load our weights into another's network by name, with nothing missing and nothing
    left over but our Normalize.
    """
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("normalize")}
    theirs.load_state_dict({k.replace("fc.", f"{fc}."): v for k, v in state.items()})
    return theirs.eval()


@pytest.mark.parametrize("name", ["resnet-18", "resnet-34"])
def test_resnets_equal_torchvisions_with_another_stem(seen, name):
    from torchvision import models

    theirs = getattr(models, name.replace("-", ""))(weights=None, num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours = seen(name, channels=3, width=None)
    x = torch.rand(2, 3, 12, 10)
    torch.testing.assert_close(
        ours(x), with_weights_of(theirs, ours)((x - 0.5) / 0.25), rtol=1e-4, atol=1e-4
    )


def test_mobilenet_equals_torchvisions_with_two_other_strides(seen):
    from torchvision.models import mobilenet_v2

    theirs = mobilenet_v2(weights=None, num_classes=10)
    for layer in (theirs.features[0][0], theirs.features[2].conv[1][0]):
        assert layer.stride == (2, 2)
        layer.stride = (1, 1)
    ours = seen("mobilenet-v2", channels=3, width=None)
    x = torch.rand(2, 3, 12, 10)
    expected = with_weights_of(theirs, ours, fc="classifier.1")((x - 0.5) / 0.25)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "plan"), [("vgg-11", "A"), ("vgg-16", "D")])
def test_vgg_equals_torchvisions_features_but_for_the_last_pool(seen, name, plan):
    from torchvision.models.vgg import cfgs, make_layers

    ours, theirs = (
        seen(name, channels=3, width=None),
        make_layers(cfgs[plan], batch_norm=True).eval(),
    )
    theirs.load_state_dict(ours.features.state_dict())
    x = torch.rand(2, 3, 32, 32)
    maps = ours.maps(ours.normalize(x))
    assert maps.shape[2:] == (2, 2)
    torch.testing.assert_close(
        F.max_pool2d(maps, 2), theirs((x - 0.5) / 0.25), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours(x), ours.fc(maps.mean((2, 3))))


def test_resnet_20_pads_its_shortcuts_with_zeros():
    block = BasicBlock(2, 5, stride=2, project=False).eval()
    nn.init.zeros_(block.bn2.weight)  # the convolutions' path is silenced
    x = torch.rand(1, 2, 6, 4)
    found = block(x)
    assert torch.equal(found[:, :2], x[:, :, ::2, ::2])
    assert found.shape == (1, 5, 3, 2)
    assert not found[:, 2:].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_convolutions_are_registered_in_the_order_in_which_they_run(name):
    model, ran = build(name, width=2).eval(), []
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for n in names:
        model.get_submodule(n).register_forward_hook(lambda *_, n=n: ran.append(n))
    model(torch.rand(1, 3, 16, 16))
    assert ran == names


@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_overwrites_what_another_one_put_out(name):
    model, kept = build(name, width=2).train(), []
    for n, module in model.named_modules():
        module.register_forward_hook(
            lambda m, args, out, n=n: kept.append((n, out, out.detach().clone()))
        )
    model(torch.randn(2, 3, 16, 16))
    assert len(kept) > 20
    assert [n for n, now, then in kept if not torch.equal(now, then)] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_no_convolution_is_strided_and_1x1(name):
    # see place: oneDNN's weight gradient of those is not safe in every memory format
    assert not [
        m
        for m in build(name, width=2).modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_cpu_colour_networks_train_in_channels_last_in_float32_alone(name):
    formats = {
        (channels, precision): memory_format(
            place(build(name, width=4, channels=channels), torch.device("cpu"), precision)
        )
        for channels in (1, 3)
        for precision in (None, "float32", "bf16")
    }
    assert {key for key, found in formats.items() if found == torch.channels_last} == {
        (3, "float32")
    }


def test_strided_1x1_convolutions_and_strangers_stay_contiguous():
    cpu, model = torch.device("cpu"), build("wrn-10-1")
    model.stage2[0].shortcut = nn.Conv2d(16, 32, 1, 2, bias=False)
    assert memory_format(place(model, cpu, "float32")) == torch.contiguous_format
    assert (
        memory_format(place(nn.Sequential(nn.Conv2d(3, 4, 3)), cpu, "float32"))
        == torch.contiguous_format
    )
    last = build("wrn-10-1").to(memory_format=torch.channels_last)
    assert memory_format(place(last, cpu, "bf16")) == torch.contiguous_format


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_is_the_same_in_either_memory_format(name):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for precision in (None, "float32"):
        model = place(build(name, width=4, classes=3), torch.device("cpu"), precision).train()
        logits = model(images)
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            other, one, rtol=1e-3, atol=1e-4 * max(1, one.abs().max().item())
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_pass_draws_no_random_numbers_and_reaches_every_weight(name):
    model = build(name, width=2, classes=3).train()
    before = torch.get_rng_state()
    F.cross_entropy(
        model(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))),
        torch.tensor([0, 1, 2, 0]),
    ).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_rebuilt_by_its_card(seen, name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("no weights are downloaded")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    model = seen(name, classes=3, width=3)
    again = load_model(save_model(tmp_path / "model.safetensors", model))
    assert again.card == model.card
    assert type(again) is type(model)
    assert again.stages == model.stages
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(again(x), model(x))


def test_a_card_of_a_wide_resnet_with_its_width_still_means_the_same():
    old = {
        "name": "wrn-10-1",
        "classes": 10,
        "channels": 1,
        "width": 16,
        "mean": [0.5],
        "std": [0.25],
    }
    assert build(**old).card == old == build("wrn-10-1", channels=1).card


def test_presets_take_every_family_at_its_own_width(digits):
    chosen = settings(
        overrides={
            "teacher.model": "resnet-20",
            "student.model": "mobilenet-v2",
            "student.width": 4,
        }
    )
    assert chosen.teacher(digits).card["width"] == 16
    assert chosen.student(digits).card["width"] == 4
    assert chosen.student(digits)(digits.test_images[:2]).shape == (2, 10)


def zskt(size=16, **changes):
    return ZSKT(
        (1, size, size),
        **{"pseudo_batches": 1, "batch_size": 4, "student_steps": 1, "z": 5, "width": 2, **changes},
    )


def start(source, teacher, student):
    teacher, student = (
        build(name, channels=1, width=4, seed=i) for i, name in enumerate((teacher, student))
    )
    source.start(teacher.eval().requires_grad_(False), student.train(), torch.device("cpu"), 0)
    return source


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("wrn-16-2", "wrn-16-1"),
        ("wrn-16-2", "resnet-20"),
        ("resnet-20", "wrn-10-1"),
        ("resnet-34", "resnet-18"),
        ("resnet-18", "mobilenet-v2"),
        ("vgg-16", "vgg-11"),
    ],
)
@pytest.mark.parametrize("size", [16, 17])
def test_attention_transfer_where_the_stages_match(teacher, student, size):
    source = start(zskt(size), teacher, student)
    assert list(source.pairs) == list(source.teacher.stages)
    assert list(source.pairs.values()) == list(source.student.stages)
    assert source.student_loss(source.batch())[2]["attention"].isfinite()


@pytest.mark.parametrize(
    ("teacher", "student", "counts"),
    [
        ("wrn-16-2", "resnet-18", "3 and 4"),
        ("resnet-34", "resnet-20", "4 and 3"),
        ("vgg-16", "mobilenet-v2", "5 and 4"),
        ("vgg-11", "wrn-16-1", "5 and 3"),
    ],
)
def test_attention_transfer_elsewhere_says_what_to_set(teacher, student, counts):
    with pytest.raises(ValueError, match=rf"not {counts}: set attention=0, or attention_layers="):
        start(zskt(), teacher, student)
    assert start(zskt(attention=0), teacher, student).pairs == {}


def test_attention_layers_join_families_whose_stages_differ():
    source = start(
        zskt(attention_layers={"features.5": "stage1", "features.22": "stage3"}),
        "vgg-16",
        "wrn-10-1",
    )
    assert source.student_loss(source.batch())[2]["attention"] > 0
    with pytest.raises(
        ValueError,
        match=r"cannot compare layer1 \(4, 16, 16\) with layer2 \(8, 8, 8\): set attention=0, or",
    ):
        start(zskt(attention_layers={"layer1": "layer2"}), "resnet-18", "resnet-20")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_defended_pseudo_batch_from_every_family(seen, name):
    """Also between families: the student is a ResNet-20, and attention transfer is on
    where it can be.
    """
    teacher, student = seen(name, width=4), build("resnet-20", channels=1, width=4, seed=1)
    sv = ShufflingVaccine(layers=3, warmup=0, verify=False)
    sr = SelfRetrospection(start=0, inner_steps=2)
    matching = len(teacher.stages) == len(student.stages)
    (step,) = distill(
        teacher, student, zskt(attention=250.0 * matching), defenses=[sv, sr], device="cpu"
    )
    assert set(step.losses) == {"generator", "sv_synthesis", "kd", "sr"} | (
        {"attention"} if matching else set()
    )
    assert sv.report()["found"]
    assert len(sv.report()["layers"]) == 3
