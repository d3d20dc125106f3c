"""FastDFKD, NAYER and the conditional generator: against the literal formulas, and
resuming.
"""

import copy
from functools import partial

import literal
import literal_fast
import pytest
import torch
from torch import nn

from abdlab import (
    DAFL,
    DFAD,
    DFQ,
    ZSKT,
    Diverged,
    SelfRetrospection,
    ShufflingVaccine,
    distill,
    distilled,
    settings,
    synthesize,
)
from abdlab.data import random_views
from abdlab.defenses import Defense
from abdlab.runs import Run
from abdlab.sources.cgdfkd import CGDFKD
from abdlab.sources.choi import Choi, gaussian_divergence
from abdlab.sources.fastdfkd import FastDFKD
from abdlab.sources.lasting import average
from abdlab.sources.nayer import NAYER, label_codes

CPU = torch.device("cpu")
SIZES = {
    "rounds": 3,
    "warmup": 1,
    "synthesis_steps": 2,
    "kd_steps": 4,
    "batch_size": 6,
    "shift": 1,
    "flip": True,
}


def fastdfkd(**options):
    source = FastDFKD((1, 8, 8), **{**SIZES, "width": 3, **options})
    source.z = 5
    return source


def nayer(**options):
    source = NAYER((1, 8, 8), **{**SIZES, "width": 3, **options})
    source.code, source.embedding, source.life = 12, 5, 2
    return source


def cgdfkd(**options):
    sizes = {"pseudo_batches": 12, "batch_size": 6, "student_steps": 2, "z": 5, "width": 3}
    return CGDFKD((1, 8, 8), **{**sizes, **options})


def choi(**options):
    sizes = {"pseudo_batches": 12, "batch_size": 6, "student_steps": 2, "z": 5, "width": 3}
    return Choi((1, 8, 8), **{**sizes, **options})


POOLED = pytest.mark.parametrize("make", [fastdfkd, nayer])
ALL = pytest.mark.parametrize("make", [fastdfkd, nayer, cgdfkd, choi])


def started(source, teacher, student, seed=0):
    source.start(teacher.requires_grad_(False), student.train(), CPU, seed)
    return source


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


class Holding(Defense):
    """Holds generators from pseudo-batch ``since`` on."""

    def __init__(self, since):
        self.since, self.index = since, 0

    def before(self, index):
        self.index = index
        return []

    def holds(self):
        return self.index >= self.since


class TestFastDFKD:
    @pytest.mark.parametrize("steps", [1, 3])
    def test_meta_learning_equals_literal(self, double, wrn, steps):
        teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
        options = {"synthesis_steps": steps, "shift": 0, "flip": False, "kd_steps": 1}
        source = started(fastdfkd(**options), teacher, student)
        meta, rng = copy.deepcopy(source.meta), source.rng.clone_state()
        kept, reports = [], []
        for _ in range(2):
            source._round([])
            kept.append(source.pool[-6:])
            reports.append({k: v.item() for k, v in source.losses.items()})

        rounds = []
        for n in range(2):
            noise = torch.randn(6, 5, generator=rng)
            rounds.append((noise, torch.randint(3, (6,), generator=rng)))
            for _ in range(steps):  # views that change nothing draw all the same
                random_views(torch.zeros(6, 1, 8, 8), rng)
            torch.randperm(6 * (n + 1), generator=rng)  # the pool's new order
        expected, terms = literal_fast.fastdfkd_rounds(
            meta,
            teacher,
            student,
            rounds,
            steps,
            5e-3,
            0.015 if steps <= 2 else 0.01,
            (10.0, 0.4, 1.1),
            1,
            0.9,
        )
        for found, wanted in zip(kept, expected, strict=True):
            assert torch.equal(found, wanted.mul(255).round().to(torch.uint8))
        assert [r.keys() for r in reports] == [t.keys() for t in terms]
        assert "adversarial" not in reports[0]
        for found, wanted in zip(reports, terms, strict=True):
            assert found == pytest.approx(wanted, rel=1e-6)
        for ours, theirs in zip(source.meta.parameters(), meta.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

    def test_a_round_leaves_no_gradient_and_moves_the_meta_generator(self, teacher, student):
        source = started(fastdfkd(), teacher, student)
        before = weights(source.meta)
        source.batch()
        assert not same(before, weights(source.meta))
        assert all(p.grad is None for p in source.meta.parameters())

    def test_a_better_start_with_every_round(self, teacher, student):
        # the same noise and targets cost less after 15 rounds than before the first
        source = started(fastdfkd(adversarial=0.0, shift=0, flip=False), teacher, student)
        source.momentum_bn = 0.0
        noise = torch.randn(32, 5, generator=torch.Generator().manual_seed(9))

        def cost():
            with torch.no_grad():
                _, _, losses = source.inversion(source.meta(noise), torch.arange(32) % 10)
            return sum(losses.values()).item()

        first = cost()
        for _ in range(15):
            source._round([])
        assert cost() < 0.9 * first

    def test_statistics_by_hand(self):
        past = {"a": (torch.tensor([1.0]), torch.tensor([2.0]))}
        now = {"a": (torch.tensor([3.0]), torch.tensor([4.0])), "b": (torch.ones(1),) * 2}
        found = average(past, now, 0.75)
        assert [x.item() for x in found["a"]] == [1.5, 2.5]
        assert [x.item() for x in found["b"]] == [1.0, 1.0]


class TestNAYER:
    def test_codes_are_orthogonal_and_of_unit_length(self, double):
        codes = label_codes(10, 12, torch.Generator().manual_seed(0))
        assert codes.shape == (10, 12)
        torch.testing.assert_close(codes @ codes.T, torch.eye(10))
        assert label_codes(5, 3, torch.Generator()).shape == (5, 5)

    def test_a_batch_has_every_class_alike_and_a_random_rest(self, teacher, student):
        source, rests = started(nayer(batch_size=23), teacher, student), set()
        for _ in range(5):
            source.begin()
            labels = source.targets()
            counts = labels.bincount(minlength=10)
            assert (len(labels), counts.min().item(), counts.max().item()) == (23, 2, 3)
            rests.add(tuple(labels[20:].tolist()))
        assert len(rests) > 1

    def test_images_equal_literal(self, double, wrn):
        source = started(nayer(batch_size=7), wrn(seed=1, classes=3), wrn(seed=2, classes=3))
        maker, _ = source.begin()
        labels, made = source.targets(), maker()
        expected = literal_fast.noisy_images(
            source.codes, labels, copy.deepcopy(source.norm), maker, source.core, 3
        )
        assert made.shape == (7, 1, 8, 8)
        torch.testing.assert_close(made, expected)

    def test_a_round_equals_literal(self, double, wrn):
        teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
        source = started(nayer(shift=0, flip=False, batch_size=7, warmup=0), teacher, student)
        for _ in range(2):
            source._round([])
        reports = {k: v.item() for k, v in source.losses.items()}
        twin = started(nayer(shift=0, flip=False, batch_size=7, warmup=0), teacher, student)
        past = None
        for _ in range(2):
            maker, _ = twin.begin()
            images, terms, past = literal_fast.nayer_round(
                maker, teacher, student, twin.targets(), past, 2, 4e-3, (10.0, 0.5, 1.33), 0.9
            )
            for _ in range(2):
                random_views(torch.zeros(7, 1, 8, 8), twin.rng)
            twin.rounds_made += 1
            torch.randperm(7 * twin.rounds_made, generator=twin.rng)
        assert torch.equal(source.pool[-7:], images.mul(255).round().to(torch.uint8))
        assert reports == pytest.approx(terms, rel=1e-6)

    def test_the_generator_starts_anew_at_the_end_of_its_life(self, teacher, student):
        source, cores = started(nayer(), teacher, student), []
        for _ in range(4):
            source._round([])
            cores.append(source.core)
        assert cores[0] is cores[1]
        assert cores[1] is not cores[2]
        assert cores[2] is cores[3]

    def test_noisy_layers_and_generator_learn(self, teacher, student):
        source = started(nayer(synthesis_steps=1), teacher, student)
        maker, (adam,) = source.begin()
        before = weights(maker)
        maker().sum().backward()
        adam.step()
        for name in ("weight", "generator.layers.0.weight", "norm.weight"):
            assert not torch.equal(before[name], weights(maker)[name]), name


class TestCGDFKD:
    def test_noise_carries_one_class_per_image(self, teacher, student):
        source = started(cgdfkd(batch_size=200), teacher, student)
        noise = source.noise()
        classes = noise[:, 5:]
        assert noise.shape == (200, 15)
        assert classes.sum(1).eq(1).all()
        assert set(classes.argmax(1).tolist()) == set(range(10))

    def test_terms_equal_literal(self, double, wrn):
        teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
        options = {"batch_norm": 2.0, "adversarial": 0.5}
        source = started(cgdfkd(**options), teacher, student)
        source.one_hot, source.temperature = 0.7, 2.0
        noise = source.noise()
        images = source.generator(noise)
        logits, losses = source.generator_terms(images, noise, [])
        expected = literal_fast.cgdfkd_terms(
            teacher, student, images, noise[:, 5:].tolist(), 0.7, 2.0, 0.5, 2.0
        )
        torch.testing.assert_close(logits, teacher(images))
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value)

    def test_the_student_learns_logits_and_attention(self, double, wrn):
        teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
        source = started(cgdfkd(attention=3.0), teacher, student)
        source.temperature = 2.0
        batch = source.batch()
        logits, kd, terms = source.student_loss(batch)
        torch.testing.assert_close(kd.mean(), literal.mean_kl(batch.logits, logits, 2.0))
        _, ours = literal.features(student, batch.images, student.stages)
        _, theirs = literal.features(teacher, batch.images, teacher.stages)
        wanted = 3 * sum(literal.attention_transfer(ours[n], theirs[n]) for n in ours)
        torch.testing.assert_close(terms["attention"], wanted)

    def test_the_generator_learns_the_classes_it_is_told(self, teacher, student):
        options = {"adversarial": 0.0, "batch_norm": 0.0, "attention": 0.0, "generator_lr": 1e-2}
        source = started(cgdfkd(batch_size=32, pseudo_batches=60, **options), teacher, student)
        losses = [source.batch().losses["one_hot"].item() for _ in range(40)]
        assert sum(losses[-5:]) < 0.93 * sum(losses[:5])

    @pytest.mark.parametrize(
        ("wrong", "match"),
        [
            ({"batch_size": 1}, "batch_size at least 2"),
            ({"student_steps": 0}, "student_steps must be at least 1"),
        ],
    )
    def test_impossible_settings(self, wrong, match):
        with pytest.raises(ValueError, match=match):
            cgdfkd(**wrong)

    def test_without_its_statistics_any_teacher_will_do(self, student):
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        source = started(cgdfkd(batch_norm=0.0, attention=0.0), teacher, student)
        assert source.batch().losses.keys() == {"one_hot", "adversarial"}

    def test_a_run_and_images_of_it(self, digits, tmp_path):
        sizes = {"pseudo_batches": 2, "student_steps": 1, "batch_size": 4, "width": 4}
        chosen = settings(
            "quick/digits", {f"cgdfkd.{k}": v for k, v in sizes.items()}, device="cpu"
        )
        teacher = chosen.teacher(digits).eval()
        _, metrics = distilled(tmp_path, chosen, digits, teacher, "cgdfkd")
        assert 0 <= metrics["acc"] <= 1
        images = synthesize(Run(tmp_path / "seed0" / "cgdfkd"), chosen, digits, teacher, 6)
        assert images.shape == (6, 1, 8, 8)


class TestChoi:
    def test_the_divergence_by_hand(self):
        # variance 4 against 1 at the same mean: (4 - 1 - log 4) / 2
        found = gaussian_divergence(*(torch.tensor([x]) for x in (0.0, 4.0, 0.0, 1.0)))
        assert found.item() == pytest.approx(0.806853, rel=1e-4)

    def test_terms_equal_literal(self, double, wrn):
        teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
        source = started(choi(warmup=0.0, alpha=0.3), teacher, student)
        images = copy.deepcopy(source.generator)(
            torch.randn(6, 5, generator=source.rng.clone_state())
        )
        # the student's norms answer with the batch's own statistics, and record nothing
        expected = literal_fast.choi_terms(teacher, copy.deepcopy(student), images, 0.3)
        found = source.batch().losses
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-6)

    def test_its_student_takes_all_steps_on_a_cosine(self, teacher, student):
        source = started(choi(student_steps=3), teacher, student)
        _, schedule = source.optimizer(student)
        assert schedule.T_max == 36
        with pytest.raises(ValueError, match="student_steps must be at least 1, not 0"):
            choi(student_steps=0)


class TestPooled:
    @POOLED
    def test_the_warm_up_makes_rounds_without_the_student(self, teacher, make):
        def fail(*args):
            raise AssertionError("the student was run")

        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        student.register_forward_pre_hook(fail)
        source = started(make(warmup=2), teacher, student)
        with pytest.raises(AssertionError, match="was run"):
            source.batch()
        assert (source.rounds_made, len(source.pool)) == (2, 12)

    @POOLED
    def test_the_pool_grows_by_a_batch_a_round(self, teacher, student, make):
        source, sizes = started(make(warmup=2), teacher, student), []
        for _ in range(len(source)):
            source.batch()
            sizes.append(len(source.pool))
        assert sizes == [18] * 4 + [24] * 4 + [30] * 4

    @POOLED
    def test_a_defense_that_holds_keeps_the_pool(self, teacher, student, make):
        source = make()
        steps = distill(teacher, student, source, defenses=[Holding(3)], device="cpu")
        sizes = [len(source.pool) for _ in steps]
        assert sizes == [12] * 12

    @POOLED
    def test_one_that_holds_from_the_start_leaves_one_batch(self, teacher, student, make):
        source = make(warmup=2)
        stream = distill(teacher, student, source, defenses=[Holding(0)], device="cpu")
        assert [len(source.pool) for _ in stream] == [6] * 12

    @POOLED
    def test_without_an_adversarial_weight_the_student_is_spared(self, teacher, make):
        def fail(*args):
            raise AssertionError("the student was run")

        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        student.register_forward_pre_hook(fail)
        source = started(make(adversarial=0.0), teacher, student)
        assert source.batch().losses.keys() == {"batch_norm", "one_hot"}


class TestEverySource:
    @ALL
    def test_a_defenses_term_reaches_the_synthesis(self, teacher, student, make):
        class Seen(Defense):
            def synthesis_term(self, images, logits):
                assert images.requires_grad
                torch.testing.assert_close(logits, self.teacher(images))
                return images.mean()

        step = next(distill(teacher, student, make(), defenses=[Seen()], device="cpu"))
        assert "seen_synthesis" in step.losses

    @ALL
    def test_both_defenses_run(self, teacher, student, make):
        sv = ShufflingVaccine(layers=3, warmup=0.3, sigma=0)
        sr = SelfRetrospection(start=0.6, inner_steps=2)
        steps = list(distill(teacher, student, make(), defenses=[sv, sr], device="cpu"))
        assert "sv_synthesis" in steps[-1].losses
        assert "sr" in steps[-1].losses

    @ALL
    def test_nothing_is_left_behind(self, teacher, student, make):
        source = started(make(), teacher, student)
        before = weights(teacher), weights(student)
        torch.manual_seed(5)
        expected = torch.rand(2)
        torch.manual_seed(5)
        found = [torch.rand(1)]
        batch = source.batch([])
        found.append(torch.rand(1))
        assert torch.equal(torch.cat(found), expected), "the global random numbers are untouched"
        assert same(weights(teacher), before[0])
        assert same(weights(student), before[1])
        assert not any(m.training for m in teacher.modules())
        assert all(m.training for m in student.modules())
        assert all(p.grad is None for p in [*teacher.parameters(), *student.parameters()])
        for model in (teacher, student):
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        kept = [batch.images, batch.logits, *batch.losses.values()]
        assert not any(t.requires_grad for t in kept)

    @ALL
    @pytest.mark.parametrize("stops", [(2,), (4,), (1, 5, 8, 11)])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, wrn, tmp_path, make, stops):
        def run(student, **options):
            defenses = [
                ShufflingVaccine(layers=3, warmup=0.3, sigma=0),
                SelfRetrospection(start=0.6, inner_steps=1),
            ]
            return distill(wrn(seed=1), student, make(), defenses=defenses, device="cpu", **options)

        whole, found = wrn(seed=2), {}
        expected = {s.index: s.losses for s in run(whole)}
        for stop in (*stops, 12):
            student = wrn(seed=2)
            stream = run(student, checkpoint=tmp_path / "run.safetensors")
            for step in stream:
                found[step.index] = step.losses
                if step.index == stop:
                    break
            stream.close()
        assert found == expected
        assert same(weights(whole), weights(student))

    @ALL
    def test_the_same_seed_gives_the_same_images_and_another_does_not(self, wrn, make):
        images = []
        for seed in (0, 0, 1):
            source = started(make(), wrn(seed=1), wrn(seed=2), seed)
            images.append(source.batch().images)
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])

    @ALL
    def test_a_synthesis_that_is_not_finite_stops_the_run(self, teacher, student, make):
        class Nan(Defense):
            def synthesis_term(self, images, logits):
                return images.mean() * float("nan")

        with pytest.raises(Diverged, match="the loss 'nan_synthesis' is nan"):
            next(distill(teacher, student, make(), defenses=[Nan()], device="cpu"))

    @ALL
    def test_a_teacher_without_batch_norm(self, student, make):
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with pytest.raises(ValueError, match="has no batch norm with running statistics"):
            next(distill(teacher, student, make(), device="cpu"))


class TestErrors:
    @POOLED
    @pytest.mark.parametrize(
        ("wrong", "match"),
        [
            ({"rounds": 0}, "rounds, synthesis_steps and kd_steps must be at least 1"),
            ({"warmup": -1}, "warmup is a number of rounds, at least 0, not -1"),
            ({"batch_size": 1}, "at least 2"),
            ({"width": 0}, "width must be at least 1"),
        ],
    )
    def test_impossible_settings(self, make, wrong, match):
        with pytest.raises(ValueError, match=match) as caught:
            make(**wrong)
        assert "\n" not in str(caught.value)


class TestSettings:
    @pytest.mark.parametrize("name", ["fastdfkd", "nayer"])
    def test_a_run_and_images_of_it(self, digits, tmp_path, name):
        sizes = {
            "rounds": 2,
            "warmup": 1,
            "synthesis_steps": 1,
            "kd_steps": 2,
            "batch_size": 4,
            "width": 4,
        }
        chosen = settings(
            "quick/digits", {f"{name}.{k}": v for k, v in sizes.items()}, device="cpu"
        )
        teacher = chosen.teacher(digits).eval()
        _, metrics = distilled(tmp_path, chosen, digits, teacher, name)
        assert 0 <= metrics["acc"] <= 1
        run = Run(tmp_path / "seed0" / name)
        images = synthesize(run, chosen, digits, teacher, 6)
        assert images.shape == (6, 1, 8, 8)
        assert 0 <= images.min() < images.max() <= 1


def zskt(**options):
    sizes = {"pseudo_batches": 12, "batch_size": 6, "student_steps": 2, "z": 5, "width": 3}
    return ZSKT((1, 8, 8), **{**sizes, **options})


def online(kind, **options):
    sizes = {"pseudo_batches": 12, "batch_size": 6, "z": 5, "width": 3}
    return kind((1, 8, 8), **{**sizes, **options})


EMA = pytest.mark.parametrize(
    "make",
    [
        zskt,
        cgdfkd,
        partial(online, DAFL),
        partial(online, DFAD, generator_every=2),
        partial(online, DFQ),
        choi,
    ],
    ids=["zskt", "cgdfkd", "dafl", "dfad", "dfq", "choi"],
)


class TestMovingAverage:
    @EMA
    def test_its_weights_equal_literal(self, double, wrn, make):
        source = started(make(ema=0.7), wrn(seed=1), wrn(seed=2))
        average = [p.clone() for p in source.generator.parameters()]
        for _ in range(3):
            before = [p.clone() for p in source.generator.parameters()]
            source.batch()
            now = list(source.generator.parameters())
            if not all(torch.equal(a, b) for a, b in zip(before, now, strict=True)):
                average = [0.7 * a + 0.3 * p for a, p in zip(average, now, strict=True)]
        for found, wanted in zip(source.shown.parameters(), average, strict=True):
            torch.testing.assert_close(found, wanted)
            assert not found.requires_grad

    @EMA
    def test_the_student_and_synthesize_see_its_images(self, teacher, student, make):
        source = started(make(ema=0.999), teacher, student)
        with torch.no_grad():
            for p in source.shown.parameters():
                p.zero_()
        batch = source.batch()
        assert batch.images.std(0).max() < 1e-4, "an average of zeros shows one image"
        torch.testing.assert_close(batch.logits, teacher(batch.images))
        assert source.synthesize(4).std(0).max() < 1e-4
        assert not batch.images.requires_grad

    # DAFL's and DFQ's student learns from the images before the generator's step
    @pytest.mark.parametrize("make", [zskt, cgdfkd, partial(online, DFAD, generator_every=2)])
    def test_without_a_memory_it_is_the_generator(self, wrn, make):
        found = []
        for ema in (None, 0.0):
            steps = distill(wrn(seed=1), wrn(seed=2), make(ema=ema), device="cpu")
            found.append([s.losses for s in steps])
        assert found[0] == found[1]

    @EMA
    def test_a_resumed_run_equals_an_uninterrupted_one(self, wrn, tmp_path, make):
        def run(student, **options):
            return distill(wrn(seed=1), student, make(ema=0.5), device="cpu", **options)

        whole, student = wrn(seed=2), wrn(seed=2)
        expected = [s.losses for s in run(whole)]
        stream = run(student, checkpoint=tmp_path / "run.safetensors")
        found = [next(stream).losses for _ in range(5)]
        stream.close()
        found += [s.losses for s in run(student, checkpoint=tmp_path / "run.safetensors")]
        assert found == expected
        assert same(weights(whole), weights(student))

    @EMA
    @pytest.mark.parametrize("ema", [-0.1, 1.0])
    def test_an_impossible_one(self, make, ema):
        with pytest.raises(ValueError, match=r"ema is a share in \[0, 1\)"):
            make(ema=ema)
