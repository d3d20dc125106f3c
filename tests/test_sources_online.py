"""DAFL, DFAD and DFQ: terms by hand and against the literal formulas, whole
pseudo-batches, and what they may touch.
"""

import copy
import itertools
import math

import literal
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from abdlab import (
    DAFL,
    DFAD,
    DFQ,
    ZSKT,
    Diverged,
    SelfRetrospection,
    ShufflingVaccine,
    TriggerUnlearning,
    distill,
)
from abdlab.defenses import Defense
from abdlab.distill import seed_of
from abdlab.features import last_linear, record
from abdlab.sources.dafl import activation_loss
from abdlab.sources.dfad import discrepancy
from abdlab.sources.dfq import instance_entropy
from abdlab.sources.generator import Generator
from abdlab.sources.objectives import (
    batch_norm_loss,
    class_balance,
    disagreement,
    norm_inputs,
    one_hot,
)

CPU = torch.device("cpu")
ONLINE = [DAFL, DFAD, DFQ]
TINY = {"pseudo_batches": 6, "batch_size": 6, "z": 5, "width": 4, "student_lr": 0.05}


def tiny(kind, **settings):
    extra = {"generator_every": 2} if kind is DFAD else {}
    return kind((1, 8, 8), **{**TINY, **extra, **settings})


def started(source, teacher, student, seed=0):
    source.start(teacher.requires_grad_(False), student.train(), CPU, seed)
    return source


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def logits_of(seed, *shape):
    return 2 * torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


# the terms


def test_one_hot_by_hand():
    # softmax (3/4, 1/4): its own prediction costs log 4/3, the other class log 4
    logits = torch.tensor([[math.log(3), 0.0]])
    assert one_hot(logits).item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert one_hot(logits, torch.tensor([1])).item() == pytest.approx(math.log(4), rel=1e-6)


def test_class_balance_by_hand():
    # two certain, opposite samples have the even mean; two certain, equal ones have a
    # certain mean
    assert class_balance(torch.tensor([[99.0, 0.0], [0.0, 99.0]])).item() == pytest.approx(
        -math.log(2), rel=1e-6
    )
    assert class_balance(torch.tensor([[99.0, 0.0], [99.0, 0.0]])).item() == pytest.approx(
        0, abs=1e-6
    )
    # softmax (1, 0) and (1/2, 1/2): mean (3/4, 1/4)
    wanted = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert class_balance(torch.tensor([[99.0, 0.0], [0.0, 0.0]])).item() == pytest.approx(
        wanted, rel=1e-5
    )


def test_disagreement_by_hand():
    # KL of (1/2, 1/2) from (1/4, 3/4) is 1/2 log 4/3; the second pair is equal; even
    # logits predict class 0, (1/4, 3/4) class 1
    teacher, student = torch.zeros(2, 2), torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert disagreement(teacher, student).item() == pytest.approx(-0.25 * math.log(4 / 3), rel=1e-5)
    assert disagreement(teacher, student, agreeing_only=True).item() == 0
    swapped = student.flip(1)
    assert disagreement(teacher, swapped, agreeing_only=True).item() == pytest.approx(
        -0.25 * math.log(4 / 3), rel=1e-5
    )


def test_instance_entropy_by_hand():
    logits = torch.tensor([[99.0, 0.0], [0.0, 0.0]])
    assert instance_entropy(logits).item() == pytest.approx(math.log(2) / 2, rel=1e-6)


def test_activation_and_discrepancy_by_hand():
    assert activation_loss(torch.tensor([[1.0, -3.0], [0.0, 2.0]])).item() == -1.5
    found = discrepancy(
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, -1.0]])
    )
    assert found.tolist() == [1.5, 0.5]


def test_terms_equal_literal():
    teacher, student = logits_of(0, 5, 4), logits_of(1, 5, 4)
    pairs = [
        (one_hot(teacher), literal.own_prediction(teacher)),
        (class_balance(teacher), -literal.batch_entropy(teacher)),
        (instance_entropy(teacher), literal.instance_entropy(teacher)),
        (disagreement(teacher, student), -literal.mean_kl(teacher, student)),
        (discrepancy(teacher, student).mean(), literal.l1_discrepancy(teacher, student)),
    ]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)
    agreeing = [t.argmax() == s.argmax() for t, s in zip(teacher, student, strict=True)]
    assert 0 < sum(agreeing) < 5, "the seeds must give both kinds of samples"
    wanted = (
        -sum(literal.kl(t, s) for t, s, yes in zip(teacher, student, agreeing, strict=True) if yes)
        / 5
    )
    torch.testing.assert_close(disagreement(teacher, student, agreeing_only=True), wanted)


def test_batch_norm_loss_by_hand():
    # channel means (2, 5) against (-1, 1): off by (3, 4), norm 5; variances (1, 4)
    # against (1, 4)
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    model[0].running_mean, model[0].running_var = (
        torch.tensor([-1.0, 1.0]),
        torch.tensor([1.0, 4.0]),
    )
    images = torch.tensor([[1.0, 3.0], [3.0, 7.0]])
    with norm_inputs(model) as inputs:
        model(images)
    assert batch_norm_loss(model, inputs).item() == pytest.approx(5, rel=1e-6)
    # variances off by (3, 4) too
    model[0].running_var = torch.tensor([4.0, 0.0])
    assert batch_norm_loss(model, inputs).item() == pytest.approx(10, rel=1e-6)


def test_batch_norm_loss_equals_literal(wrn):
    model = wrn(seed=1, classes=3).requires_grad_(False)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with norm_inputs(model) as inputs:
        model(images)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert inputs.keys() == norms.keys()
    layers = [(inputs[n], m.running_mean, m.running_var) for n, m in norms.items()]
    loss, wanted = batch_norm_loss(model, inputs), literal.batch_norm_distance(layers)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(x, [images], retain_graph=True)[0] for x in (loss, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


def test_norm_inputs_leave_nothing_behind(teacher):
    with norm_inputs(teacher) as inputs:
        teacher(torch.rand(2, 1, 8, 8))
    assert len(inputs) == 7
    with pytest.raises(RuntimeError, match="size"), norm_inputs(teacher):
        teacher(torch.rand(2, 3, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_norm_inputs_want_running_statistics():
    without = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    with norm_inputs(without.eval()) as inputs:
        without(torch.rand(3, 2))
    assert inputs.keys() == {"1"}
    with (
        pytest.raises(ValueError, match="Linear has no batch norm with running statistics"),
        norm_inputs(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("inputs", [False, True])
def test_record_tells_inputs_from_outputs(inputs):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(3, 1, 2, 2)
    with record(model, ["1"], inputs) as found:
        logits = model(images)
    assert torch.equal(found["1"], images.flatten(1) if inputs else logits)


@pytest.mark.parametrize("output", ["tanh", "sigmoid"])
def test_generators_of_other_papers(output):
    torch.manual_seed(0)
    images = Generator((2, 8, 8), 5, 4, [0.5, 0.1], [0.25, 0.3], output).train()(
        3 * torch.randn(32, 5)
    )
    if output == "sigmoid":
        assert 0 <= images.min() < images.max() <= 1
    else:
        std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.tensor([0.5, 0.1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(std, torch.tensor([0.25, 0.3]), atol=1e-3, rtol=1e-2)


def test_an_unknown_output_has_a_hint():
    with pytest.raises(ValueError, match="unknown generator output 'tan': did you mean 'tanh'"):
        Generator((1, 8, 8), 5, 4, [0.5], [0.25], "tan")


# whole pseudo-batches, from noise to weights


@pytest.mark.parametrize("defended", [False, True])
@pytest.mark.parametrize("kind", [DAFL, DFQ])
def test_pseudo_batches_equal_the_naive_loop(double, wrn, kind, defended):
    """Two of four: weights of student and generator, and every loss, also with the
    vaccine's term.
    """
    teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
    other = copy.deepcopy(student).train()
    dafl = {"one_hot": 0.3, "activation": 0.2, "balance": 0.7}
    dfq = {"adversarial": 0.9, "batch_norm": 0.4, "entropy": 0.3, "balance": 0.7}
    settings = {
        "pseudo_batches": 4,
        "generator_lr": 0.01,
        **({**dafl} if kind is DAFL else {**dfq, "warmup": 0, "temperature": 2}),
    }
    sv = ShufflingVaccine(layers=3, warmup=0, verify=False, alpha=0.5)
    twin = started(
        tiny(kind, **settings), teacher, student, seed_of(0, "source", kind.__name__.lower())
    )
    generator, noises = twin.generator, [torch.randn(6, 5, generator=twin.rng) for _ in range(2)]

    source = tiny(kind, **settings)
    stream = distill(teacher, student, source, defenses=[sv] if defended else [], device="cpu")
    steps = [next(stream).losses for _ in range(2)]
    stream.close()

    if kind is DAFL:
        adam = literal.Adam(generator.parameters())
        sgd, rates = literal.SGD(other.parameters(), 0.9, 5e-4), [0.05, 0.05]
        terms = lambda images: literal.dafl_terms(teacher, images, "fc", **dafl)  # noqa: E731
        kd = literal.mean_kl
    else:
        adam = literal.Adam(generator.parameters(), (0.5, 0.999))
        sgd, rates = (
            literal.SGD(other.parameters(), 0.9, 1e-4, nesterov=True),
            [literal.cosine(0.05, i, 4) for i in range(2)],
        )
        terms = lambda images: literal.dfq_terms(teacher, other, images, **dfq)  # noqa: E731
        kd = lambda t, s: 4 * literal.mean_kl(t, s, 2.0)  # noqa: E731
    copies = literal.shuffled_teachers(teacher, sv.vaccine.permutations) if defended else None
    wanted = literal.online_pseudo_batches(
        generator, teacher, other, noises, terms, kd, adam, sgd, 0.01, rates, copies, alpha=0.5
    )
    assert [s.keys() for s in steps] == [w.keys() for w in wanted]
    for found, naive in zip(steps, wanted, strict=True):
        assert found == pytest.approx(naive, rel=1e-6)
    assert_equal_weights(student, other, source.generator, generator)
    assert not torch.allclose(student.fc.weight, wrn(seed=2, classes=3).fc.weight, atol=1e-4)


@pytest.mark.parametrize("defended", [False, True])
def test_dfad_equals_the_official_order(double, wrn, defended):
    """A generator step after the first and the third of five student steps."""
    teacher, student = wrn(seed=1, classes=3), wrn(seed=2, classes=3)
    other = copy.deepcopy(student).train()
    sv = ShufflingVaccine(layers=3, warmup=0, verify=False, alpha=0.5)
    # long enough for the milestones to lie after the steps that are compared
    settings = {"pseudo_batches": 100, "generator_lr": 0.01}
    twin = started(tiny(DFAD, **settings), teacher, student, seed_of(0, "source", "dfad"))
    noises = [torch.randn(6, 5, generator=twin.rng) for _ in range(7)]

    source = tiny(DFAD, **settings)
    stream = distill(teacher, student, source, defenses=[sv] if defended else [], device="cpu")
    steps = [next(stream).losses for _ in range(5)]
    stream.close()

    copies = literal.shuffled_teachers(teacher, sv.vaccine.permutations) if defended else None
    adam, sgd = (
        literal.Adam(twin.generator.parameters()),
        literal.SGD(other.parameters(), 0.9, 5e-4),
    )
    rounds = [noises[:2], noises[2:5], [*noises[5:], None]]
    wanted = literal.dfad_pseudo_batches(
        twin.generator, teacher, other, rounds, adam, sgd, 0.01, 0.05, copies, alpha=0.5
    )
    extra = {"sv_synthesis"} if defended else set()
    assert [set(s) for s in steps] == [
        {"kd"},
        {"generator", "kd"} | extra,
        {"kd"},
        {"generator", "kd"} | extra,
        {"kd"},
    ]
    for found, naive in zip(steps, wanted, strict=True):
        assert found == pytest.approx(naive, rel=1e-6)
    assert_equal_weights(student, other, source.generator, twin.generator)


def assert_equal_weights(*models):
    for found, naive in (models[:2], models[2:]):
        for (name, p), q in zip(found.named_parameters(), naive.parameters(), strict=True):
            torch.testing.assert_close(
                p, q, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("kind", ONLINE)
def test_generator_steps_do_what_they_are_for(teacher, student, kind):
    """On the same noise, each source's own loss is lower after a few generator steps."""
    source = started(
        tiny(
            kind,
            batch_size=64,
            generator_lr=1e-3,
            **({"generator_every": 1} if kind is DFAD else {}),
        ),
        teacher,
        student,
    )
    noise = torch.randn(64, 5, generator=torch.Generator().manual_seed(5))

    def loss():
        with torch.no_grad():
            images = source.generator(noise)
            logits, answer = teacher(images), student(images)
            if kind is DFAD:
                return -discrepancy(logits, answer).mean()
            with record(teacher, ["fc"], inputs=True) as found, norm_inputs(teacher) as inputs:
                teacher(images)
            if kind is DAFL:
                return (
                    0.05 * one_hot(logits)
                    + 5 / math.log(10) * class_balance(logits)
                    + 0.01 * activation_loss(found["fc"])
                )
            return (
                disagreement(logits, answer)
                + batch_norm_loss(teacher, inputs)
                + instance_entropy(logits)
                + 20 * class_balance(logits)
            )

    before = loss()
    for _ in range(6):
        source.batch([])
    assert loss() < before


class Counts:
    """Forward passes of a module, with and without gradients."""

    def __init__(self, module):
        self.with_gradients = self.without = 0
        module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        if torch.is_grad_enabled():
            self.with_gradients += 1
        else:
            self.without += 1

    @property
    def both(self):
        return self.with_gradients, self.without


@pytest.mark.parametrize(
    ("kind", "generator", "teacher", "student"),
    [(DAFL, (4, 0), (4, 0), (0, 0)), (DFAD, (2, 4), (2, 4), (2, 0)), (DFQ, (4, 0), (4, 0), (4, 0))],
)
def test_no_pass_is_wasted(wrn, kind, generator, teacher, student):
    """Passes in four pseudo-batches, (with gradients, without); of DFAD the second and
    the fourth have a generator step.
    """
    nets = wrn(seed=1), wrn(seed=2)
    source = started(tiny(kind, **({"warmup": 0} if kind is DFQ else {})), *nets)
    counts = [Counts(m) for m in (source.generator, *nets)]
    for _ in range(4):
        source.batch([])
    assert [c.both for c in counts] == [generator, teacher, student]


# what a pseudo-batch may touch


@pytest.mark.parametrize("kind", ONLINE)
def test_a_batch_leaves_teacher_and_student_alone(teacher, student, kind):
    source = started(tiny(kind), teacher, student)
    before = [weights(m) for m in (teacher, student)]
    for _ in range(4):
        batch = source.batch([])
        assert not any(
            t.requires_grad for t in (batch.images, batch.logits, *batch.losses.values())
        )
        assert batch.images.shape == (6, 1, 8, 8)
        torch.testing.assert_close(batch.logits, teacher(batch.images))
    assert [same(weights(m), b) for m, b in zip((teacher, student), before, strict=True)] == [
        True,
        True,
    ]
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for model in (teacher, student):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert student.training
    assert not teacher.training


@pytest.mark.parametrize("kind", ONLINE)
def test_a_student_step_reaches_the_student_alone(teacher, student, kind):
    source = started(tiny(kind), teacher, student)
    batch = source.batch([])
    source.generator.zero_grad()
    _, kd, terms = source.student_loss(batch)
    assert kd.shape == (6,)
    assert terms == {}
    kd.mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for m in (teacher, source.generator) for p in m.parameters())


@pytest.mark.parametrize("kind", ONLINE)
def test_students_statistics_record_only_what_it_trains_on(wrn, kind):
    student = wrn(seed=2)
    list(distill(wrn(seed=1), student, tiny(kind), device="cpu"))
    counted = {
        m.num_batches_tracked.item() for m in student.modules() if isinstance(m, nn.BatchNorm2d)
    }
    assert counted == {6}


@pytest.mark.parametrize("kind", ONLINE)
def test_images_may_be_synthesised_at_any_time(teacher, student, kind):
    source = started(tiny(kind), teacher, student)
    source.batch([])
    state, rng = weights(source.generator), source.rng.get_state()
    images = source.synthesize(10, seed=3)
    assert images.shape == (10, 1, 8, 8)
    assert not images.requires_grad
    assert torch.equal(images, source.synthesize(10, seed=3))
    assert same(weights(source.generator), state)
    assert torch.equal(source.rng.get_state(), rng)
    assert source.generator.training
    if kind is DFQ:
        assert 0 <= images.min() < images.max() <= 1


# the stream


def test_dfq_warms_up_without_the_adversarial_term(wrn):
    steps = list(distill(wrn(seed=1), wrn(seed=2), tiny(DFQ, warmup=0.5), device="cpu"))
    assert ["adversarial" in s.losses for s in steps] == [False] * 3 + [True] * 3
    assert all({"batch_norm", "entropy", "balance", "kd"} <= s.losses.keys() for s in steps)
    assert (
        "adversarial"
        not in next(
            distill(wrn(seed=1), wrn(seed=2), tiny(DFQ, warmup=0, adversarial=0), device="cpu")
        ).losses
    )


def rates_of(optimizer, schedule, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return found


def test_learning_rates(teacher, student):
    def both(kind, **settings):
        source = started(
            tiny(kind, pseudo_batches=10, student_lr=1.0, generator_lr=1.0, **settings),
            teacher,
            student,
        )
        of_generator = rates_of(source.generator_optimizer, source.generator_schedule, 10)
        return rates_of(*source.optimizer(student), 10), of_generator

    found, of_generator = both(DAFL)
    assert found == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 2)
    assert of_generator == [1] * 10
    # five generator steps in ten student steps: the milestones .2 and .4 are the first
    # and the second of them
    found, of_generator = both(DFAD)
    assert found == pytest.approx([1] * 2 + [0.1] * 2 + [0.01] * 6)
    assert of_generator[:5] == pytest.approx([1, 0.1, 0.01, 0.01, 0.01])
    found, of_generator = both(DFQ)
    assert found == pytest.approx([literal.cosine(1, i, 10) for i in range(10)])
    assert of_generator == [1] * 10


def upper(images):
    return images[..., :4, :].mean()


class Darkens(Defense):
    """Asks the generator for images that are dark above (a generator that ends in a
    batch norm cannot make dark ones).
    """

    def synthesis_term(self, images, teacher_logits):
        assert images.requires_grad
        assert teacher_logits.requires_grad
        return 100 * upper(images)


@pytest.mark.parametrize("kind", ONLINE)
def test_a_defenses_synthesis_term_reaches_the_generator(wrn, kind):
    means = []
    for defenses in ([], [Darkens()]):
        source = tiny(kind, pseudo_batches=20, generator_lr=0.01)
        steps = list(distill(wrn(seed=1), wrn(seed=2), source, defenses=defenses, device="cpu"))
        means.append(upper(source.synthesize(20)))
    assert "darkens_synthesis" in steps[1].losses
    assert means[1] < means[0] - 0.01


@pytest.mark.parametrize("kind", [*ONLINE, ZSKT])
def test_a_generator_that_is_held_learns_no_more(wrn, kind):
    generators, students = {}, {}
    for hold in (False, True):
        source, student = tiny(kind, pseudo_batches=6, generator_lr=0.01), wrn(seed=2)
        late = TriggerUnlearning(start=0.5, inner_steps=1, triggers=1, hold=hold)
        generators[hold], students[hold] = [], []
        for _ in distill(wrn(seed=1), student, source, defenses=[late], device="cpu"):
            generators[hold].append(parameters_to_vector(source.generator.parameters()))
            students[hold].append(parameters_to_vector(student.parameters()))
    for held, free in zip(generators[True][:3], generators[False], strict=False):
        assert torch.equal(held, free), "it begins with the fourth pseudo-batch"
    assert all(torch.equal(later, generators[True][2]) for later in generators[True][3:])
    assert not torch.equal(generators[False][5], generators[False][2])
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(students[True])), (
        "the student goes on"
    )


@pytest.mark.parametrize("kind", ONLINE)
def test_a_resumed_run_equals_an_uninterrupted_one(wrn, tmp_path, kind):
    def fresh(**settings):
        # the vaccine verifies (half of any pool is below its mean) before the third
        # step, SR begins at the fifth
        defenses = [
            ShufflingVaccine(layers=3, warmup=0.3, sigma=0),
            SelfRetrospection(start=0.6, inner_steps=2),
        ]
        student = wrn(seed=2)
        return student, distill(
            wrn(seed=1), student, tiny(kind), defenses=defenses, device="cpu", **settings
        )

    whole, stream = fresh()
    wanted = [s.losses for s in stream]
    assert any("sv_synthesis" in losses for losses in wanted)
    assert "sr" in wanted[-1]
    found = []
    for stop in (1, 2, 4, 6):
        student, stream = fresh(checkpoint=tmp_path / "run.safetensors")
        for step in stream:
            found.append(step.losses)
            if step.index == stop:
                break
        stream.close()
    assert found == wanted
    assert same(weights(whole), weights(student))


@pytest.mark.parametrize("kind", ONLINE)
def test_the_seed_draws_everything(wrn, kind):
    runs = [
        [s.losses for s in distill(wrn(seed=1), wrn(seed=2), tiny(kind), seed=seed, device="cpu")]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 9, 7)])
@pytest.mark.parametrize("kind", ONLINE)
def test_images_of_any_shape(wrn, kind, shape):
    nets = [wrn(seed=seed, channels=shape[0]) for seed in (1, 2)]
    source = kind(shape, **{**TINY, "pseudo_batches": 2})
    assert [s.images.shape for s in distill(*nets, source, images_every=1, device="cpu")] == [
        (6, *shape)
    ] * 2


# errors


@pytest.mark.parametrize(("kind", "loss"), [(DAFL, "one_hot"), (DFAD, "kd"), (DFQ, "entropy")])
def test_a_loss_that_is_not_finite_stops_the_run(wrn, kind, loss):
    teacher, student = wrn(seed=1), wrn(seed=2)
    nn.init.constant_(teacher.fc.bias, float("nan"))
    with pytest.raises(
        Diverged, match=rf"^at step 1 the loss '{loss}' is nan; there is no checkpoint"
    ):
        next(distill(teacher, student, tiny(kind), device="cpu"))
    if kind is DFAD:
        return  # the gradient of |NaN| is 0
    # no weight has moved; batch norms have seen the images before the losses were read
    # back
    for (name, p), q in zip(student.named_parameters(), wrn(seed=2).parameters(), strict=True):
        assert torch.equal(p, q), name


def test_clip_limits_the_generators_step(teacher, student):
    source = started(tiny(DAFL), teacher, student)
    source.clip = 1e-3
    source.batch([])
    assert nn.utils.get_total_norm([p.grad for p in source.generator.parameters()]) <= 1.01e-3


class Convolutional(nn.Module):
    """A stranger's network without batch norm, and without a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 10, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x))).mean((2, 3))


def test_dfq_wants_a_teacher_with_batch_norm(student):
    with pytest.raises(
        ValueError,
        match=r"^Convolutional has no batch norm with running statistics: choose a source",
    ) as caught:
        started(tiny(DFQ), Convolutional(), student)
    assert "\n" not in str(caught.value)
    losses = started(tiny(DFQ, batch_norm=0), Convolutional(), student).batch([]).losses
    assert "batch_norm" not in losses


def test_dafl_finds_the_penultimate_features(teacher, student):
    assert last_linear(teacher) == "fc"
    assert (
        last_linear(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softplus()))
        == "2"
    )
    with pytest.raises(
        ValueError, match=r"^Convolutional has no nn\.Linear .*layer=.*activation=0$"
    ):
        started(tiny(DAFL), Convolutional(), student)
    with pytest.raises(
        ValueError, match="unknown layer of Convolutional 'lost': did you mean 'last'"
    ):
        started(tiny(DAFL, layer="lost"), Convolutional(), student)
    other = Convolutional()
    source = started(tiny(DAFL, layer="last", activation=2.0), other, student)
    batch = source.batch([])
    wanted = torch.relu(other.first(batch.images)).mean()
    torch.testing.assert_close(batch.losses["activation"], -2 * wanted)
    assert (
        "activation"
        not in started(tiny(DAFL, activation=0), Convolutional(), student).batch([]).losses
    )


@pytest.mark.parametrize("kind", [*ONLINE, ZSKT])
@pytest.mark.parametrize(
    "wrong", [{"shape": (8, 8)}, {"pseudo_batches": 0}, {"batch_size": 1}, {"z": 0}, {"width": 0}]
)
def test_impossible_sizes_are_refused(kind, wrong):
    with pytest.raises(ValueError, match="shape is" if "shape" in wrong else "at least") as caught:
        kind(**{"shape": (1, 8, 8), **wrong})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (DFAD, {"generator_every": 0}),
        (DFAD, {"milestones": (0.5, 1.5)}),
        (DFQ, {"warmup": 1}),
        (DFQ, {"temperature": 0}),
    ],
)
def test_impossible_settings_are_refused(kind, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind((1, 8, 8), **wrong)
