"""CMI and DeepInversion: every term against the literal formulas and by hand, the
views, the pool, and resuming.
"""

import copy
import math

import literal
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abdlab import (
    CMI,
    DeepInversion,
    Diverged,
    SelfRetrospection,
    ShufflingVaccine,
    distill,
    settings,
)
from abdlab.data import Dataset, random_views, resized_crops
from abdlab.defenses import Defense
from abdlab.inspection import synthesize
from abdlab.runs import Run
from abdlab.sources.cmi import contrastive, instance_means
from abdlab.sources.deepinversion import jensen_shannon
from abdlab.sources.objectives import total_variation
from abdlab.sources.pooled import Pooled
from abdlab.students import distilled

CPU = torch.device("cpu")
SIZES = {
    "rounds": 3,
    "synthesis_steps": 3,
    "kd_steps": 4,
    "synthesis_batch": 6,
    "batch_size": 4,
    "shift": 1,
    "flip": True,
}
CMI_SIZES = {"z": 5, "width": 3, "negatives": 5}


def cmi(**options):
    return CMI((1, 8, 8), **{**SIZES, **CMI_SIZES, **options})


def deepinversion(**options):
    return DeepInversion((1, 8, 8), **{**SIZES, "compete": 1.0, **options})


BOTH = pytest.mark.parametrize("make", [cmi, deepinversion])


def started(source, teacher, student, seed=0):
    source.start(teacher.requires_grad_(False), student.train(), CPU, seed)
    return source


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(n=6):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class TestTerms:
    def test_contrastive_by_hand(self):
        # views as different as can be: similarities 1 and 0, so that each loss is
        # -log(e / (e + 1)) = .313262
        eye = torch.eye(2)
        none = torch.empty(0, 2)
        assert contrastive(eye, eye, none, none, 1.0).item() == pytest.approx(0.313262, rel=1e-5)
        # one new and one old: the mean of the new one plus the mean of the old one
        assert contrastive(eye[:1], eye[:1], eye[1:], eye[1:], 1.0).item() == pytest.approx(
            2 * 0.313262, rel=1e-5
        )

    @pytest.mark.parametrize("old", [0, 1, 5])
    def test_contrastive_equals_literal(self, double, old):
        views = [F.normalize(draw(n, 3, seed=i), dim=1) for i, n in enumerate((4, 4, old, old))]
        torch.testing.assert_close(contrastive(*views, 0.1), literal.contrastive(*views, 0.1))

    def test_only_local_views_take_the_contrastive_gradient(self):
        views = [F.normalize(draw(3, 4, seed=i), dim=1).requires_grad_() for i in range(4)]
        contrastive(*views, 0.1).backward()
        assert [v.grad is not None for v in views] == [True, False, True, False]

    def test_instance_means_by_hand(self):
        maps = torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]])
        torch.testing.assert_close(
            instance_means({"a": maps, "b": torch.tensor([[7.0]])}), torch.tensor([[2.0, 2.0, 7.0]])
        )

    def test_instance_means_equal_literal(self, double):
        layers = [draw(3, 2, 4, 5), draw(3, 4, 2, 2)]
        torch.testing.assert_close(
            instance_means(dict(enumerate(layers))), literal.instance_means(layers)
        )

    def test_total_variation_by_hand(self):
        # right: 1, 1; down: 2, 2; the diagonals 3 and 1: sqrt 2 + sqrt 8 + 3 + 1
        assert total_variation(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])).item() == pytest.approx(
            math.sqrt(2) + math.sqrt(8) + 4
        )

    def test_total_variation_equals_literal(self, double):
        images = draw(2, 2, 4, 3)
        torch.testing.assert_close(total_variation(images), literal.total_variation(images))

    def test_jensen_shannon_by_hand(self):
        # p = (1/2, 1/2), q = (1/4, 3/4), m = (3/8, 5/8): (KL(p, m) + KL(q, m)) / 2 =
        # (.032269 + .035372) / 2
        p, q = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
        assert jensen_shannon(p, q).item() == pytest.approx(0.0338207, rel=1e-4)
        assert jensen_shannon(q, q).item() == pytest.approx(0, abs=1e-7)
        assert jensen_shannon(
            torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
        ).item() == pytest.approx(math.log(2))

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_jensen_shannon_equals_literal(self, double, temperature):
        p, q = draw(4, 5, seed=1), draw(4, 5, seed=2)
        torch.testing.assert_close(
            jensen_shannon(p, q, temperature), literal.jensen_shannon(p, q, temperature)
        )

    @pytest.mark.parametrize(("make", "temperature"), [(cmi, 20.0), (deepinversion, 3.0)])
    def test_kd_equals_literal(self, double, wrn, make, temperature):
        teacher, student = wrn(seed=1), wrn(seed=2)
        source = started(make(), teacher, student)
        batch = source.batch()
        torch.testing.assert_close(batch.logits, teacher(batch.images))
        logits, kd, terms = source.student_loss(batch)
        assert (kd.shape, terms) == ((4,), {})
        torch.testing.assert_close(
            kd.mean(), literal.soft_kd(teacher(batch.images), logits, temperature)
        )

    @pytest.mark.parametrize("old", [0, 3, 9])
    def test_cmi_equals_literal(self, double, wrn, old):
        teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
        options = {
            "batch_norm": 2.0,
            "one_hot": 0.7,
            "adversarial": 0.5,
            "contrastive": 0.8,
            "negatives": 4,
        }
        source = started(cmi(**options), teacher, student)
        source.bank = draw(old, 2, sum(source.channels.values()))
        images, targets, rng = (
            pictures(),
            torch.tensor([0, 1, 2, 0, 1, 2]),
            source.rng.clone_state(),
        )
        view, logits, losses, memory = source.terms(images, targets)

        whole_view = random_views(images, rng, shift=1, flip=True)
        torch.testing.assert_close(view, whole_view)
        local_view = random_views(images, rng, scale=(0.25, 1), ratio=(3 / 4, 4 / 3), flip=True)
        norms = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)}
        expected, found = literal.layer_inputs(teacher, whole_view, norms)
        torch.testing.assert_close(logits, expected)
        distance = literal.batch_norm_distance(
            [(found[n], m.running_mean, m.running_var) for n, m in norms.items()]
        )
        torch.testing.assert_close(losses["batch_norm"], 2 * distance)
        torch.testing.assert_close(losses["one_hot"], 0.7 * literal.cross_entropy(logits, targets))
        agreeing = literal.agreeing_kl(logits, copy.deepcopy(student).eval()(whole_view))
        assert agreeing > 0
        torch.testing.assert_close(losses["adversarial"], -0.5 * agreeing)

        whole = literal.instance_means([found[n] for n in norms])
        _, found = literal.layer_inputs(teacher, local_view, norms)
        local = literal.instance_means([found[n] for n in norms])
        past = source.bank[torch.randperm(old, generator=rng)[:4]]
        assert len(past) == min(old, 4)
        first, _, last = source.head
        head = lambda x: (x @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias  # noqa: E731
        term = literal.contrastive(
            head(local), head(whole), head(past[:, 0]), head(past[:, 1]), 0.1
        )
        torch.testing.assert_close(losses["contrastive"], 0.8 * term)
        torch.testing.assert_close(memory, torch.stack([local, whole], 1))
        assert losses.keys() == {"batch_norm", "one_hot", "adversarial", "contrastive"}

    def test_deepinversion_equals_literal(self, double, wrn):
        teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
        options = {
            "batch_norm": 2.0,
            "one_hot": 0.7,
            "tv": 0.3,
            "compete": 5.0,
        }
        source = started(deepinversion(**options), teacher, student)
        source.l2, source.compete_temperature = 0.2, 2.0
        images, targets = pictures(), torch.tensor([0, 1, 2, 0, 1, 2])
        view, logits, losses, _ = source.terms(images, targets)
        norms = {n: m for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)}
        expected, found = literal.layer_inputs(teacher, view, norms)
        torch.testing.assert_close(logits, expected)
        distance = literal.batch_norm_distance(
            [(found[n], m.running_mean, m.running_var) for n, m in norms.items()]
        )
        values = (images - 0.5) / 0.25
        apart = literal.jensen_shannon(logits, copy.deepcopy(student).eval()(view), 2.0)
        wanted = {
            "batch_norm": 2 * distance,
            "one_hot": 0.7 * literal.cross_entropy(logits, targets),
            "tv": 0.3 * literal.total_variation(values),
            "l2": 0.2 * sum(v**2 for v in values.reshape(-1)).sqrt(),
            "compete": 5 * (1 - apart),
        }
        assert losses.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                losses[name], value, msg=lambda text, name=name: f"{name}: {text}"
            )

    def test_deepinversion_rolls_and_mirrors_the_whole_batch(self, teacher, student):
        source = started(deepinversion(), teacher, student)
        image = torch.arange(64.0).view(1, 1, 8, 8)
        images, seen = image.repeat(3, 1, 1, 1), set()
        for _ in range(200):
            view = source._shaken(images)
            assert all(torch.equal(v, view[0]) for v in view)
            for mirrored in (False, True):
                back = view[:1].flip(3) if mirrored else view[:1]
                where = [
                    (d, r)
                    for d in range(-2, 3)
                    for r in range(-2, 3)
                    if torch.equal(back, image.roll((d, r), (2, 3)))
                ]
                seen |= {(mirrored, *offset) for offset in where}
        assert len(seen) == 2 * 25
        source.flip, source.jitter = False, 0
        assert all(torch.equal(source._shaken(images), images) for _ in range(10))

    @BOTH
    def test_weights_of_zero_spare_the_student_its_pass(self, teacher, make):
        def fail(*args):
            raise AssertionError("the student was run")

        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        student.register_forward_pre_hook(fail)
        name = "adversarial" if make is cmi else "compete"
        source = started(make(**{name: 0.0}), teacher, student)
        assert name not in source.batch().losses
        with pytest.raises(AssertionError, match="was run"):
            started(make(), teacher, student).batch()

    def test_without_a_contrastive_term_the_bank_stays_empty(self, teacher, student):
        source = started(cmi(contrastive=0), teacher, student)
        assert "contrastive" not in source.batch().losses
        assert len(source.bank) == 0


class TestViews:
    def test_the_whole_box_is_the_image(self):
        images = draw(3, 2, 5, 4)
        torch.testing.assert_close(resized_crops(images, torch.tensor([[0, 0, 5, 4]] * 3)), images)
        torch.testing.assert_close(random_views(images, torch.Generator()), images)

    def test_a_mirrored_one(self):
        images = draw(2, 1, 4, 5)
        found = resized_crops(images, torch.tensor([[0, 0, 4, 5]] * 2), torch.tensor([True, False]))
        torch.testing.assert_close(found, torch.stack([images[0].flip(-1), images[1]]))

    def test_a_known_crop(self):
        # the middle two of four columns, stretched to four: their centres 1, 2 lie at
        # 0.75, 1.25, 1.75, 2.25
        image = torch.tensor([0.0, 1.0, 3.0, 7.0]).view(1, 1, 1, 4)
        expected = torch.tensor([0.75, 1.5, 2.5, 4.0]).view(1, 1, 1, 4)
        torch.testing.assert_close(
            resized_crops(image, torch.tensor([[0.0, 1.0, 1.0, 2.0]])), expected
        )
        mirrored = resized_crops(image, torch.tensor([[0.0, 1.0, 1.0, 2.0]]), torch.tensor([True]))
        torch.testing.assert_close(mirrored, expected.flip(-1))

    def test_zeros_move_in(self):
        image = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
        found = resized_crops(image, torch.tensor([[1.0, -1.0, 3.0, 3.0]]))
        torch.testing.assert_close(found[0, 0], torch.tensor([[0.0, 4, 5], [0, 7, 8], [0, 0, 0]]))

    def test_boxes_equal_literal(self, double):
        images, rng = draw(6, 2, 4, 5), torch.Generator().manual_seed(3)
        boxes = torch.rand(6, 4, generator=rng) * torch.tensor([4.0, 5.0, 6.0, 7.0]) - torch.tensor(
            [1.0, 1.0, -0.5, -0.5]
        )
        mirrored = torch.tensor([True, False] * 3)
        expected = torch.stack(
            [literal.resized_crop(*each) for each in zip(images, boxes, mirrored, strict=True)]
        )
        torch.testing.assert_close(resized_crops(images, boxes, mirrored), expected)

    def test_they_are_differentiable(self, double):
        images, boxes = (
            draw(2, 1, 3, 3).requires_grad_(),
            torch.tensor([[0.3, 0.2, 2.0, 1.5], [-1.0, 0.5, 3.0, 3.0]]),
        )
        assert torch.autograd.gradcheck(
            lambda x: resized_crops(x, boxes, torch.tensor([True, False])), images
        )

    def test_shifts_are_whole_pixels_with_zeros(self):
        images, rng, seen = (
            torch.arange(1.0, 26.0).view(1, 1, 5, 5).repeat(400, 1, 1, 1),
            torch.Generator().manual_seed(0),
            set(),
        )
        padded = F.pad(images[0, 0], [1] * 4)
        windows = {(y, x): padded[y : y + 5, x : x + 5] for y in range(3) for x in range(3)}
        for view in random_views(images, rng, shift=1):
            found = [
                place
                for place, window in windows.items()
                if torch.allclose(view[0], window, atol=1e-4)
            ]
            assert len(found) == 1
            seen.add(found[0])
        assert seen == set(windows)

    def test_crops_stay_inside_and_in_range(self):
        # slopes across and down are the box's width and height; the middle is its
        # middle
        ramp = torch.arange(8.0) + 0.5
        images = torch.stack([ramp.expand(8, 8), ramp[:, None].expand(8, 8)]).repeat(500, 1, 1, 1)
        views = random_views(
            images, torch.Generator().manual_seed(0), scale=(0.25, 0.5), ratio=(3 / 4, 4 / 3)
        )
        wide, tall = (
            (views[:, 0, 4, 4] - views[:, 0, 4, 3]) * 8,
            (views[:, 1, 4, 4] - views[:, 1, 3, 4]) * 8,
        )
        area, ratio = wide * tall / 64, wide / tall
        assert 0.249 < area.min() < 0.26
        assert 0.49 < area.max() < 0.501
        assert 0.749 < ratio.min() < 0.76
        assert 1.32 < ratio.max() < 1.334
        for channel, side in ((0, wide), (1, tall)):
            middle = (views[:, channel, 3, 3] + views[:, channel, 4, 4]) / 2
            assert (middle - side / 2).min() > -1e-3
            assert (middle + side / 2).max() < 8 + 1e-3
            assert (middle - side / 2).min() < 0.1
            assert (middle + side / 2).max() > 7.9

    def test_half_of_them_are_mirrored_where_that_is_right(self):
        images = draw(400, 1, 4, 4)
        found = random_views(images, torch.Generator().manual_seed(0), flip=True)
        mirrored = [
            torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(found, images, strict=True)
        ]
        assert 160 < sum(mirrored) < 240
        torch.testing.assert_close(
            found[[not m for m in mirrored]], images[[not m for m in mirrored]]
        )

    def test_the_same_generator_gives_the_same_views(self):
        options = {"shift": 2, "scale": (0.25, 1.0), "ratio": (0.75, 1.33), "flip": True}
        first, second, other = (
            random_views(draw(8, 1, 6, 6), torch.Generator().manual_seed(s), **options)
            for s in (0, 0, 1)
        )
        assert torch.equal(first, second)
        assert not torch.allclose(first, other)


class Numbered(Pooled):
    """A source of images that show their round, with a known loss in each synthesis
    step; the maker moves a little each time.
    """

    weight_decay = 0.0

    def __init__(self, losses, **options):
        fixed = {
            "lr": 0.1,
            "temperature": 1.0,
            "batch_norm": 1.0,
            "one_hot": 1.0,
        }
        sizes = {**SIZES, "synthesis_steps": len(losses), "shift": 0, "flip": False, "pool": None}
        super().__init__((1, 2, 2), **{**sizes, **fixed, **options})
        self.known, self.step, self.rounds_begun, self.remembered = losses, 0, 0, []

    def begin(self):
        self.step, self.rounds_begun = 0, self.rounds_begun + 1
        maker = nn.Module()
        maker.weight = nn.Parameter(torch.zeros(()))

        # 8-bit images: the round in the left column, the synthesis step in the right
        # one
        def shown():
            values = torch.tensor([self.rounds_begun / 255, self.step / 255])
            return values.expand(6, 1, 2, 2) + 0 * maker.weight

        maker.forward = shown
        return maker, [torch.optim.SGD(maker.parameters(), lr=0.1)]

    def terms(self, images, targets):
        loss, number = self.known[self.step], self.step
        self.step += 1
        return images, torch.zeros(6, 10), {"known": loss + 0 * images.sum()}, number

    def remember(self, memory):
        self.remembered.append(memory)


def tiny_teacher():
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()


class TestPool:
    @pytest.mark.parametrize(
        ("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 1.0, 2.0], 0), ([3.0, -2.0, -5.0], 2)]
    )
    def test_the_best_batch_of_a_round_joins(self, losses, best):
        source = started(Numbered(losses), tiny_teacher(), tiny_teacher())
        report = source.batch().losses
        assert source.pool.dtype == torch.uint8
        assert torch.equal(
            source.pool, torch.tensor([1, best], dtype=torch.uint8).expand(6, 1, 2, 2)
        )
        assert report == {"known": losses[best]}
        assert source.remembered == [best]

    def test_defenses_count_for_which_batch_is_best(self):
        class Against(Defense):
            def synthesis_term(self, images, logits):
                return 10.0 * (images[0, 0, 0, 1] * 255).round().eq(1)  # the second step

        source = started(Numbered([3.0, 1.0, 2.0]), tiny_teacher(), tiny_teacher())
        assert source.batch([Against()]).losses == {"known": 2.0, "against_synthesis": 0.0}
        assert source.remembered == [2]

    def test_it_grows_by_one_batch_a_round(self):
        source = started(Numbered([1.0]), tiny_teacher(), tiny_teacher())
        sizes = []
        for _ in range(len(source)):
            source.batch()
            sizes.append(len(source.pool))
        assert len(source) == 12
        assert sizes == [6] * 4 + [12] * 4 + [18] * 4

    def test_a_bounded_one_forgets_the_oldest(self):
        source = started(Numbered([1.0], pool=10), tiny_teacher(), tiny_teacher())
        for _ in range(len(source)):
            source.batch()
        assert source.pool[:, 0, 0, 0].tolist() == [2] * 4 + [3] * 6
        assert source.pool.untyped_storage().nbytes() == 10 * 4

    def test_every_image_is_used_once_before_any_is_used_again(self):
        source = started(
            Numbered([1.0], batch_size=3, kd_steps=4, rounds=1), tiny_teacher(), tiny_teacher()
        )
        source.batch()
        source.pool = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 2)
        source._shuffle()
        seen = [(source.batch().images[:, 0, 0, 0] * 255).round().int().tolist() for _ in range(2)]
        assert sorted(seen[0] + seen[1]) == list(range(6))

    def test_batches_are_the_pool_while_it_is_small(self):
        source = started(Numbered([1.0], batch_size=8), tiny_teacher(), tiny_teacher())
        assert [len(source.batch().images) for _ in range(5)] == [6] * 4 + [8]

    def test_images_are_shifted_and_mirrored_for_the_student(self, teacher, student):
        source = started(deepinversion(shift=0, flip=False), teacher, student)
        batch = source.batch()
        in_pool = {tuple(image.flatten().tolist()) for image in source.pool}
        assert {
            tuple((image * 255).round().byte().flatten().tolist()) for image in batch.images
        } <= in_pool
        source.shift = 2
        assert (
            not {
                tuple((image * 255).round().byte().flatten().tolist())
                for image in source.batch().images
            }
            <= in_pool
        )

    @BOTH
    def test_synthesize_hands_out_the_pool(self, teacher, student, make):
        source = started(make(), teacher, student)
        with pytest.raises(ValueError, match=r"the pool of .* is empty"):
            source.synthesize(3)
        source.batch()
        before = source.rng.get_state()
        some, more = source.synthesize(4), source.synthesize(15)
        assert torch.equal(source.rng.get_state(), before)
        assert (some.shape, more.shape) == ((4, 1, 8, 8), (15, 1, 8, 8))
        numbers = [
            int((source.pool == (image * 255).round().byte()).flatten(1).all(1).nonzero()[0])
            for image in more
        ]
        assert sorted(numbers[:6]) == sorted(numbers[6:12]) == list(range(6))
        assert torch.equal(source.synthesize(15), more)

    def test_the_bank_is_bounded_and_keeps_the_latest(self, teacher, student):
        source, sizes = started(cmi(bank=8), teacher, student), []
        for _ in range(len(source)):
            source.batch()
            sizes.append(len(source.bank))
        assert sizes == [6] * 4 + [8] * 8
        wide = sum(source.channels.values())
        assert source.bank.shape == (8, 2, wide)
        source.remember(torch.arange(3.0).view(3, 1, 1).expand(3, 2, wide))
        assert source.bank[-3:, 0, 0].tolist() == [0, 1, 2]
        assert source.bank.untyped_storage().nbytes() == 8 * 2 * wide * 4


class TestRounds:
    def test_every_round_has_a_new_generator_and_the_same_head(self, teacher, student):
        source = started(cmi(), teacher, student)
        (first, _), (second, _) = source.begin(), source.begin()
        assert first.head is second.head is source.head
        assert not torch.equal(first.z, second.z)
        assert not torch.equal(first.generator.layers[0].weight, second.generator.layers[0].weight)
        before = weights(source.head)
        source.batch()
        assert not same(before, weights(source.head)), "the head learns"

    def test_noise_and_generator_learn(self, teacher, student):
        source = started(cmi(synthesis_steps=1), teacher, student)
        makers, begin = [], source.begin
        source.begin = lambda: makers.append(begin()) or makers[-1]
        rng = source.rng.clone_state()
        source.batch()
        twin = started(cmi(), teacher, student)
        twin.rng.set_state(rng.get_state())
        fresh, _ = twin.begin()
        used = makers[0][0]
        assert not torch.equal(used.z, fresh.z)
        assert torch.allclose(used.z, fresh.z, atol=2e-3)
        assert all(
            not torch.equal(p, q)
            for p, q in zip(used.generator.parameters(), fresh.generator.parameters(), strict=True)
            if p.ndim > 1
        )

    @BOTH
    def test_synthesis_lowers_its_loss(self, teacher, student, make):
        losses = []
        for steps in (1, 40):
            source = started(
                make(synthesis_steps=steps, rounds=1, shift=0, flip=False), teacher, student
            )
            losses.append(sum(source.batch().losses.values()).item())
        assert losses[1] < 0.8 * losses[0]

    def test_pixels_stay_in_range(self, teacher, student):
        source = started(deepinversion(pixel_lr=2.0, synthesis_steps=5), teacher, student)
        maker, (adam,) = source.begin()
        assert maker().min() >= -1e-6
        assert maker().max() <= 1 + 1e-6
        (-maker()).sum().backward()
        adam.step()
        assert maker().min() >= -1e-6
        assert maker().max() <= 1 + 1e-6

    @BOTH
    def test_a_round_reports_the_kept_batch_in_all_its_steps(self, teacher, student, make):
        steps = list(distill(teacher, student, make(), device="cpu"))
        rounds = [
            [{k: v for k, v in s.losses.items() if k != "kd"} for s in steps[i : i + 4]]
            for i in (0, 4, 8)
        ]
        assert all(r == [r[0]] * 4 for r in rounds)
        assert rounds[0] != rounds[1] != rounds[2]
        assert len({s.losses["kd"] for s in steps}) == 12
        assert steps[-1].images.shape == (4, 1, 8, 8)

    @BOTH
    def test_a_defenses_term_reaches_the_synthesis(self, teacher, student, make):
        class Darker(Defense):
            def __init__(self, weight):
                self.weight = weight

            def synthesis_term(self, images, logits):
                assert images.requires_grad
                torch.testing.assert_close(logits, self.teacher(images))
                return self.weight * images.mean()

        brightness = []
        for weight in (0.0, 1000.0):
            faster = {"generator_lr": 0.05} if make is cmi else {}
            source = make(synthesis_steps=10, rounds=1, kd_steps=1, **faster)
            step = next(
                distill(
                    teacher, copy.deepcopy(student), source, defenses=[Darker(weight)], device="cpu"
                )
            )
            assert "darker_synthesis" in step.losses
            brightness.append(source.pool.float().mean().item())
        assert brightness[1] < brightness[0] - 1

    @BOTH
    def test_both_defenses_run(self, teacher, student, make):
        sv, sr = (
            ShufflingVaccine(layers=3, warmup=0.3, sigma=0),
            SelfRetrospection(start=0.6, inner_steps=2),
        )
        steps = list(distill(teacher, student, make(), defenses=[sv, sr], device="cpu"))
        # the vaccine is on from the fifth step, the first of a round;
        # self-retrospection from the eighth
        assert ["sv_synthesis" in s.losses for s in steps] == [False] * 4 + [True] * 8
        assert ["sr" in s.losses for s in steps] == [False] * 7 + [True] * 5
        assert sv.report()["found"]

    @BOTH
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
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert all(p.grad is None and p.requires_grad for p in student.parameters())
        for model in (teacher, student):
            assert not any(
                m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
                for m in model.modules()
            )
            assert all(
                m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)
            )
        kept = [
            batch.images,
            batch.logits,
            source.pool,
            *batch.losses.values(),
            *source.losses.values(),
        ]
        assert not any(t.requires_grad for t in [*kept, *([source.bank] if make is cmi else [])])

    @BOTH
    @pytest.mark.parametrize("stops", [(2,), (4,), (1, 5, 8, 11)])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, wrn, tmp_path, make, stops):
        def run(student, **options):
            defenses = [
                ShufflingVaccine(layers=3, warmup=0.3, sigma=0),
                SelfRetrospection(start=0.6, inner_steps=1),
            ]
            return distill(
                wrn(seed=1), student, make(pool=14), defenses=defenses, device="cpu", **options
            )

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

    @BOTH
    def test_the_same_seed_gives_the_same_pool_and_another_does_not(self, wrn, make):
        pools = []
        for seed in (0, 0, 1):
            source = started(make(), wrn(seed=1), wrn(seed=2), seed)
            source.batch()
            pools.append(source.pool)
        assert torch.equal(pools[0], pools[1])
        assert not torch.equal(pools[0], pools[2])

    @BOTH
    def test_the_student_learns(self, teacher, student, make):
        source = make(rounds=2, kd_steps=30, synthesis_batch=16, batch_size=16, lr=0.02)
        losses = [s.losses["kd"] for s in distill(teacher, student, source, device="cpu")]
        assert sum(losses[25:30]) < 0.6 * sum(losses[:5])

    def test_teachers_of_flat_inputs_and_other_classes_will_do(self, student):
        teacher = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        ).eval()
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        for source in (cmi(), deepinversion()):
            assert started(source, teacher, other).classes == 3
            assert source.batch().logits.shape == (4, 3)


class TestErrors:
    @BOTH
    def test_a_teacher_without_batch_norm(self, student, make):
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with pytest.raises(
            ValueError, match="Sequential has no batch norm with running statistics"
        ) as caught:
            next(distill(teacher, student, make(), device="cpu"))
        assert "\n" not in str(caught.value)

    @BOTH
    @pytest.mark.parametrize(
        ("wrong", "match"),
        [
            ({"shape": (8, 8)}, "shape is"),
            ({"rounds": 0}, "at least 1"),
            ({"synthesis_steps": 0}, "at least 1"),
            ({"kd_steps": 0}, "at least 1"),
            ({"synthesis_batch": 1}, "at least 2"),
            ({"batch_size": 1}, "at least 2"),
            ({"pool": 255}, "pool must hold at least one round's 256 images, not 255"),
            ({"temperature": 0}, "temperature must be above 0"),
        ],
    )
    def test_impossible_settings(self, make, wrong, match):
        with pytest.raises(ValueError, match=match) as caught:
            {cmi: CMI, deepinversion: DeepInversion}[make](**{"shape": (1, 8, 8), **wrong})
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("wrong", [{"bank": -1}, {"negatives": -1}])
    def test_impossible_settings_of_cmi(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            cmi(**wrong)

    @BOTH
    def test_a_synthesis_that_is_not_finite_stops_the_run(self, teacher, student, make):
        class Nan(Defense):
            def synthesis_term(self, images, logits):
                return images.mean() * float("nan")

        with pytest.raises(
            Diverged, match="at step 1 the loss 'nan_synthesis' is nan; there is no checkpoint"
        ):
            next(distill(teacher, student, make(), defenses=[Nan()], device="cpu"))


class TestSettings:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("name", ["cmi", "deepinversion", "clean"])
    def test_a_source_shifts_and_mirrors_as_the_data_set_says(self, name, flip):
        images, labels = pictures(10), torch.arange(10)
        data = Dataset(
            "digits",
            images,
            labels,
            images,
            labels,
            tuple("0123456789"),
            (0.5,),
            (0.25,),
            shift=3,
            flip=flip,
        )
        source = settings("quick/digits").source(name, data)
        assert (source.shift, source.flip) == (3, flip)

    @pytest.mark.parametrize("key", ["cmi.flip", "deepinversion.shift"])
    def test_what_the_data_set_says_is_no_setting(self, key):
        with pytest.raises(ValueError, match="unknown setting"):
            settings("quick/digits", {key: 1})

    @pytest.mark.parametrize("name", ["cmi", "deepinversion"])
    def test_a_run_and_images_of_its_pool(self, digits, tmp_path, name):
        sizes = {
            "rounds": 2,
            "synthesis_steps": 1,
            "kd_steps": 2,
            "synthesis_batch": 4,
            "batch_size": 4,
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
