"""What every source declares, how settings build one, and how few settings it has."""

import inspect
import statistics
from dataclasses import dataclass

import pytest
import torch

from abdlab import CMI, DFQ, OOD, ZSKT, CleanKD, DeepInversion, distill, settings
from abdlab.sources import SOURCES, Batch, Source
from abdlab.sources.generated import Generated
from abdlab.sources.pooled import Pooled

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


def never(name):
    raise AssertionError(f"{name} was built, and is nobody's member")


@dataclass(kw_only=True, eq=False, repr=False)
class Longer(ZSKT):
    """A subclass that changes a default and has a setting of its own."""

    pseudo_batches: int = 123
    own: float = 0.5


class Noise(Source):
    """A source of a user's own module, without settings."""

    def __init__(self, shape):
        self.shape = shape

    def __len__(self):
        return 2

    def optimizer(self, student):
        return torch.optim.SGD(student.parameters(), lr=0.1), None

    def batch(self, defenses):
        images = torch.rand(4, *self.shape, generator=self.rng)
        return Batch(images, self.teacher(images))


class TestSettingsAsFields:
    def test_a_default_is_changed_by_declaring_the_field_again(self):
        assert (len(Longer(SHAPE)), Longer(SHAPE).student_steps) == (123, 10)
        assert Longer(SHAPE, own=2.0, width=3).own == 2.0
        assert len(ZSKT(SHAPE)) == 80_000

    def test_checks_of_the_parent_hold(self):
        with pytest.raises(ValueError, match="pseudo_batches, z and width must be at least 1"):
            Longer(SHAPE, z=0)

    @pytest.mark.parametrize("kind", SOURCES.values())
    def test_settings_are_keywords_only(self, kind):
        kinds = [p.kind for p in inspect.signature(kind).parameters.values()]
        given = {CleanKD: 2}.get(kind, 1)
        assert kinds[given:] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - given)

    def test_two_of_equal_settings_are_two(self):
        assert ZSKT(SHAPE) != ZSKT(SHAPE)
        assert len({ZSKT(SHAPE), ZSKT(SHAPE)}) == 2

    def test_sources_have_few_settings(self):
        counts = [len(inspect.signature(kind).parameters) for kind in SOURCES.values()]
        assert statistics.median(counts) <= 12
        assert max(counts) <= 20

    @pytest.mark.parametrize(("kind", "kept"), [(CMI, 14), (DeepInversion, 14)])
    def test_a_pools_size_outlives_its_images(self, wrn, kind, kept):
        source = kind(SHAPE, rounds=1, synthesis_steps=1, synthesis_batch=4, pool=kept)
        for _ in range(2):  # a source may be started again
            source.start(wrn(seed=1).requires_grad_(False), wrn(seed=2), CPU, 0)
            source.batch([])
            assert (source.pool_size, len(source.pool)) == (kept, 4)

    def test_a_banks_size_outlives_its_features(self, wrn):
        source = CMI(SHAPE, rounds=1, synthesis_steps=1, synthesis_batch=4, z=5, width=2, bank=3)
        for _ in range(2):
            source.start(wrn(seed=1).requires_grad_(False), wrn(seed=2), CPU, 0)
            source.batch([])
            assert (source.bank_size, len(source.bank)) == (3, 3)


class TestDeclared:
    def test_names_are_the_rows(self):
        assert {kind.name: kind for kind in SOURCES.values()} == dict(SOURCES)
        assert (Longer.name, Noise((1,)).name) == ("longer", "noise")

    @pytest.mark.parametrize("kind", [Source, Generated, Pooled, *SOURCES.values()])
    def test_what_the_loop_asks_for_is_there(self, kind):
        assert kind.generator is None, "until it is started"
        assert callable(kind.synthesize)
        assert isinstance(kind.recorded, (tuple, property))

    def test_a_source_without_images_of_its_own_says_so(self):
        with pytest.raises(NotImplementedError, match="its source noise does not synthesise"):
            Noise(SHAPE).synthesize(3)

    def test_the_students_loss_by_hand(self):
        # at T = 2, (2 log 3, 0) softens to (3/4, 1/4): KL = 3/4 log 3/2 + 1/4 log 1/2,
        # times 4
        source = Noise(SHAPE)
        source.student, source.temperature = lambda images: torch.zeros(1, 2), 2.0
        logits = torch.tensor([[2 * torch.log(torch.tensor(3.0)), 0.0]])
        _, kd, terms = source.student_loss(Batch(torch.zeros(1, *SHAPE), logits))
        assert kd.tolist() == pytest.approx([4 * 0.130812], rel=1e-5)
        assert terms == {}

    def test_a_source_of_a_few_lines_runs(self, wrn):
        steps = list(distill(wrn(seed=1), wrn(seed=2), Noise(SHAPE), device="cpu"))
        assert [set(step.losses) for step in steps] == [{"kd"}, {"kd"}]


class TestMadeBySettings:
    def test_the_data_set_says_how_images_may_move(self, digits):
        source = OOD.make(digits, {"patches": 8, "batch_size": 4}, never)
        assert (source.shape, source.patches) == (digits.shape, 8)
        assert (source.shift, source.flip) == (digits.shift, digits.flip)
        assert not {"shift", "flip", "shape"} & set(OOD.keys())

    def test_clean_data_go_to_the_one_source_that_takes_them(self, digits):
        source = CleanKD.make(digits, {"epochs": 2}, never)
        assert source.images is digits.train_images
        assert not {"images", "labels"} & set(CleanKD.keys())

    def test_members_are_built_by_name(self, digits):
        built = []

        def build(name):
            built.append(name)
            return DFQ(digits.shape, pseudo_batches=6)

        mix = SOURCES["mixed"]
        values = {"members": {"a": 1, "b": 3}, "pseudo_batches": 4}
        source = mix.make(digits, values, build)
        assert (built, source.counts()) == (["a", "b"], [1, 3])
        assert mix.depends_on(values) == ("a", "b")
        assert mix.keys() == ["members", "pseudo_batches", "student"]
        assert all(kind.depends_on({}) == () for kind in SOURCES.values() if kind is not mix)

    def test_unknown_settings_have_a_hint(self, digits):
        with pytest.raises(
            ValueError, match="unknown setting of zskt 'widht': did you mean 'width'"
        ):
            ZSKT.make(digits, {"widht": 3}, never)

    def test_older_runs_may_name_what_is_a_constant_now(self, digits):
        """As a run's config.json has it, where ranges are lists."""
        older = {"crop": [0.25, 1.0], "momentum": 0.9, "weight_decay": 1e-4, "rounds": 2}
        assert CMI.make(digits, older, never).rounds == 2
        assert ZSKT.make(digits, {"clip": 5.0}, never).clip == 5
        with pytest.raises(ValueError, match="unknown setting of zskt 'clip'"):
            ZSKT.make(digits, {"clip": 1.0}, never)

    def test_by_import_path(self, digits):
        found = settings(device="cpu").source(f"{__name__}:Noise", digits)
        assert isinstance(found, Noise)
        assert found.name == f"{__name__}:Noise"
        Noise.name = "noise"
