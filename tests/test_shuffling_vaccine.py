"""The Shuffling Vaccine: T~ in one pass against deep copies, its term against the
literal formula, and verification.
"""

import copy
import math
import warnings

import literal
import pytest
import torch
from torch import nn

from abdlab import (
    DFAD,
    ZSKT,
    CleanKD,
    ShuffledTeacher,
    ShufflingVaccine,
    VaccineNotFound,
    distill,
    suspicion,
)
from abdlab.defenses import shuffling_vaccine
from abdlab.defenses.sample_weights import kd_weights
from abdlab.defenses.shuffled_teacher import shuffled_layers, tail_share
from abdlab.losses import kl, log_kl
from abdlab.sources import Batch

CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def vgg():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
    ]
    layers += [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ]
    return nn.Sequential(*layers).eval()


def grouped():
    """Two groups, and a depthwise convolution that cannot be shuffled."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2),
        nn.ReLU(),
    ]
    layers += [
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.Conv2d(12, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers).eval()


def nets(wrn):
    return {
        "wrn-10-1": wrn("wrn-10-1", channels=3, classes=4),
        "wrn-16-1": wrn("wrn-16-1", channels=3, classes=4),
        "vgg": vgg(),
        "grouped": grouped(),
    }


@pytest.mark.parametrize(
    ("name", "last"),
    [("wrn-10-1", n) for n in (1, 2, 3, 4, 5, 9)]
    + [("wrn-16-1", n) for n in (3, 4, 5)]
    + [("vgg", n) for n in (1, 2, 3)]
    + [("grouped", 2)],
)
def test_shuffled_teacher_equals_deep_copies(double, wrn, name, last):
    teacher = nets(wrn)[name].requires_grad_(False)
    vaccine = ShuffledTeacher(teacher, shuffled_layers(teacher, last), 3, rng())
    copies = literal.shuffled_teachers(teacher, vaccine.permutations)
    images = torch.rand(5, 3, 8, 8, generator=rng(1)).requires_grad_()
    found, expected = vaccine(images), literal.shuffled_teacher(copies, images)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(vaccine.copies(images), torch.stack([c(images) for c in copies]))
    weigh = torch.randn(found.shape, generator=rng(2))
    slopes = [
        torch.autograd.grad((value * weigh).sum(), images, retain_graph=True)[0]
        for value in (found, expected)
    ]
    torch.testing.assert_close(*slopes)
    own, shuffled = vaccine.beside(images)
    torch.testing.assert_close((own, shuffled), (teacher(images), expected))
    both = [
        torch.autograd.grad((a * weigh - b).sum(), images)[0]
        for a, b in ((own, shuffled), (teacher(images), expected))
    ]
    torch.testing.assert_close(*both)
    assert not torch.allclose(expected, teacher(images), rtol=1e-3), (
        "the shuffle must change something"
    )


def passes(teacher, call, images):
    """How many images the teacher's first convolution sees in each of its passes, once
    the vaccine has chosen its way.
    """
    call(images)
    seen = []
    first = next(m for m in teacher.modules() if isinstance(m, nn.Conv2d))
    handle = first.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    call(images)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    "last", range(3, 9)
)  # the ninth from the end is the one whose input is counted
def test_copies_and_teacher_share_one_pass(wrn, last):
    # The last four begin with the second stage's shortcut, whose other path goes round
    # the shuffle: they part before that block.
    teacher = wrn("wrn-10-1", channels=3)
    vaccine = ShuffledTeacher(teacher, shuffled_layers(teacher, last), 3, rng())
    images = torch.rand(4, 3, 8, 8)
    assert passes(teacher, vaccine, images) == passes(teacher, vaccine.beside, images) == [4]


class Around(nn.Module):
    """A path of its own goes round all of its layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1))

    def forward(self, images):
        return (images + self.layers(images)).flatten(2).mean(2)


def test_copies_run_one_by_one_where_a_path_goes_round_every_block():
    teacher = Around().eval().requires_grad_(False)
    vaccine = ShuffledTeacher(teacher, ["layers.1"], 3, rng())
    images = torch.rand(4, 3, 8, 8, generator=rng(1))
    assert passes(teacher, vaccine, images) == [4] * 3
    assert passes(teacher, vaccine.beside, images) == [4] * 4
    copies = literal.shuffled_teachers(teacher, vaccine.permutations)
    own, shuffled = vaccine.beside(images)
    torch.testing.assert_close(own, teacher(images))
    torch.testing.assert_close(shuffled, literal.shuffled_teacher(copies, images))


@pytest.mark.parametrize("source", [ZSKT, DFAD])
def test_a_pseudo_batch_asks_the_teacher_twice_with_the_vaccine_and_without(wrn, source):
    # once for the generator, with the copies beside it, once for the student
    counts = []
    for defenses in ([], [ShufflingVaccine(layers=3, warmup=0, verify=False)]):
        teacher, seen = wrn("wrn-10-1", channels=3), []
        teacher.conv1.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(len(args[0]))
        )
        options = {"attention": 0} if source is ZSKT else {"generator_every": 1}
        made = source((3, 8, 8), pseudo_batches=4, batch_size=6, width=4, **options)
        stream = distill(
            teacher, wrn("wrn-10-1", channels=3), made, defenses=defenses, device="cpu"
        )
        next(stream), seen.clear(), next(stream)
        counts.append(list(seen))
    assert counts == [[6, 6], [6, 6]]


def test_a_first_batch_of_one_image_decides_rightly(wrn):
    # With one image the k copies broadcast over a path that goes round the shuffle;
    # with five they do not.
    teacher = wrn("wrn-10-1", channels=3)
    vaccine = ShuffledTeacher(teacher, shuffled_layers(teacher, 4), 3, rng())
    images = torch.rand(5, 3, 8, 8)
    first = vaccine(images[:1])
    torch.testing.assert_close(vaccine(images)[:1], first, rtol=1e-4, atol=1e-5)


def test_shuffled_teacher_by_hand():
    # x = (1, 10), W = [[1, 2], [3, 4]]: W x = (21, 43), with the columns swapped (12,
    # 34); the mean is (16.5, 38.5)
    teacher = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        teacher[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 2, 1, 1))
    vaccine = ShuffledTeacher(teacher, ["0"], 2, permutations={"0": torch.tensor([[0, 1], [1, 0]])})
    images = torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    assert vaccine(images).tolist() == [[16.5, 38.5]]
    assert vaccine.copies(images)[:, 0].tolist() == [[21, 43], [12, 34]]


def test_a_shuffle_keeps_the_weights_of_each_kernel(wrn):
    teacher = wrn("wrn-16-1")
    vaccine = ShuffledTeacher(teacher, shuffled_layers(teacher, 5), 3, rng())
    for j in range(3):
        for name, shuffled in vaccine.weights(j).items():
            original = teacher.get_parameter(name)
            assert torch.equal(
                shuffled.flatten(1).sort(1).values, original.flatten(1).sort(1).values
            )


def test_every_copy_and_layer_has_its_own_permutation(wrn):
    teacher = wrn("wrn-16-1", width=16)
    first, again, other = (
        ShuffledTeacher(teacher, shuffled_layers(teacher, 5), 3, rng(s)).permutations
        for s in (0, 0, 1)
    )
    flat = [tuple(order.tolist()) for orders in first.values() for order in orders]
    assert len(set(flat)) == 15
    assert all(sorted(order) == list(range(len(order))) for order in flat)
    assert all(
        torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first
    )


def test_identity_permutations_give_the_teacher_itself(double, teacher):
    names = shuffled_layers(teacher, 5)
    identity = {n: torch.arange(teacher.get_submodule(n).in_channels).repeat(3, 1) for n in names}
    vaccine = ShuffledTeacher(teacher.double(), names, 3, permutations=identity)
    images = torch.rand(4, 1, 8, 8, generator=rng())
    torch.testing.assert_close(vaccine(images), teacher(images))
    scores = suspicion(vaccine, teacher, images)
    assert scores.tolist() == [-12.0] * 4
    assert tail_share(scores) == 0


def test_shuffled_teacher_leaves_the_teacher_alone(teacher):
    before = copy.deepcopy(teacher.state_dict())
    for last in (3, 4):
        ShuffledTeacher(teacher, shuffled_layers(teacher, last), 3, rng())(torch.rand(2, 1, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(
        m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__
        for m in teacher.modules()
    )


def odd(padding_mode="zeros"):
    """Padding by name, dilation, a stride, and a bias; optionally padding that is not
    with zeros.
    """
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding="same", padding_mode=padding_mode, dilation=2), nn.ReLU()]
    layers += [nn.Conv2d(6, 8, 3, 2, padding=1, padding_mode=padding_mode), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.mark.parametrize("last", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", [odd, lambda: odd("reflect"), grouped, vgg])
def test_one_pass_equals_the_copies_in_every_memory_format(double, make, channels_last, last):
    """Also the gradient that a generator learns from."""
    teacher, images = make().requires_grad_(False), torch.rand(5, 3, 8, 8, generator=rng())
    if channels_last:
        teacher, images = (x.to(memory_format=torch.channels_last) for x in (teacher, images))
    if make is grouped and last == 3:
        last = 2  # a depthwise convolution does not count
    vaccine = ShuffledTeacher(teacher, shuffled_layers(teacher, last), 3, rng())
    found, wanted = images.clone().requires_grad_(), images.clone().requires_grad_()
    (own, together), apart = vaccine.beside(found), vaccine.copies(wanted).mean(0)
    assert vaccine._parting == [""]
    torch.testing.assert_close(own, teacher(images))
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(y.square().sum(), x)[0]
            for y, x in ((together, found), (apart, wanted))
        )
    )


def test_shuffled_layers_are_found_by_type(wrn):
    assert shuffled_layers(wrn("wrn-16-2"), 5) == [
        f"stage3.{n}" for n in ("0.conv1", "0.conv2", "0.shortcut", "1.conv1", "1.conv2")
    ]
    assert shuffled_layers(vgg(), 2) == ["4", "6"]
    assert shuffled_layers(grouped(), 2) == ["2", "5"], (
        "a depthwise convolution has nothing to shuffle"
    )
    for last in (0, 4):
        with pytest.raises(ValueError, match=f"last {last} convolutions"):
            shuffled_layers(vgg(), last)


# the last convolutions of each family, in the order in which they run
FAMILIES = [
    (
        "wrn-16-1",
        5,
        [f"stage3.{n}" for n in ("0.conv1", "0.conv2", "0.shortcut", "1.conv1", "1.conv2")],
    ),
    ("wrn-40-1", 4, [f"stage3.{n}" for n in ("4.conv1", "4.conv2", "5.conv1", "5.conv2")]),
    (
        "resnet-18",
        5,
        [f"layer4.{n}" for n in ("0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2")],
    ),
    ("resnet-18", 3, [f"layer4.{n}" for n in ("0.downsample.0", "1.conv1", "1.conv2")]),
    (
        "resnet-34",
        7,
        [
            f"layer4.{n}"
            for n in (
                "0.conv1",
                "0.conv2",
                "0.downsample.0",
                "1.conv1",
                "1.conv2",
                "2.conv1",
                "2.conv2",
            )
        ],
    ),
    # its shortcuts have no weights, so that every block's other path goes round the
    # shuffle: passes part before the block
    (
        "resnet-20",
        5,
        [f"layer3.{n}" for n in ("0.conv2", "1.conv1", "1.conv2", "2.conv1", "2.conv2")],
    ),
    ("resnet-20", 19, None),
    ("vgg-11", 5, [f"features.{n}" for n in (11, 15, 18, 22, 25)]),
    ("vgg-16", 5, [f"features.{n}" for n in (27, 30, 34, 37, 40)]),
    # expansion and projection of a block; the depthwise convolution between them
    # (conv.1.0) has nothing to shuffle
    ("mobilenet-v2", 3, [f"features.{n}" for n in ("17.conv.0.0", "17.conv.2", "18.0")]),
    (
        "mobilenet-v2",
        5,
        [f"features.{n}" for n in ("16.conv.0.0", "16.conv.2", "17.conv.0.0", "17.conv.2", "18.0")],
    ),
]


@pytest.mark.parametrize(
    ("name", "last", "layers"), FAMILIES, ids=lambda v: str(v) if isinstance(v, (str, int)) else ""
)
def test_every_family_is_shuffled_where_it_ends(double, wrn, name, last, layers):
    teacher = wrn(name, channels=3, classes=4).requires_grad_(False)
    found = shuffled_layers(teacher, last)
    if layers is None:
        layers = [n for n, m in teacher.named_modules() if isinstance(m, nn.Conv2d)]
    assert found == layers
    vaccine = ShuffledTeacher(teacher, found, 3, rng())
    images = torch.rand(3, 3, 16, 16, generator=rng(1))
    copies = literal.shuffled_teachers(teacher, vaccine.permutations)
    torch.testing.assert_close(vaccine(images), literal.shuffled_teacher(copies, images))
    assert (
        len(passes(teacher, vaccine, images)) == len(passes(teacher, vaccine.beside, images)) == 1
    )


def test_depthwise_convolutions_do_not_count(wrn):
    teacher = wrn("mobilenet-v2", channels=3)
    convolutions = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.Conv2d)}
    depthwise = {n for n, m in convolutions.items() if m.groups > 1}
    assert len(convolutions) == 52
    assert len(depthwise) == 17
    assert shuffled_layers(teacher, 35) == [n for n in convolutions if n not in depthwise]
    with pytest.raises(ValueError, match="MobileNetV2 has 35 that can be shuffled"):
        shuffled_layers(teacher, 36)


def test_unknown_layers_and_no_copies_are_errors(teacher, student):
    with pytest.raises(ValueError, match=r"did you mean 'stage3.0.conv1'"):
        ShufflingVaccine(layers=["stage3.0.conv_1"]).start(teacher, student, CPU, 0, 10)
    with pytest.raises(ValueError, match="is no convolution"):
        ShufflingVaccine(layers=["fc"]).start(teacher, student, CPU, 0, 10)
    with pytest.raises(ValueError, match="at least 1"):
        ShuffledTeacher(teacher, ["conv1"], 0)


def test_suspicion_equals_literal(double, wrn):
    teacher = wrn(classes=4)
    vaccine = ShuffledTeacher(teacher, shuffled_layers(teacher, 3), 3, rng())
    images = torch.rand(7, 1, 8, 8, generator=rng(1))
    copies = literal.shuffled_teachers(teacher, vaccine.permutations)
    with torch.no_grad():
        expected = literal.suspicion(literal.shuffled_teacher(copies, images), teacher(images))
    for batch in (1000, 3):
        assert suspicion(vaccine, teacher, images, batch).tolist() == pytest.approx(expected)


def test_suspicion_by_hand():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 4/3 = .143841, log10 of it is -.84212
    assert log_kl(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()).item() == pytest.approx(
        -0.84212, abs=1e-5
    )


def test_negative_round_off_makes_no_nan():
    p = 10 * torch.randn(1000, 10, generator=rng())
    q = p * (1 + 1e-7)
    assert (kl(p, q) < 0).any(), (
        "float32 round-off must be negative somewhere for this test to mean anything"
    )
    scores = log_kl(p, q)
    assert scores.dtype == torch.float64
    assert not scores.isnan().any()
    assert scores.min() >= -12


@pytest.mark.parametrize("sigma", [3.0, 1.0, 0.0])
def test_tail_share_equals_literal(sigma):
    scores = torch.cat([torch.randn(95, generator=rng()), torch.full((5,), -9.0)]).double()
    assert tail_share(scores, sigma) == literal.tail_share(scores.tolist(), sigma)
    assert tail_share(scores, 3.0) == 0.05


def test_tail_share_of_nothing_and_of_equals():
    assert tail_share(torch.full((5,), -12.0, dtype=torch.float64)) == 0
    assert tail_share(torch.zeros(1, dtype=torch.float64)) == 0
    assert not math.isnan(tail_share(torch.zeros(0, dtype=torch.float64)))


def vaccinated(teacher, **settings):
    """A vaccine that is on, with the first shuffle."""
    sv = ShufflingVaccine(**{"layers": 3, "warmup": 0, "verify": False, **settings})
    sv.start(teacher.requires_grad_(False), teacher, CPU, 0, 10)
    sv.before(0)
    return sv


@pytest.mark.parametrize("per", ["agreeing", "batch"])
@pytest.mark.parametrize("agreeing", ["some", "none", "all"])
def test_synthesis_term_equals_literal(double, wrn, per, agreeing):
    teacher = wrn(classes=3)
    sv = vaccinated(teacher, per=per, alpha=0.3)
    copies = literal.shuffled_teachers(teacher, sv.vaccine.permutations)
    images = torch.rand(40, 1, 8, 8, generator=rng(1))
    with torch.no_grad():
        agree = literal.shuffled_teacher(copies, images).argmax(1) == teacher(images).argmax(1)
    if not 0 < agree.sum() < len(agree):
        # push T~ and T apart on half of the images, whatever the shuffle
        images = torch.cat([images[:20], -5 * images[20:]])
        with torch.no_grad():
            agree = literal.shuffled_teacher(copies, images).argmax(1) == teacher(images).argmax(1)
    assert 0 < agree.sum() < len(agree)
    images = {"some": images, "none": images[~agree], "all": images[agree]}[
        agreeing
    ].requires_grad_()
    found = sv.synthesis_term(images, teacher(images))
    expected = literal.synthesis_term(
        literal.shuffled_teacher(copies, images), teacher(images), 0.3, per
    )
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found, images)
    assert slope.isfinite().all()
    if agreeing == "none":
        assert found == 0
        assert not slope.any()
    else:
        torch.testing.assert_close(slope, torch.autograd.grad(expected, images)[0])
        assert found < 0


def test_the_divisors_differ_by_the_agreeing_share(teacher):
    images = torch.rand(20, 1, 8, 8, generator=rng())
    terms = [
        vaccinated(teacher, per=per).synthesis_term(images, teacher(images))
        for per in ("agreeing", "batch")
    ]
    agree = (
        (vaccinated(teacher).vaccine(images).argmax(1) == teacher(images).argmax(1)).float().mean()
    )
    torch.testing.assert_close(terms[1], terms[0] * agree)


def test_the_vaccine_is_on_between_warmup_and_stop(teacher):
    sv = vaccinated(teacher, warmup=0.2, stop=0.7)
    images = torch.rand(4, 1, 8, 8)
    found = []
    for index in range(10):
        sv.before(index)
        found.append(sv.synthesis_term(images, teacher(images)) is not None)
    assert found == [False] * 2 + [True] * 5 + [False] * 3


class Pointwise(nn.Module):
    """Logits = 5 x the mean of each of four channels. Shuffling its input channels
    changes nothing for a grey image.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(5 * torch.eye(4).view(4, 4, 1, 1))

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def coloured(n, grey):
    """n images of one strong channel each, the first ``grey`` of them with four equal
    channels instead.
    """
    images = torch.eye(4)[torch.arange(n) % 4][:, :, None, None] + 0.1 * torch.rand(
        n, 4, 2, 2, generator=rng()
    )
    images[:grey] = 0.5
    return images


def pool(images, **settings):
    """A run on these images alone, whose vaccine verifies on them after one step;
    (vaccine, steps).
    """
    source = CleanKD(
        images,
        torch.zeros(len(images), dtype=torch.long),
        share=1,
        epochs=4,
        batch_size=len(images),
        lr=1e-3,
    )
    sv = ShufflingVaccine(**{"layers": 1, "warmup": 0.25, **settings})
    return sv, list(distill(Pointwise(), Pointwise(), source, defenses=[sv], device="cpu"))


def test_a_shuffle_that_images_survive_is_verified():
    # 5 % at the floor of -12 among scores near 0: sqrt(.95 / .05) = 4.4 std below the
    # mean
    sv, steps = pool(coloured(100, grey=5))
    report = sv.report()
    assert report["found"]
    assert report["verified"]
    assert report["suspicious_shares"][-1] == pytest.approx(0.05)
    assert report["tries"] == len(report["suspicious_shares"]) <= 8
    assert report["layers"] == ["conv"]
    assert all(share <= 0.02 for share in report["suspicious_shares"][:-1])
    assert [len(step.events) for step in steps] == [0, 1, 0, 0]
    assert f"found at try {report['tries']}, 5.0%" in steps[1].events[0]


@pytest.mark.parametrize("grey", [1, 100])
def test_no_vaccine_is_said_loudly(grey):
    # one suspicious image of a hundred is under the threshold; when all are, none
    # stands out
    with pytest.warns(VaccineNotFound, match="no shuffling vaccine was found in 8 tries"):
        sv, steps = pool(coloured(100, grey))
    assert not sv.report()["found"]
    assert not sv.report()["verified"]
    assert len(sv.report()["suspicious_shares"]) == 8
    assert "The vaccine is off" in steps[1].events[0]
    assert sv.synthesis_term(coloured(4, 0), Pointwise()(coloured(4, 0))) is None


def test_tries_and_threshold_are_kept():
    with pytest.warns(VaccineNotFound, match="in 3 tries: at most 5.0%"):
        sv, _ = pool(coloured(100, grey=5), threshold=0.05, tries=3)
    assert sv.report()["tries"] == 3


def test_an_unverified_vaccine_says_so():
    sv, steps = pool(coloured(20, grey=0), verify=False)
    assert sv.report()["found"]
    assert not sv.report()["verified"]
    assert "without verification" in steps[1].events[0]


def test_where_it_ends_is_told():
    _, steps = pool(coloured(20, grey=0), verify=False, stop=0.75)
    assert steps[3].events == ("shuffling vaccine: off from pseudo-batch 3 on",)


def test_verification_has_at_least_one_pseudo_batch_to_look_at():
    with pytest.warns(VaccineNotFound):
        sv, steps = pool(coloured(100, grey=1), warmup=0)
    assert [len(step.events) for step in steps] == [0, 1, 0, 0]
    assert len(sv.report()["suspicious_shares"]) == 8


def test_the_pool_keeps_the_latest_images_in_bounded_memory(teacher, student):
    sv = ShufflingVaccine(pool=10, warmup=0.9)
    sv.start(teacher, student, CPU, 0, 100)
    for i in range(30):
        sv.observe(Batch(torch.full((4, 1, 8, 8), float(i)), torch.zeros(4, 10)))
    kept = torch.cat(sv.state()["seen"])[:, 0, 0, 0].tolist()
    assert 10 <= len(kept) < 14
    assert kept == sorted(kept)
    assert kept[-10:] == [27, 27, *[28] * 4, *[29] * 4]


@pytest.mark.parametrize(
    "wrong",
    [{"per": "sample"}, {"warmup": 1}, {"stop": 1.5}, {"tries": 0}, {"pool": 1}],
    ids=lambda w: next(iter(w)),
)
def test_impossible_settings_are_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ShufflingVaccine(**wrong)


def test_the_cap_bounds_each_samples_kl(wrn):
    # three samples of two classes; the last one disagrees and does not count
    shuffled, logits = (
        torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[9.0, 0.0], [1.1, 0.0], [0.0, 1.0]]),
    )
    far, near, _ = (literal.kl(p, q).item() for p, q in zip(shuffled, logits, strict=True))
    assert near < 0.05 < far
    for cap, wanted in ((None, far + near), (0.05, 0.05 + near)):
        sv = ShufflingVaccine(layers=1, verify=False, alpha=0.5, cap=cap)
        sv.start(wrn(seed=1), wrn(seed=2), CPU, 0, 10)
        sv.vaccine, sv.active = lambda images: shuffled, True  # a vaccine whose answers are known
        assert sv.synthesis_term(torch.zeros(3, 1, 8, 8), logits).item() == pytest.approx(
            -0.5 * wanted / 2 / 2
        )
    with pytest.raises(ValueError, match="cap is a KL"):
        ShufflingVaccine(cap=0)


# Where nothing is synthesised: the student's loss is weighed


def test_weights_by_hand():
    # losses 1, 2, 3, 4, the second and the last suspicious; alpha 4: (1 + 2/4 + 3 +
    # 4/4) / 4 = 1.375
    losses, phi = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([False, True, False, True])
    assert kd_weights(phi, 4.0).tolist() == [1, 0.25, 1, 0.25]
    assert (losses * kd_weights(phi, 4.0)).mean().item() == pytest.approx(1.375)
    # the official code: mean(1, 3) - .1 x mean(2, 4) = 1.7
    assert (losses * kd_weights(phi, 0.1, ascent=True)).mean().item() == pytest.approx(1.7)


@pytest.mark.parametrize("ascent", [False, True])
@pytest.mark.parametrize("phi", [[0, 0, 0], [1, 1, 1], [1, 0, 1], [0]], ids=str)
def test_weighed_losses_equal_literal(double, ascent, phi):
    losses = 1 + torch.rand(len(phi), generator=rng())
    found = (losses * kd_weights(torch.tensor(phi).bool(), 0.3, ascent)).mean()
    formula = literal.ascended_kd if ascent else literal.weighted_kd
    torch.testing.assert_close(found, formula(losses, phi, 0.3))
    assert found.isfinite()
    if not any(phi):
        torch.testing.assert_close(found, losses.mean())  # nothing suspicious: the plain loss
    if all(phi):
        torch.testing.assert_close(found, losses.mean() * (-0.3 if ascent else 1 / 0.3))


def fixed(teacher, shuffled, **settings):
    """A vaccine that is on, whose T~ has these logits."""
    sv = vaccinated(teacher, **settings)
    sv.vaccine = lambda images: shuffled
    return sv


@pytest.mark.parametrize(
    ("ascent", "expected"), [(False, [0.1, 1, 0.1]), (True, [-0.15, 3, -0.15])]
)
def test_samples_on_which_both_agree_are_suspicious(teacher, ascent, expected):
    shuffled, logits = (
        torch.tensor([[2.0, 0], [3.0, 0], [0, 1.0]]),
        torch.tensor([[9.0, 0], [0, 1.0], [0, 5.0]]),
    )
    sv = fixed(teacher, shuffled, ascent=ascent)
    batch = Batch(torch.zeros(3, 1, 8, 8), logits, synthesised=False)
    torch.testing.assert_close(sv.sample_weights(batch), torch.tensor(expected))
    assert sv.report()["forms"] == ["ascent" if ascent else "weights"]
    assert sv.report()["weighed_suspicious"] == pytest.approx(2 / 3, abs=1e-5)
    assert fixed(teacher, shuffled, ascent=ascent, kd_alpha=0.5).kd_alpha == 0.5


@pytest.mark.parametrize(
    ("form", "synthesised", "forms"),
    [
        ("auto", True, ["synthesis"]),
        ("auto", False, ["weights"]),
        ("synthesis", True, ["synthesis"]),
        ("synthesis", False, []),
        ("weights", True, ["weights"]),
        ("weights", False, ["weights"]),
    ],
)
def test_the_form_fits_the_source(teacher, form, synthesised, forms):
    sv = vaccinated(teacher, form=form)
    images = torch.rand(5, 1, 8, 8, generator=rng())
    batch = Batch(images, teacher(images), synthesised=synthesised)
    # only a source that synthesises asks for it
    term = sv.synthesis_term(images, batch.logits) if synthesised else None
    weights = sv.sample_weights(batch)
    assert (term is not None) == (forms == ["synthesis"])
    assert (weights is not None) == (forms == ["weights"])
    assert sv.report()["forms"] == forms
    assert weights is None or not weights.requires_grad


def test_no_weights_before_the_vaccine_is_there_or_after_its_stop(teacher):
    sv = vaccinated(teacher, warmup=0.2, stop=0.7)
    images, found = torch.rand(4, 1, 8, 8), []
    for index in range(10):
        sv.before(index)
        found.append(
            sv.sample_weights(Batch(images, teacher(images), synthesised=False)) is not None
        )
    assert found == [False] * 2 + [True] * 5 + [False] * 3


class Agreeing(ShufflingVaccine):
    """Its T~ is T itself, so that every sample is suspicious."""

    def _decide(self):
        self.decided, self.vaccine = True, self.teacher
        return []


def test_a_run_weighs_its_kd_loss(teacher, student, digits):
    """One clean-KD step with every sample suspicious: its KD loss is a tenth, or the
    negative tenth of the ascent.
    """

    def kd(**settings):
        source = CleanKD(
            digits.train_images, digits.train_labels, share=0.1, epochs=1, batch_size=20
        )
        sv = Agreeing(layers=2, warmup=0, verify=False, **settings)
        return next(
            distill(teacher, copy.deepcopy(student), source, defenses=[sv], device="cpu")
        ).losses["kd"]

    plain = kd(form="synthesis")
    assert plain > 0
    assert kd() == pytest.approx(plain / 10)
    assert kd(ascent=True) == pytest.approx(-plain / 10)


@pytest.mark.parametrize(("found", "expected"), [(5, True), (1, False)])
def test_verification_works_on_what_a_photograph_shows(found, expected):
    """The vaccine looks at the images of a source that does not synthesise as at any
    other's.
    """
    images = coloured(100, grey=found)
    source = CleanKD(
        images, torch.zeros(100, dtype=torch.long), share=1, epochs=4, batch_size=100, lr=1e-3
    )
    sv = ShufflingVaccine(layers=1, warmup=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VaccineNotFound)
        list(distill(Pointwise(), Pointwise(), source, defenses=[sv], device="cpu"))
    assert sv.report()["found"] == expected
    assert sv.report()["forms"] == (["weights"] if expected else [])


@pytest.mark.parametrize(
    ("wrong", "message"), [({"form": "both"}, "form is"), ({"kd_alpha": 0}, "kd_alpha")], ids=str
)
def test_forms_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        ShufflingVaccine(**wrong)


# Scales


@pytest.mark.parametrize("per", ["agreeing", "batch"])
def test_the_term_summed_over_classes_equals_literal(double, wrn, per):
    teacher = wrn(classes=3)
    sv = vaccinated(teacher, per=per, alpha=0.3, class_mean=False)
    copies = literal.shuffled_teachers(teacher, sv.vaccine.permutations)
    images = torch.rand(20, 1, 8, 8, generator=rng(1))
    expected = literal.synthesis_term(
        literal.shuffled_teacher(copies, images), teacher(images), 0.3, per, class_mean=False
    )
    torch.testing.assert_close(sv.synthesis_term(images, teacher(images)), expected)


def test_the_reverse_divergence_equals_literal(double, wrn):
    teacher = wrn(classes=3)
    images = torch.rand(20, 1, 8, 8, generator=rng(1))
    sv = vaccinated(teacher, alpha=0.3, reverse=True)
    shuffled = literal.shuffled_teacher(
        literal.shuffled_teachers(teacher, sv.vaccine.permutations), images
    )
    # only which of the two comes first in the KL changes
    torch.testing.assert_close(
        sv.synthesis_term(images, teacher(images)),
        literal.synthesis_term(teacher(images), shuffled, 0.3, "agreeing"),
    )
    found = suspicion(sv.vaccine, teacher, images, reverse=True)
    assert found.tolist() == pytest.approx(literal.suspicion(teacher(images), shuffled))
    assert not torch.allclose(found, suspicion(sv.vaccine, teacher, images))


def test_verification_scores_with_the_divergence_of_the_term(monkeypatch):
    asked = []
    real = shuffling_vaccine.suspicion
    monkeypatch.setattr(
        shuffling_vaccine,
        "suspicion",
        lambda *a, reverse: asked.append(reverse) or real(*a, reverse=reverse),
    )
    for reverse in (False, True):
        pool(coloured(100, grey=5), reverse=reverse)
    assert set(asked[: asked.index(True)]) == {False}
    assert set(asked[asked.index(True) :]) == {True}
