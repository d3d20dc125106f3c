"""The one distillation loop: teacher, student, source and defenses in; a stream of Step out.

- A run that is resumed on the same machine ends with the same numbers. Defenses that a
  ``resume_from`` checkpoint does not know start fresh; those it knows but that are not asked
  for are dropped.
- ``precision`` is of all passes of a pseudo-batch, "float32" or "bf16"
  (:func:`abdlab.features.precision`). A vaccine is verified, and exams are held, in float32.
- ``graphs``: on a CUDA device, the student step, and ZSKT's generator step, run from CUDA
  graphs (:mod:`abdlab.graphs`): the same updates up to round-off, for one launch each. A
  source or a defense that cannot be captured makes the run go without, and a Step says so.
- ``compile``: the student and the source's generator run through torch.compile, which takes
  a minute or more first, and a C++ compiler on a CPU. Never the teacher, whose layers the
  vaccine exchanges.

Neither of the latter two is part of a checkpoint: a run may go on with or without.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from abdlab import graphs as cuda_graphs
from abdlab.checkpoint import load_state, save_state
from abdlab.data import pick_device
from abdlab.defenses.defense import Defense
from abdlab.defenses.plans import follow, plans, tunable, until
from abdlab.errors import CheckpointError, Diverged
from abdlab.features import compiled
from abdlab.features import precision as computing
from abdlab.graphs import Captured, Phases, captures, key_of
from abdlab.identity import differences, fingerprint, settings_of
from abdlab.models import place
from abdlab.optim import check_finite, load_optimizer, take_step
from abdlab.probe import ModuleRandomness, check_pair, draws
from abdlab.side_by_side import claimed
from abdlab.sources.source import Batch, Source
from abdlab.stream import Step


def seed_of(seed: int, *names: str) -> int:
    """A seed for one part of a run, so that adding a part leaves the others' random
    numbers alone.
    """
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:7], "big")


def distill(
    teacher: nn.Module,
    student: nn.Module,
    source: Source,
    *,
    defenses: Sequence[Defense] = (),
    exam: Callable[[nn.Module], dict[str, float]] | None = None,
    exam_every: int | None = None,
    images_every: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep: Sequence[int] = (),
    resume_from: str | Path | None = None,
    card: dict | None = None,
    precision: str = "float32",
    graphs: bool = False,
    compile: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Iterator[Step]:
    """Distil ``teacher`` into ``student`` (trained in place), one Step per pseudo-batch.

    Args:
        teacher, student: map images (N, C, H, W) to logits (N, classes). The teacher is put
            in eval mode and never changed.
        source: makes the inputs, has the run's length.
        defenses: in the order in which they act; no two of one name.
        exam: measures the student every ``exam_every`` steps and at the end.
        images_every: steps between Steps with sample images.
        checkpoint, checkpoint_every: file to resume from, and to save to, also at the end.
        keep: steps whose checkpoint is kept beside it, as NAME-STEP.safetensors.
        resume_from: a checkpoint to branch from, where ``checkpoint`` does not exist.
        card: more entries for the checkpoint's card.
        precision, graphs, compile: how it computes, see the module's head.
        seed: of the run; source and defenses draw from generators of their own.

    Raises:
        Diverged: when a loss, a gradient or a weight is not finite.
        ValueError: for two defenses of one name, networks that do not fit together.
        CheckpointError: when a checkpoint belongs to another run.

    >>> from abdlab import ZSKT, build
    >>> nets = [build("wrn-10-1", width=4) for _ in range(2)]
    >>> source = ZSKT((3, 8, 8), pseudo_batches=2, batch_size=4)
    >>> len(list(distill(*nets, source)))
    2
    """
    names = [defense.name for defense in defenses]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two defenses are named {twice}: a run takes one of each name")
    device = pick_device(device)
    if graphs:
        cuda_graphs.check(device)
    source.phases, uncaptured = Phases(graphs), []
    run = {"source": source.name, "length": len(source), "seed": seed}
    looked = _example(source, device)
    with claimed(teacher=teacher, student=student):
        place(teacher, device, precision).eval().requires_grad_(False)
        place(student, device, precision).train()
        randomness = _probed(teacher, student, looked, device, seed, graphs)
        made = {
            "teacher": fingerprint(teacher),
            "precision": precision,
            **{part.name: settings_of(part) for part in (source, *defenses)},
        }
        source.start(teacher, student, device, seed_of(seed, "source", source.name))
        for defense in defenses:
            defense.start(
                teacher, student, device, seed_of(seed, "defense", defense.name), len(source)
            )
        optimizer, schedule = source.optimizer(student)
    index = 0

    checkpoint = Path(checkpoint) if checkpoint else None
    found = checkpoint if checkpoint and checkpoint.exists() else resume_from
    if found:
        state, old = load_state(found, device)
        if old.get("run") != run:
            raise CheckpointError(
                f"{found} belongs to another run ({old.get('run')}), not to this one ({run}):"
                " choose another checkpoint file"
            )
        index = old["index"]
        if found == checkpoint and (theirs := old.get("made")):  # older files do not say
            _check_maker(found, theirs, old.get("plans", {}), made, defenses, index)
        replaced = old["optimizer_since"]
        if replaced[0] not in [None, *(d.name for d in defenses)]:
            raise CheckpointError(
                f"{found} was saved after {replaced[0]} had replaced the optimiser: branch from an"
                " earlier one to leave it out"
            )
        try:
            student.load_state_dict(state["student"])
            source.restore(state["source"])
            for defense in defenses:
                if defense.name in state["defenses"]:
                    defense.restore(state["defenses"][defense.name])
                    defense.before(max(index - 1, 0))
                if defense.name == replaced[0]:
                    optimizer, schedule = defense.optimizer(*replaced[1:])
            if randomness and "modules" in state:
                randomness.states = [value.cpu() for value in state["modules"]]
            load_optimizer(optimizer, state["optimizer"])
            if schedule is not None:
                schedule.load_state_dict(state["schedule"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            reason = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
            raise CheckpointError(f"{found} does not fit these networks: {reason}") from error
    else:
        replaced = [None]

    def check() -> None:
        bad = next(
            (name for name, p in student.named_parameters() if not torch.isfinite(p).all()), None
        )
        if bad:
            raise Diverged(
                f"after step {index} the student's {bad} is not finite; {_last_good(checkpoint)}"
            )

    def save(path: Path) -> None:
        check()
        state = {
            "student": student.state_dict(),
            "source": source.state(),
            "defenses": {d.name: d.state() for d in defenses},
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict() if schedule is not None else None,
            **({"modules": randomness.states} if randomness else {}),
        }
        followed = {d.name: plans(d) for d in defenses}
        mine = {"run": run, "made": made, "plans": followed, "index": index}
        save_state(path, state, {**(card or {}), **mine, "optimizer_since": replaced})

    saved_at = index if found and found == checkpoint else None
    began, total = time.perf_counter(), len(source)
    faster = ExitStack()
    try:
        faster.enter_context(compiled(student, source.recorded, compile))
        if source.generator is not None:
            faster.enter_context(compiled(source.generator, wanted=compile))
        if index == total:
            measured = exam(student) if exam else {}
            told = (f"{found} is finished: the student is handed back, and nothing is trained",)
            scores = measured.get("acc"), measured.get("asr")
            seconds = time.perf_counter() - began
            yield Step(index, total, {}, *scores, events=told, seconds=seconds)
        while index < total:
            events = []
            for defense in defenses:
                with claimed(teacher=teacher):
                    events += [*follow(defense, index), *defense.before(index)]
                steps_left = source.steps_left(index)
                if new := defense.optimizer(index, steps_left):
                    (optimizer, schedule), replaced = new, [defense.name, index, steps_left]
            plain = [part.name for part in (source, *defenses) if not captures(part)]
            if graphs and plain != uncaptured:
                uncaptured = plain
                if plain:
                    told = f"{' and '.join(plain)} cannot be captured"
                    events.append(f"CUDA graphs: off from pseudo-batch {index}, {told}")
            with (
                claimed(teacher=teacher, student=student),
                computing(precision, device, teacher, student),
                randomness.drawing() if randomness else nullcontext(),
            ):
                losses = _pseudo_batch(
                    source, defenses, student, optimizer, schedule, index, checkpoint
                )
            index += 1
            last, measured, shown = index == total, {}, None
            if last:
                check()
            if exam and (last or (exam_every and index % exam_every == 0)):
                measured = exam(student)
                student.train()
            if last or (images_every and index % images_every == 0):
                shown = losses.pop("images")[:64].float().cpu()
            losses.pop("images", None)
            if checkpoint and (last or (checkpoint_every and index % checkpoint_every == 0)):
                save(checkpoint)
                saved_at = index
            if checkpoint and index in keep:
                save(checkpoint.with_name(f"{checkpoint.stem}-{index}{checkpoint.suffix}"))
            yield Step(
                index,
                total,
                losses,
                measured.get("acc"),
                measured.get("asr"),
                shown,
                tuple(events),
                time.perf_counter() - began,
            )
    except GeneratorExit:
        if checkpoint and saved_at != index:
            save(checkpoint)
        raise
    finally:
        faster.close()
        source.phases = Phases()  # graphs hold memory of their own
        student.eval()


def _example(source: Source, device: torch.device) -> Tensor | None:
    """Two images (2, C, H, W) of noise, of the source's shape; None where it does not say
    which.
    """
    for part in (source, *getattr(source, "members", ())):
        images = getattr(part, "images", None)
        shape = images.shape[1:] if isinstance(images, Tensor) else getattr(part, "shape", None)
        if shape is not None:
            noise = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
            return noise.to(device)
    return None


def _probed(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor | None,
    device: torch.device,
    seed: int,
    graphs: bool,
) -> ModuleRandomness | None:
    """Check that both networks answer alike; the random numbers of the student's modules,
    where they draw any.
    """
    if images is None:
        return None
    check_pair(teacher, student, images)
    if not draws(student, images):
        return None
    if graphs:
        raise ValueError(
            "the student draws random numbers (dropout), which a CUDA graph would repeat: leave"
            " graphs out"
        )
    return ModuleRandomness(device, seed_of(seed, "modules"))


def _check_maker(
    found: Path, theirs: dict, planned: dict, made: dict, defenses: Sequence[Defense], index: int
) -> None:
    """Raise CheckpointError where another teacher or other settings made a checkpoint.

    What could be tuned while it ran counts up to where it stopped.
    """
    theirs, mine = ({**values} for values in (theirs, json.loads(json.dumps(made))))
    for defense in defenses:
        for name in tunable(defense):
            for values in (theirs, mine):
                values[defense.name] = {**values.get(defense.name, {}), name: None}
            if name in (old := planned.get(defense.name, {})):
                theirs[defense.name][name] = [[*s] for s in until(old[name], index)]
                now = plans(defense).get(name, [])
                mine[defense.name][name] = [[*s] for s in until([[*s] for s in now], index)]
    if differ := differences(theirs, mine):
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise CheckpointError(
            f"{found} was made by another run: {'; '.join(differ[:3])}{more}. Choose another"
            " checkpoint file, or branch from this one with resume_from"
        )


def _pseudo_batch(source, defenses, student, optimizer, schedule, index, checkpoint) -> dict:
    """One pseudo-batch; returns its mean losses as floats, and its images under
    "images".

    The host reads from the device once, at the end: nothing before asks whether a
    number is finite.
    """
    batch = source.batch(defenses)
    for defense in defenses:
        defense.observe(batch)
    dropped = tuple(dict.fromkeys(name for defense in defenses for name in defense.dropped()))
    weights = [w for w in (d.sample_weights(batch) for d in defenses) if w is not None]
    shown, batch, weights = batch, *_held(source.phases, batch, weights)

    def step() -> tuple[tuple[str, ...], Tensor, Tensor]:
        """(names, values of the losses, norm of their gradient)."""
        logits, kd, terms = source.student_loss(batch)
        terms = {name: term for name, term in terms.items() if name not in dropped}
        terms = {"kd": (kd * math.prod(weights)).mean() if weights else kd.mean(), **terms}
        for defense in defenses:
            term = defense.student_term(batch, logits)
            if term is not None:
                terms[defense.name] = term
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        norm = take_step([optimizer], student, source.clip)
        return tuple(terms), torch.stack([term.detach() for term in terms.values()]), norm

    drawing = [defense for defense in defenses if isinstance(defense, Captured)]
    shapes = tuple(x.shape for x in (batch.images, *batch.features.values(), *weights))
    totals, norms = {}, dict(source.norms)
    for _ in range(source.student_steps):
        for defense in drawing:
            defense.draw(batch)
        key = key_of("student", (source, *defenses), optimizer, shapes, dropped)
        names, values, norm = source.phases.run(key, step, [optimizer])
        totals[names] = totals.get(names, 0) + values
        norms["+".join(names)] = norms.get("+".join(names), 0) + norm
        if schedule is not None:
            schedule.step()
    sums = {name: value * source.student_steps for name, value in shown.losses.items()}
    for names, total in totals.items():
        for name, value in zip(names, total.unbind(), strict=True):
            sums[name] = sums[name] + value if name in sums else value
    read = _read([*sums.values(), *norms.values()])
    losses = {name: value / source.student_steps for name, value in zip(sums, read, strict=False)}
    try:
        check_finite(losses, dict(zip(norms, read[len(sums) :], strict=True)))
    except Diverged as error:
        raise Diverged(f"at step {index + 1} {error}; {_last_good(checkpoint)}") from None
    return {**losses, "images": shown.images}


def _read(values: list[Tensor]) -> list[float]:
    """Scalars from the device: where the host waits for it."""
    return torch.stack(
        [value.double() if value.device.type != "mps" else value for value in values]
    ).tolist()


def _held(phases: Phases, batch: Batch, weights: list[Tensor]) -> tuple[Batch, list[Tensor]]:
    """What the student steps read, where they find it in every pseudo-batch (without
    graphs: as it is).
    """
    if not phases.graphs:
        return batch, weights
    features = {
        name: phases.hold(f"feature {name}", feature) for name, feature in batch.features.items()
    }
    labels = None if batch.labels is None else phases.hold("labels", batch.labels)
    images, logits = phases.hold("images", batch.images), phases.hold("logits", batch.logits)
    weights = [phases.hold(f"weights {i}", weight) for i, weight in enumerate(weights)]
    return replace(batch, images=images, logits=logits, features=features, labels=labels), weights


def _last_good(checkpoint: Path | None) -> str:
    if checkpoint and checkpoint.exists():
        return f"the last good checkpoint is {checkpoint}"
    return "there is no checkpoint (pass checkpoint= and checkpoint_every= to have one)"
