"""No look at the device inside a pseudo-batch, and pieces that can be replayed: what
CUDA graphs need, proved on a CPU.
"""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from abdlab import (
    DFAD,
    OOD,
    ZSKT,
    CleanKD,
    DeepInversion,
    Diverged,
    Mixed,
    SelfRetrospection,
    ShufflingVaccine,
    TriggerUnlearning,
    distill,
    graphs,
)
from abdlab.checkpoint import load_state
from abdlab.data import deliver
from abdlab.defenses import Defense, self_retrospection
from abdlab.optim import check_finite, take_step
from abdlab.settings import defaults, settings
from abdlab.sources.source import Source
from abdlab.train_together import train_together

SHAPE = (1, 8, 8)
CPU = torch.device("cpu")


def zskt(**settings):
    return ZSKT(
        SHAPE,
        **{
            "pseudo_batches": 12,
            "batch_size": 8,
            "student_steps": 3,
            "z": 5,
            "width": 4,
            **settings,
        },
    )


def abd(**sr):
    """The vaccine from a third of the run on, self-retrospection for its last 40 %."""
    return [
        ShufflingVaccine(layers=3, warmup=0.3, verify=False),
        SelfRetrospection(start=0.6, **{"inner_steps": 2, **sr}),
    ]


class Looks(TorchFunctionMode):
    """What Python asks a tensor for on the host, by name."""

    NAMES = (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
        "nonzero",
        "equal",
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        masked = name == "__getitem__" and any(
            getattr(x, "dtype", None) == torch.bool for x in tree_leaves(args[1])
        )
        if name in self.NAMES or masked:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """The operations that make a GPU's host wait, also those that torch calls by
    itself.
    """

    WAIT = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "unique",
        "allclose",
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2].lstrip("_")
        if any(name.startswith(wait.lstrip("_")) for wait in self.WAIT):
            self.found.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("sr", [{}, {"order": 2}, {"fraction": 0.5}, {"statistics": "mixed"}])
def test_a_pseudo_batch_reads_from_the_device_once(wrn, monkeypatch, sr, precision):
    # Adam for delta as it is on CUDA: the plain one reads its own count of steps, which
    # then lies on the host
    monkeypatch.setattr(self_retrospection, "Adam", partial(Adam, fused=True))
    stream = distill(
        wrn(seed=1),
        wrn(seed=2).train(),
        zskt(),
        defenses=abd(**sr),
        precision=precision,
        device="cpu",
    )
    for step in itertools.islice(stream, 8):  # both defenses have begun, and know the images' scale
        assert step.losses
    with Looks() as looks, Reads() as reads:
        step = next(stream)
    assert step.losses.keys() == {"generator", "sv_synthesis", "kd", "attention", "sr"}
    assert looks.found == ["tolist"]
    assert reads.found == []


@pytest.mark.parametrize("kind", [OOD, CleanKD, DFAD, Mixed])
def test_other_sources_read_once_too(wrn, digits, kind, monkeypatch):
    # SGD as it is on CUDA
    monkeypatch.setattr("abdlab.optim.fusable", lambda model: True)
    made = {
        OOD: lambda: OOD(SHAPE, patches=32, epochs=3, batch_size=8, cutmix_share=0),
        CleanKD: lambda: CleanKD(
            digits.train_images, digits.train_labels, epochs=3, batch_size=10, shift=1
        ),
        DFAD: lambda: DFAD(SHAPE, pseudo_batches=12, batch_size=8, z=5, width=4, generator_every=2),
        Mixed: lambda: Mixed(
            [zskt(), DFAD(SHAPE, pseudo_batches=12, batch_size=8, z=5, width=4, generator_every=1)]
        ),
    }[kind]()
    stream = distill(
        wrn(seed=1),
        wrn(seed=2),
        made,
        defenses=[ShufflingVaccine(layers=3, warmup=0, verify=False)],
        device="cpu",
    )
    for _ in range(3):
        next(stream)
    with Reads() as reads:
        next(stream)
    assert reads.found == []


def test_the_two_recorders_see_a_look():
    x = torch.ones(3)
    with Looks() as looks, Reads() as reads:
        assert x.sum().item() == 3
        assert x[0] > 0
        x[x > 0], x.nonzero()
    assert looks.found == ["item", "__bool__", "__getitem__", "nonzero"]
    assert set(reads.found) == {
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::nonzero",
    } - {"aten::is_nonzero"}


OPTIMISERS = [
    partial(Adam, fused=True),
    Adam,
    partial(SGD, momentum=0.9, fused=True),
    partial(SGD, momentum=0.9, weight_decay=0.1),
]


@pytest.mark.parametrize("make", OPTIMISERS, ids=["fused Adam", "Adam", "fused SGD", "SGD"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_whose_gradient_is_not_finite_is_not_taken(make, bad):
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters(), lr=0.1)

    def step(gradient):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        return take_step([optimizer], model, 5.0)

    assert step(0.5).item() == pytest.approx(0.5 * 8**0.5)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    norm = step(bad)
    assert not norm.isfinite()
    for old, new in zip(
        *(tree_leaves(x) for x in (before, [model.state_dict(), optimizer.state_dict()])),
        strict=True,
    ):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
    assert step(0.5).isfinite()
    assert not torch.equal(model.weight, before[0]["weight"])
    assert not hasattr(optimizer, "found_inf")


def test_what_is_not_finite_is_named():
    check_finite({"kd": 1.0}, {"kd": 2.0})
    with pytest.raises(Diverged, match=r"^the loss 'attention' is nan$"):
        check_finite(
            {"kd": 1.0, "attention": float("nan"), "sr": float("inf")}, {"kd": float("nan")}
        )
    with pytest.raises(Diverged, match=r"^the gradient of kd\+attention is not finite$"):
        check_finite({"kd": 1.0}, {"generator": 1.0, "kd+attention": float("inf")})


class Explodes(torch.autograd.Function):
    """Itself, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("whose", ["generator", "kd"])
def test_a_gradient_that_is_not_finite_stops_the_run_with_finite_losses(wrn, whose):
    source = zskt(attention=0)
    plain = source._kd

    def kd(teacher, student):
        mine = teacher.requires_grad == (whose == "generator")
        return Explodes.apply(plain(teacher, student)) if mine else plain(teacher, student)

    source._kd = kd
    student = wrn(seed=2)
    with pytest.raises(
        Diverged, match=rf"at step 1 the gradient of {whose} is not finite; there is no checkpoint"
    ):
        next(distill(wrn(seed=1), student, source, device="cpu"))
    moved = any(
        not torch.equal(p, q)
        for p, q in zip(student.parameters(), wrn(seed=2).parameters(), strict=True)
    )
    assert moved == (whose == "generator")


def test_draws_reach_a_cpu_as_they_are():
    drawn = torch.rand(3)
    assert deliver(drawn, "cpu") is drawn


class Tape(TorchDispatchMode):
    """A CUDA graph's stand-in: it records operations, and runs them again on the very
    same memory, without their Python.

    What a graph cannot hold (a look at the device, a random number) is an error.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name, kwargs or {}
        assert not any(
            word in name
            for word in ("rand", "bernoulli", "normal_", "local_scalar", "nonzero", "equal")
        ), name
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    @torch.autocast("cpu", enabled=False)
    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            self._again()

    def _again(self):
        for function, args, kwargs, recorded in self.calls:
            result = function(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch):
    """Graphs on a CPU, from :class:`Tape`; counts captures, and replays after each."""
    replays = []

    def capture(function):
        number = len(replays)
        replays.append(0)
        with Tape() as tape:
            result = function()

        def replay():
            # a capture runs nothing, but recording did: the first replay is done
            if replays[number]:
                tape.replay()
            replays[number] += 1

        return result, replay

    monkeypatch.setattr(self_retrospection, "Adam", partial(Adam, fused=True))  # as on CUDA
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "beside", lambda function: function())
    monkeypatch.setattr(graphs, "check", lambda device: None)
    return replays


def both(wrn, make, defenses, **settings):
    """(steps, student) of a run as Python, and of the same one from graphs."""
    found = []
    for with_graphs in (False, True):
        student = wrn(seed=2)
        stream = distill(
            wrn(seed=1),
            student,
            make(),
            defenses=defenses(),
            graphs=with_graphs,
            device="cpu",
            **settings,
        )
        found.append((list(stream), student))
    return found


def assert_alike(plain, replayed):
    """To the last digits in float64. In float32 learning rates on the device are
    rounded, and training amplifies it.
    """
    exact = torch.get_default_dtype() == torch.float64
    for a, b in zip(plain[0], replayed[0], strict=True):
        assert b.losses == pytest.approx(
            a.losses, rel=1e-9 if exact else 2e-2, abs=1e-12 if exact else 1e-4
        )
    for (name, p), q in zip(
        plain[1].state_dict().items(), replayed[1].state_dict().values(), strict=True
    ):
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 2e-2, "atol": 2e-3}
        torch.testing.assert_close(q, p, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


NONE, SV, SR = list, lambda: abd()[:1], lambda: abd()[1:]


@pytest.mark.parametrize(
    ("defenses", "captures"),
    # the generator's piece, and the student's: each anew when the vaccine, and when
    # self-retrospection begins
    [
        (NONE, 2),
        (SV, 4),
        (SR, 4),
        (abd, 6),
        (lambda: abd(order=2), 6),
    ],
)
def test_replayed_pieces_compute_what_python_does(double, wrn, taped, defenses, captures):
    plain, replayed = both(wrn, lambda: zskt(pseudo_batches=20), defenses)
    assert_alike(plain, replayed)
    assert len(taped) == captures
    assert min(taped) > 1
    assert [s.events for s in plain[0]] == [s.events for s in replayed[0]]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_in_less_precision_too(wrn, taped, precision):
    plain, replayed = both(wrn, lambda: zskt(pseudo_batches=20), abd, precision=precision)
    assert_alike(plain, replayed)
    assert len(taped) == 6


@pytest.mark.parametrize("kind", ["ood", "clean", "dfad", "mixed"])
def test_the_student_steps_of_other_sources_are_replayed(wrn, taped, digits, kind, monkeypatch):
    monkeypatch.setattr("abdlab.optim.fusable", lambda model: True)  # as on CUDA
    dfad = lambda: DFAD(SHAPE, pseudo_batches=12, batch_size=8, z=5, width=4, generator_every=2)  # noqa: E731
    make = {
        "ood": lambda: OOD(SHAPE, patches=64, epochs=2, batch_size=8),
        "clean": lambda: CleanKD(
            digits.train_images, digits.train_labels, epochs=3, batch_size=10, shift=1
        ),
        "dfad": dfad,
        "mixed": lambda: Mixed([zskt(), dfad()], pseudo_batches=16),
    }[kind]
    assert_alike(*both(wrn, make, lambda: [ShufflingVaccine(layers=3, warmup=0, verify=False)]))
    assert taped


def test_a_tuned_weight_is_captured_anew(double, wrn, taped):
    defenses = lambda: [SelfRetrospection(start=0, inner_steps=1, weight=[[0, 1.0], [5, 20.0]])]  # noqa: E731
    plain, replayed = both(wrn, lambda: zskt(pseudo_batches=10), defenses)
    assert_alike(plain, replayed)
    assert len(taped) == 4


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_with_graphs_or_without(wrn, taped, tmp_path, first):
    whole, parts = wrn(seed=2), wrn(seed=2)
    steps = list(distill(wrn(seed=1), whole, zskt(), defenses=abd(), device="cpu"))
    stream = distill(
        wrn(seed=1),
        parts,
        zskt(),
        defenses=abd(),
        device="cpu",
        checkpoint=tmp_path / "run.safetensors",
        graphs=first,
    )
    found = list(itertools.islice(stream, 8))
    stream.close()
    kept = load_state(tmp_path / "run.safetensors")[0]["optimizer"]
    assert all(
        isinstance(group["lr"], float) and not group["capturable"] for group in kept["param_groups"]
    )
    parts = wrn(seed=2)
    stream = distill(
        wrn(seed=1),
        parts,
        zskt(),
        defenses=abd(),
        device="cpu",
        checkpoint=tmp_path / "run.safetensors",
        graphs=not first,
    )
    assert_alike((steps, whole), (found + list(stream), parts))


def test_what_cannot_be_captured_runs_without_and_says_so(wrn, taped):
    def stamps():
        return [TriggerUnlearning(start=0.5, inner_steps=2, triggers=2, hold=False)]

    plain, replayed = both(wrn, zskt, stamps)
    assert_alike(plain, replayed)
    events = {s.index: s.events[-1] for s in replayed[0] if s.events}
    assert events == {7: "CUDA graphs: off from pseudo-batch 6, tu cannot be captured"}
    assert len(taped) == 2


class Unknown(Defense):
    """A defense that nobody said can be captured."""


def test_a_defense_that_says_nothing_is_not_captured(wrn, taped):
    steps = list(
        distill(wrn(seed=1), wrn(seed=2), zskt(), defenses=[Unknown()], graphs=True, device="cpu")
    )
    assert taped == []
    assert steps[0].events == ("CUDA graphs: off from pseudo-batch 0, unknown cannot be captured",)
    assert not Source.captures


def test_graphs_keep_a_bounded_number_of_pieces_until_the_run_ends(wrn, taped):
    source, kept = zskt(pseudo_batches=40, student_steps=4), []
    defenses = [
        SelfRetrospection(start=0, inner_steps=1, weight=[[i, 1.0 + i] for i in range(0, 40, 2)])
    ]
    for _ in distill(wrn(), wrn(), source, defenses=defenses, graphs=True, device="cpu"):
        kept.append(len(source.phases._pieces))
    assert max(kept) == graphs.KEPT
    assert not source.phases.graphs


def test_graphs_on_a_cpu_are_one_clear_error(wrn):
    with pytest.raises(
        ValueError,
        match=r"^graphs=True needs a CUDA device, and this run is on cpu: leave graphs out$",
    ):
        next(distill(wrn(), wrn(), zskt(), graphs=True, device="cpu"))


def test_held_values_stay_where_they_are():
    phases, plain, x = (
        graphs.Phases(graphs=True),
        graphs.Phases(),
        torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    )
    assert plain.hold("x", x) is x
    held = phases.hold("x", x)
    assert held is not x
    assert held.stride() == x.stride()
    assert phases.hold("x", x + 1) is held
    assert torch.equal(held, x + 1)
    assert phases.hold("x", x[:1]) is not held
    assert phases.hold("y", x) is not held
    assert tree_map(type, phases.run(None, lambda: {"a": held})) == {"a": torch.Tensor}


def test_a_piece_that_is_replayed_again_still_says_what_its_gradient_was(double, wrn, taped):
    """The vaccine's weight goes up and comes back: the first piece runs again."""
    source, norms = zskt(pseudo_batches=18), []
    plan = [[0, 0.1], [6, 5.0], [12, 0.1]]
    defenses = [ShufflingVaccine(layers=3, warmup=0, verify=False, alpha=plan)]
    for _ in distill(
        wrn(seed=1), wrn(seed=2), source, defenses=defenses, graphs=True, device="cpu"
    ):
        norms.append(source.norms["generator+sv_synthesis"].item())
    plain, expected = zskt(pseudo_batches=18), []
    defenses = [ShufflingVaccine(layers=3, warmup=0, verify=False, alpha=plan)]
    for _ in distill(wrn(seed=1), wrn(seed=2), plain, defenses=defenses, device="cpu"):
        expected.append(plain.norms["generator+sv_synthesis"].item())
    assert norms == pytest.approx(expected, rel=1e-6)
    assert len(set(norms)) == 18


def test_graphs_and_compile_are_settings():
    assert settings("quick/digits", device="cpu").distilling() == {}
    assert {"graphs": False, "compile": False}.items() <= defaults("student").items()
    chosen = settings(
        "quick/digits",
        {"student.graphs": True, "student.compile": True, "teacher.compile": True},
        device="cpu",
    )
    assert chosen.distilling() == {"graphs": True, "compile": True}
    assert chosen.training(chosen.dataset())["compile"]


def test_networks_that_are_trained_together_are_replayed(double, wrn, taped, digits, monkeypatch):
    fused = partial(SGD, momentum=0.9, nesterov=True, fused=True)  # as on CUDA
    monkeypatch.setattr(
        "abdlab.train_together.sgd", lambda model, lr, *_, nesterov: fused(model.parameters(), lr)
    )
    sets = [(digits.train_images[:40].double(), digits.train_labels[:40])] * 2
    found = []
    for with_graphs in (False, True):
        models = [wrn(seed=i) for i in range(2)]
        options = {"epochs": 3, "batch_size": 10, "lr": 0.05, "shift": 1, "flip": True}
        stream = train_together(models, sets, graphs=with_graphs, device="cpu", **options)
        found.append(([s.losses["cross_entropy"] for pair in stream for s in pair], models))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-9)
    assert taped == [9, 9]  # of 12 steps of each network three run as Python
    for one, other in zip(found[0][1], found[1][1], strict=True):
        for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("defenses", [NONE, abd], ids=["plain", "SV and SR"])
def test_a_pools_teacher_is_replayed_too(wrn, taped, defenses, monkeypatch):
    monkeypatch.setattr("abdlab.optim.fusable", lambda model: True)  # as on CUDA
    sizes = {"rounds": 4, "synthesis_steps": 2, "kd_steps": 6, "synthesis_batch": 8}
    assert_alike(*both(wrn, lambda: DeepInversion(SHAPE, **sizes, batch_size=8), defenses))
    # the teacher's answers, and the student's steps, anew for each defense
    assert len(taped) >= 2
    assert max(taped) == 4 * 6 - graphs.WARM
