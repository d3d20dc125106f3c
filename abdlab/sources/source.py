"""What every source of a student's inputs is: it makes batches, and says how the
student learns from one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from abdlab.errors import did_you_mean, keywords
from abdlab.graphs import Phases
from abdlab.losses import kl

if TYPE_CHECKING:
    from abdlab.data import Dataset

#: what a source takes from the data set's fields of the same names: how images may
#: move while their labels stay true
AUGMENT = ("shift", "flip")


@dataclass
class Batch:
    """One pseudo-batch: what the student sees in ``student_steps`` steps.

    Attributes:
        images: (B, C, H, W), detached; synthetic ones may leave [0, 1].
        logits: the teacher's (B, classes), detached.
        features: what the source compares of the teacher's layers (ZSKT: attention
            maps), by layer name, detached.
        labels: (B,), only for sources with real data.
        losses: detached scalars to report (the generator's, say).
        synthesised: the source made the images, and the defenses' ``synthesis_term``
            had its say in that. False where they are found (patches of a photograph,
            real data), so that a defense can only weigh them.

    >>> batch = Batch(torch.rand(4, 1, 8, 8), torch.zeros(4, 10))
    >>> batch.synthesised, batch.labels
    (True, None)
    """

    images: Tensor
    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    synthesised: bool = True


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width) as a tuple; ValueError when it is none.

    >>> image_shape([3, 32, 32])
    (3, 32, 32)
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"shape is (channels, height, width), for example (3, 32, 32), not {tuple(shape)}"
        )
    return tuple(shape)


class Captured:
    """What :mod:`abdlab.graphs` asks of a source, and no part of the idea: a source
    that leaves it alone runs without CUDA graphs.
    """

    #: its ``student_loss`` may be captured as a CUDA graph: it draws nothing, asks the
    #: device nothing, and decides by :meth:`branch` alone
    captures: bool = False
    #: the run's pieces; :func:`abdlab.distill.distill` hands others in where they are
    #: CUDA graphs
    phases: Phases = Phases()

    def branch(self) -> Hashable:
        """All that ``student_loss`` decides by in Python, the batch's shapes aside."""
        return None


class Source(Captured):
    """Makes a student's inputs, and says how the student learns from them.

    One pseudo-batch, as :func:`abdlab.distill.distill` runs it::

        batch = source.batch(defenses)  # images, and the teacher's logits on them
        repeat source.student_steps times:
            logits, kd, terms = source.student_loss(batch)
            minimise kd.mean() + sum of the terms  # defenses weigh and add here

    ``len(source)`` is the run's length in pseudo-batches. A source holds settings until
    :meth:`start` binds it to a run; then it holds that run's networks too, so that it
    serves one run at a time. Its settings are the fields of a dataclass: a subclass
    changes a default by declaring the field again.

    >>> from abdlab import build, distill
    >>> @dataclass(eq=False)
    ... class Noise(Source):
    ...     shape: tuple
    ...     pseudo_batches: int = 3
    ...     def __len__(self):
    ...         return self.pseudo_batches
    ...     def optimizer(self, student):
    ...         return torch.optim.Adam(student.parameters()), None
    ...     def batch(self, defenses):
    ...         images = torch.rand(4, *self.shape, generator=self.rng).to(self.device)
    ...         return Batch(images, self.teacher(images))
    >>> teacher, student = (build("wrn-10-1", channels=1, width=2) for _ in "TS")
    >>> [sorted(step.losses) for step in distill(teacher, student, Noise((1, 8, 8)))]
    [['kd'], ['kd'], ['kd']]
    """

    #: what labels, presets and a run's files call it; its row in a registry says
    name: str = "source"
    #: student steps on each pseudo-batch
    student_steps: int = 1
    #: the student's gradient is clipped to this norm; None leaves it
    clip: float | None = None
    #: of :meth:`student_loss`
    temperature: float = 1.0
    #: the network that makes the images, once it is started; None where none does
    generator: nn.Module | None = None
    #: names of the student's layers that :meth:`student_loss` records, once it is
    #: started
    recorded: tuple[str, ...] = ()
    #: pseudo-batches that a run takes of it, where that is not its own length: it is a
    #: member of a mix
    drawn: int | None = None

    def __init_subclass__(cls, **given):
        super().__init_subclass__(**given)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def horizon(self) -> int:
        """How many pseudo-batches this run takes of it: what the schedules of the
        source's own networks must last for.
        """
        return len(self) if self.drawn is None else self.drawn

    def steps_left(self, index: int) -> int:
        """Student steps from pseudo-batch ``index`` (0 is the first) to the run's end."""
        return (len(self) - index) * self.student_steps

    def start(
        self, teacher: nn.Module, student: nn.Module, device: torch.device, seed: int
    ) -> None:
        """Bind to one run and make what it needs (generator, optimisers), drawing from
        ``seed`` alone.
        """
        self.teacher, self.student, self.device = teacher, student, device
        self.rng = torch.Generator().manual_seed(seed)
        #: norms of its own networks' gradients, by the names of the losses: what
        #: :func:`abdlab.optim.take_step` returned last
        self.norms: dict[str, Tensor] = {}

    def optimizer(self, student: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
        """The student's optimiser and its schedule, which steps once per student step."""
        raise NotImplementedError

    def batch(self, defenses: Sequence[Any]) -> Batch:
        """The next pseudo-batch; the source's own networks learn here, with each
        defense's ``synthesis_term`` added.
        """
        raise NotImplementedError

    def student_loss(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(student's logits, KD loss per sample (B,), further named loss terms as
        scalars).

        By default T^2 x KL(T || S) at the ``temperature`` T, summed over classes, and
        no further term.
        """
        logits = self.student(batch.images)
        return logits, self.temperature**2 * kl(batch.logits, logits, self.temperature), {}

    def synthesize(self, n: int, seed: int = 0) -> Tensor:
        """``n`` images (n, C, H, W) such as it makes now, drawn from ``seed``; the run's
        own random numbers stay as they are.

        Raises:
            NotImplementedError: for a source that shows no images of its own.
        """
        raise NotImplementedError(f"its source {self.name} does not synthesise images")

    def state(self) -> dict:
        """All that a resumed run needs, as nested dicts of tensors and numbers."""
        return {"rng": self.rng.get_state()}

    def restore(self, state: dict) -> None:
        """Go on from what :meth:`state` returned."""
        self.rng.set_state(state["rng"].cpu())

    # How settings build it.

    @classmethod
    def make(
        cls, data: Dataset, values: Mapping[str, Any], build: Callable[[str], Source]
    ) -> Source:
        """A source for a data set: only its shape is used, and how its images may move.

        Args:
            values: the settings of the source's section, by key.
            build: makes another source by name, for one that has members.

        Raises:
            ValueError: for values that it does not know, with a "did you mean", or that
                are impossible.
        """
        return cls(data.shape, **cls.options(data, values))

    @classmethod
    def keys(cls) -> list[str]:
        """The settings that its section may have: the keywords with a default, less
        those that the data set says.
        """
        parameters = inspect.signature(cls).parameters
        return [
            key
            for key in keywords(cls)
            if parameters[key].default is not inspect.Parameter.empty and key not in AUGMENT
        ]

    @classmethod
    def depends_on(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of other sources whose sections describe it too, with these settings."""
        return ()

    @classmethod
    def options(cls, data: Dataset, values: Mapping[str, Any]) -> dict[str, Any]:
        """Its keywords: ``values``, and of the data set's own :data:`AUGMENT` those that
        it has and ``values`` lack.

        A value that has become a constant of the class is left out where it is that
        constant, so that the settings of older runs still build their sources.

        Raises:
            ValueError: for any other value that it does not know.
        """
        known = set(keywords(cls))
        found = {key: getattr(data, key) for key in AUGMENT if key in known}
        for key, value in values.items():
            same = tuple(value) if isinstance(value, list) else value
            if key in known:
                found[key] = value
            elif not hasattr(cls, key) or getattr(cls, key) != same:
                raise ValueError(did_you_mean(f"setting of {cls.name}", key, cls.keys()))
        return found
