"""OOD and mixed sources: the loss, CutMix, the patches, and what a resumed run or a mix
must keep.
"""

import copy

import literal
import pytest
import torch
from PIL import Image

from abdlab import CleanKD, SelfRetrospection, ShufflingVaccine, distill
from abdlab.errors import CheckpointError
from abdlab.settings import settings
from abdlab.sources import DFAD, OOD, ZSKT, Batch, Mixed
from abdlab.sources.mixed import MEMBERS
from abdlab.sources.ood import EMBEDDED, cutmix, make_patches, photograph

CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small_ood(shape=(1, 8, 8), **given):
    return OOD(shape, **{"patches": 24, "batch_size": 6, "epochs": 2, **given})


def small_zskt(**given):
    return ZSKT(
        (1, 8, 8),
        **{"pseudo_batches": 6, "batch_size": 6, "student_steps": 3, "z": 5, "width": 3, **given},
    )


def started(source, teacher, student, seed=0):
    source.start(teacher.requires_grad_(False), student.train(), CPU, seed)
    return source


def run(teacher, student, source, **given):
    return list(distill(teacher, copy.deepcopy(student), source, device="cpu", **given))


# The photograph


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_photographs(name):
    photo = photograph(name)
    assert photo.shape == (3, 427, 640)
    assert photo.dtype == torch.uint8
    assert photo.float().std() > 20


def test_a_photograph_of_ones_own_is_rgb(tmp_path):
    Image.new("L", (7, 5), 200).save(tmp_path / "grey.png")
    assert torch.equal(
        photograph(tmp_path / "grey.png"), torch.full((3, 5, 7), 200, dtype=torch.uint8)
    )
    assert small_ood(image=str(tmp_path / "grey.png")).photo.shape == (3, 5, 7)


def test_an_unreadable_photograph_is_a_clear_error_at_once(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no image 'chyna': name a file, or an embedded photograph: china, flower",
    ):
        small_ood(image="chyna")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.jpg is not a readable image"):
        small_ood(image=tmp_path / "text.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.jpg is not a readable image"):
        small_ood(image=tmp_path / "cut.jpg")


# The patches


def patches(
    seed=0, count=8, shape=(3, 8, 12), photo=None, scale=(0.002, 1.0), degrees=30.0, jitter=0.4
):
    return make_patches(
        photograph("flower") if photo is None else photo, count, shape, seed, scale, degrees, jitter
    )


def test_patches_are_bytes_drawn_from_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = patches(0), patches(0), patches(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.shape, first.dtype) == ((8, 3, 8, 12), torch.uint8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({patch.numpy().tobytes() for patch in first}) == 8, (
        "every patch has draws of its own"
    )
    assert torch.equal(patches(0, count=3), first[:3])


def test_one_channel_is_grey():
    assert patches(shape=(1, 8, 8)).shape == (8, 1, 8, 8)


@pytest.mark.parametrize("degrees", [0, 30, 90, 180])
def test_a_rotated_patch_has_no_black_corner(degrees):
    white = torch.full((3, 40, 60), 255, dtype=torch.uint8)
    assert (patches(photo=white, count=40, degrees=degrees, jitter=0) == 255).all()


def test_jitter_and_rotation_of_nought_leave_plain_crops():
    # a whole photograph of one value per column half: every crop has only these two, or
    # what resizing makes between them
    photo = torch.cat([torch.full((3, 32, 16), 50), torch.full((3, 32, 16), 200)], dim=2).to(
        torch.uint8
    )
    found = patches(photo=photo, degrees=0, jitter=0)
    assert (found.min(), found.max()) == (50, 200)
    assert (patches(photo=photo, jitter=0.9, count=20) > 200).any()


def test_a_smaller_scale_shows_less_of_the_photograph():
    photo = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)  # the value is the column
    for scale in (0.01, 0.25):
        spans = (
            patches(photo=photo, count=30, scale=(scale, scale), degrees=0, jitter=0)
            .flatten(1)
            .float()
        )
        width = (spans.amax(1) - spans.amin(1)).mean().item()
        assert width == pytest.approx(256 * scale**0.5, rel=0.25)


# CutMix


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_cutmix_pastes_what_its_lambda_leaves(beta):
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 7, 10)  # image i holds the number i
    shares = []
    for seed in range(60):
        before = images.clone()
        mixed, kept = cutmix(images, beta, rng(seed))
        assert torch.equal(images, before)
        for image, was in zip(mixed, images, strict=True):
            own = (image == was).all(0)
            assert len(image.unique()) <= 2, "what is pasted comes from one other image"
            if own.all():
                continue  # nothing was pasted, or the image met itself
            assert own.double().mean().item() == pytest.approx(kept)
            rows, columns = (~own).any(1).sum(), (~own).any(0).sum()
            assert rows * columns == (~own).sum(), "the place is one box"
        shares.append(kept)
    assert min(shares) < 0.2
    assert max(shares) > 0.9
    assert len(set(shares)) > 10


def test_cutmix_is_a_function_of_its_generator():
    images = torch.rand(6, 1, 8, 8)
    (a, x), (b, y), (c, _) = (cutmix(images, 0.25, rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert x == y
    assert not torch.equal(a, c)


def test_the_teacher_answers_to_the_mixed_image(teacher, student):
    source = started(small_ood(), teacher, student)
    batch = source.batch()
    torch.testing.assert_close(batch.logits, teacher(batch.images))
    pool = source.pool.float() / 255
    known = [any(torch.equal(image, patch) for patch in pool) for image in batch.images]
    assert not all(known), "some images of this seed's first batch are mixed"
    plain = started(small_ood(cutmix_share=0.0, flip=False), teacher, student).batch()
    assert all(any(torch.equal(image, patch) for patch in pool) for image in plain.images)


# The source


def test_ood_loss_equals_literal(double, wrn):
    teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
    for class_mean, divisor in ((True, 3), (False, 1)):
        source = small_ood(class_mean=class_mean)
        source.student, images = student, torch.rand(6, 1, 8, 8, generator=rng())
        batch = Batch(images, teacher(images))
        logits, kd, terms = source.student_loss(batch)
        torch.testing.assert_close(kd.mean(), literal.mean_kl(batch.logits, logits, 8.0) / divisor)
        assert kd.shape == (6,)
        assert terms == {}


def test_every_epoch_sees_every_patch_once_in_its_own_order(teacher, student):
    source = started(small_ood(cutmix_share=0.0, flip=False, batch_size=5), teacher, student)
    assert (source.per_epoch, len(source)) == (
        4,
        8,
    )  # 24 patches: the last 4 of each order are left out
    names = {patch.numpy().tobytes(): i for i, patch in enumerate(source.pool)}
    seen = [
        [names[(image * 255).round().byte().numpy().tobytes()] for image in source.batch().images]
        for _ in range(8)
    ]
    first, second = ([i for batch in half for i in batch] for half in (seen[:4], seen[4:]))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second


def test_the_learning_rate_drops_where_it_is_told(student):
    source = small_ood(drops=(0.5, 1.0), lr=1e-2)
    adam, schedule = source.optimizer(student)
    rates = []
    for _ in range(len(source)):
        rates.append(adam.param_groups[0]["lr"])
        adam.step(), schedule.step()
    assert rates == [0.01] * 4 + [0.005] * 4
    assert adam.param_groups[0]["lr"] == 0.0025


def test_ood_draws_its_patches_from_the_seed(teacher, student):
    pools = [started(small_ood(), teacher, student, seed).pool for seed in (0, 0, 1)]
    assert torch.equal(pools[0], pools[1])
    assert not torch.equal(pools[0], pools[2])
    assert pools[0].dtype == torch.uint8


def test_synthesize_shows_what_the_student_sees_and_touches_nothing(teacher, student):
    source, other = (started(small_ood(), teacher, student) for _ in range(2))
    images = source.synthesize(9)
    assert images.shape == (9, 1, 8, 8)
    assert torch.equal(images, source.synthesize(9))
    assert not torch.equal(images, source.synthesize(9, seed=1))
    assert torch.equal(source.batch().images, other.batch().images)


def test_ood_teaches(wrn):
    teacher, student = wrn(seed=1, width=8), wrn(seed=2, width=8)
    steps = run(
        teacher, student, small_ood(patches=96, batch_size=24, epochs=10, lr=3e-3, temperature=2.0)
    )
    assert sum(s.losses["kd"] for s in steps[-8:]) < 0.5 * sum(s.losses["kd"] for s in steps[:8])
    assert len(steps) == 40


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (2, 8, 8)}, "1 or 3 channels"),
        ({"shape": (8, 8)}, "shape"),
        ({"batch_size": 25}, "batch_size from 2 to the number of patches"),
        ({"batch_size": 1}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"cutmix_share": 1.5}, "cutmix_share"),
    ],
    ids=str,
)
def test_ood_refuses_impossible_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        small_ood(**wrong)


# Mixed


def mix(**given):
    return Mixed(
        [small_zskt(), small_ood(), DFAD((1, 8, 8), pseudo_batches=9, batch_size=5, z=4, width=3)],
        **{"weights": [2, 1, 1], "pseudo_batches": 8, **given},
    )


@pytest.mark.parametrize(
    ("weights", "length", "expected"),
    [
        ([1, 1], 4, [2, 2]),
        ([2, 1], 4, [3, 1]),
        ([0.7, 0.3], 10, [7, 3]),
        ([1, 0], 3, [3, 0]),
        ([1, 1, 1], 8, [3, 3, 2]),
    ],
)
def test_members_come_as_often_as_their_weights_say(weights, length, expected):
    assert (
        Mixed([small_ood() for _ in weights], weights=weights, pseudo_batches=length).counts()
        == expected
    )


def test_who_comes_when_is_drawn_from_the_seed(teacher, student):
    orders = [
        started(mix(pseudo_batches=40), teacher, student, seed).order.tolist() for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert [orders[0].count(i) for i in range(3)] == [20, 10, 10]
    assert orders[0] != sorted(orders[0])


def test_a_pseudo_batch_is_its_members(teacher, student):
    source = started(mix(), teacher, student)
    for number in source.order.tolist():
        batch, member = source.batch([]), source.members[number]
        assert source.member is member
        assert (source.student_steps, source.clip) == (member.student_steps, member.clip)
        assert batch.synthesised == (number != 1)
        logits, kd, terms = source.student_loss(batch)
        assert (len(logits), kd.shape) == (len(batch.images), (len(batch.images),))
        assert set(terms) == ({"attention"} if number == 0 else set())


def test_steps_left_counts_each_members_student_steps(teacher, student):
    source = started(mix(), teacher, student)
    steps = [source.members[i].student_steps for i in source.order.tolist()]
    assert [source.steps_left(i) for i in range(9)] == [sum(steps[i:]) for i in range(9)]
    assert sum(steps) == 4 * 3 + 2 * 1 + 2 * source.members[2].student_steps
    assert small_zskt().steps_left(4) == 2 * 3


def test_the_schedules_end_with_the_run(teacher, student):
    source = mix()
    seen = []
    stream = distill(teacher, student, source, device="cpu")
    for _ in stream:
        seen.append(source.members[0].generator_optimizer.param_groups[0]["lr"])
    assert (
        source.members[0].generator_schedule.last_epoch
        == source.members[0].drawn
        == source.counts()[0]
    )
    assert seen[-1] == pytest.approx(0, abs=1e-12)
    assert small_zskt().horizon == 6, "a source alone lasts for its own length"


@pytest.mark.parametrize(("chief", "kind", "lr"), [(0, "Adam", 2e-3), (1, "Adam", 1e-3)])
def test_the_students_optimiser_is_a_members_with_a_cosine_over_the_mix(
    teacher, student, chief, kind, lr
):
    source = started(mix(student=chief), teacher, student)
    optimizer, schedule = source.optimizer(student)
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0]["lr"] == lr
    for _ in range(source.steps_left(0)):
        optimizer.step(), schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_defenses_act_on_each_member_as_on_it_alone(teacher, student):
    sv = ShufflingVaccine(layers=2, verify=False, warmup=0)
    source = mix()
    steps = run(
        teacher, student, source, defenses=[sv, SelfRetrospection(start=0.5, inner_steps=1)]
    )
    for step, number in zip(steps, source.order.tolist(), strict=True):
        assert ("sv_synthesis" in step.losses) == ("generator" in step.losses)
        assert number != 1 or "generator" not in step.losses
        assert ("sr" in step.losses) == (step.index > 4)
    assert set(sv.report()["forms"]) == {"synthesis", "weights"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"weights": [1]},
        {"weights": [1, -1, 1]},
        {"weights": [0, 0, 0]},
        {"student": 3},
        {"pseudo_batches": 0},
    ],
    ids=str,
)
def test_mixed_refuses_impossible_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        mix(**wrong)


def test_a_mix_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="needs members"):
        Mixed([])


def test_a_mix_may_have_clean_data(teacher, student, digits):
    source = Mixed(
        [small_ood(), CleanKD(digits.train_images, digits.train_labels, epochs=1, batch_size=10)],
        pseudo_batches=4,
    )
    assert [("cross_entropy" in step.losses) for step in run(teacher, student, source)].count(
        True
    ) == 2


# Resuming


@pytest.mark.parametrize("make", [small_ood, mix], ids=["ood", "mixed"])
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_ends_with_the_same_numbers(teacher, student, tmp_path, make, stop):
    def stream(model, **given):
        sv = ShufflingVaccine(layers=2, verify=False, warmup=0)
        given |= {"defenses": [sv, SelfRetrospection(start=0.5, inner_steps=1)], "device": "cpu"}
        return distill(teacher, model, make(), **given), sv

    whole, parts = copy.deepcopy(student), copy.deepcopy(student)
    steps, sv = stream(whole)
    expected = [step.losses for step in steps]
    first, _ = stream(parts, checkpoint=tmp_path / "run.safetensors")
    found = [next(first).losses for _ in range(stop)]
    first.close()
    parts = copy.deepcopy(student)
    second, resumed = stream(parts, checkpoint=tmp_path / "run.safetensors")
    found += [step.losses for step in second]
    assert found == expected
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    assert resumed.report() == sv.report()


def test_another_mix_does_not_resume(teacher, student, tmp_path):
    file = tmp_path / "run.safetensors"
    stream = distill(teacher, student, mix(), device="cpu", checkpoint=file)
    next(stream), stream.close()
    other = Mixed([small_ood(), small_zskt()], pseudo_batches=8)
    with pytest.raises(CheckpointError, match="made by another run"):
        next(distill(teacher, student, other, device="cpu", checkpoint=file))


# Settings


def test_a_mix_by_its_settings():
    small = {"ood.patches": 64, "ood.batch_size": 32, "zskt.pseudo_batches": 9}
    chosen = settings(
        "quick/digits",
        {**small, "mixed.members": {"ood": 1, "zskt": 3}, "mixed.pseudo_batches": 8},
        device="cpu",
    )
    data = chosen.dataset()
    source = chosen.source("mixed", data)
    assert [type(m) for m in source.members] == [OOD, ZSKT]
    assert source.counts() == [2, 6]
    assert source.members[0].patches == 64
    assert not source.members[0].flip, (
        "digits must not be mirrored, nor patches for a teacher of digits"
    )
    assert source.members[0].shift == data.shift
    assert chosen.sections("mixed") == ["mixed", "ood", "zskt"]
    assert chosen.sections("ood") == ["ood"]
    assert settings(device="cpu").sections("mixed")[1:] == [m.name for m in MEMBERS]


def test_members_that_cannot_be_mixed():
    for members, message in (
        ({"zkst": 1}, "did you mean 'zskt'"),
        ({"mixed": 1}, "a mix cannot be a member of itself"),
    ):
        chosen = settings("quick/digits", {"mixed.members": members}, device="cpu")
        with pytest.raises(ValueError, match=message):
            chosen.source("mixed", chosen.dataset().subset(40, 40))
