"""The one distillation loop: teacher, student, source and defences in; a stream of Step
out.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from abdlab import graphs as cuda_graphs
from abdlab.checkpoint import load_state, save_state
from abdlab.data import pick_device
from abdlab.defenses.defense import Defense
from abdlab.defenses.plans import follow
from abdlab.errors import CheckpointError, Diverged
from abdlab.features import compiled
from abdlab.features import precision as computing
from abdlab.graphs import Captured, Phases, captures, key_of
from abdlab.models import place
from abdlab.optim import check_finite, load_optimizer, take_step
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
    """Distil ``teacher`` into ``student`` (trained in place), one Step per
    pseudo-batch.

    Nothing here needs real data: ``exam`` is only called on the student and its numbers
    handed on.

    Args:
        teacher: maps images (N, C, H, W) to logits (N, classes); put in eval mode and
            never changed.
        student: the same mapping; trained in place on ``device``.
        source: makes the inputs and says how long the run is.
        defenses: any number, applied in this order.
        exam: measures the student, e.g. :class:`abdlab.evaluate.Exam`; held every
            ``exam_every`` steps and at the end.
        images_every: steps between Steps that carry sample images (the last one always
            does).
        checkpoint: file to resume from when it exists, and to save to every
            ``checkpoint_every`` steps, when the stream is closed, and at the end.
            Atomic; a run resumed on the same machine ends with the same numbers. One
            that is at its end already yields its last Step again, without losses.
        keep: steps whose checkpoint is also kept beside it, as NAME-STEP.safetensors,
            to branch from.
        resume_from: a checkpoint to branch from instead. Defences that it does not know
            start fresh, those it knows but that are not asked for are dropped; when
            ``checkpoint`` exists too, ``checkpoint`` wins.
        card: more entries for the checkpoint's card.
        precision: of all passes of a pseudo-batch, "float32" or "bf16"
            (:func:`abdlab.features.precision`). A vaccine is verified, and exams are
            held, in float32.
        graphs: on a CUDA device, run the student step, and ZSKT's generator step, from
            CUDA graphs (:mod:`abdlab.graphs`): the same updates up to round-off, for
            one launch each. They are captured after a few plain calls, and anew when a
            defence begins, ends or is tuned. A source or a defence that does not say
            that it can be captured (stamps cannot) makes the run go without, and a Step
            reports it. Not part of a checkpoint: a run may go on with or without.
        compile: run the student and the source's generator through torch.compile, which
            takes a minute or more first and needs a C++ compiler on a CPU: the same
            numbers up to round-off. Of the student, the largest parts in which no layer
            is recorded; never the teacher, whose layers the vaccine exchanges. Not part
            of a checkpoint either.
        seed: of the run; source and defences draw from generators of their own.
        device: "auto" takes the GPU when there is one.

    Raises:
        Diverged: when a loss, a gradient or a weight is not finite; the last good
            checkpoint is kept.
        ValueError: for graphs on a device without them; when another thread is using
            the teacher or the student.
        CheckpointError: when a checkpoint belongs to another run (source, length, seed
            or networks differ).
    """
    device = pick_device(device)
    if graphs:
        cuda_graphs.check(device)
    source.phases, uncaptured = Phases(graphs), []
    run = {"source": source.name, "length": len(source), "seed": seed}
    with claimed(teacher=teacher, student=student):
        place(teacher, device, precision).eval().requires_grad_(False)
        place(student, device, precision).train()
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
        }
        save_state(
            path, state, {**(card or {}), "run": run, "index": index, "optimizer_since": replaced}
        )

    saved_at = index if found and found == checkpoint else None
    began, total = time.perf_counter(), len(source)
    faster = ExitStack()
    try:
        faster.enter_context(compiled(student, source.recorded, compile))
        if generator := getattr(source, "generator", None):
            faster.enter_context(compiled(generator, wanted=compile))
        if index == total:
            measured = exam(student) if exam else {}
            yield Step(
                index,
                total,
                {},
                measured.get("acc"),
                measured.get("asr"),
                seconds=time.perf_counter() - began,
            )
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
