"""From a stranger's teacher to a defended student and a verdict: what notebook
08_your_teacher and ``abdlab defend`` do between their figures.
"""

from __future__ import annotations

import base64
import html
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abdlab.audit import POOL, Audit, Heritage, audit, steps_for
from abdlab.checkpoint import load_state, save_state, write_atomically
from abdlab.checks import check
from abdlab.data import Dataset
from abdlab.errors import short
from abdlab.evaluate import agreement, predict
from abdlab.forecast import Forecast, forecast, seconds_per_image
from abdlab.identity import fingerprint
from abdlab.labels import TEACHER, Label, name_of
from abdlab.owned import NONE, TORCHVISION, images_named, is_foreign, layers_told
from abdlab.presets import DEFENDED, NORMLESS
from abdlab.purifiers.bounded import batch_norms
from abdlab.runs import Run
from abdlab.settings import Settings, settings
from abdlab.students import check_folders
from abdlab.teachers import opened_teacher
from abdlab.values import read


def file_settings(
    file: str | Path,
    *,
    model: str | None = None,
    keywords: str | None = None,
    data: str = NONE,
    shape: str | None = None,
    classes: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    key: str | None = None,
    ignore: Sequence[str] | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """What a person says about a file of weights, as settings by dotted name; nothing is
    opened yet.

    Args:
        model: see :func:`abdlab.owned.make_network`. keywords: of its class, as a dict's
            text.
        data: see :func:`abdlab.owned.images_named`.
        shape, mean, std: numbers with commas between.
        prefix: of an argument's name in errors ("--" on the command line).

    Raises:
        ValueError: for a text that is no such thing.

    >>> file_settings("/a.pt", model="wrn-16-2", shape="3,32,32")["data.shape"]
    [3, 32, 32]
    """
    if model and is_foreign(model) and model.partition(":")[0] != TORCHVISION:
        sys.path.insert(0, os.getcwd())  # where the user's my_model.py lies
    found = {
        "teacher.file": str(file),
        "teacher.model": model,
        "teacher.keywords": None if keywords is None else _dict(f"{prefix}keywords", keywords),
        "teacher.mean": _numbers(f"{prefix}mean", mean, float),
        "teacher.std": _numbers(f"{prefix}std", std, float),
        "teacher.key": key,
        "teacher.ignore": list(ignore) if ignore else None,
        "data.name": images_named(data),
        "data.shape": _numbers(f"{prefix}shape", shape, int),
        "data.classes": classes,
    }
    return {name: value for name, value in found.items() if value is not None}


def _numbers(option: str, text: str | None, kind: type) -> list | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.strip("[]() ").split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas between, not {short(text)}") from None


def _dict(option: str, text: str) -> dict:
    try:
        value = read(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{option} takes a dict such as '{{\"depth\": 18}}', not {short(text)}")
    return value


def open_file(
    given: Mapping[str, Any], seed: int = 0, device: str = "auto"
) -> tuple[Settings, Dataset, nn.Module]:
    """A stranger's teacher, opened and probed; nothing is trained or written.

    Args:
        given: see :func:`file_settings`.

    Returns:
        settings of the preset that suits the images' size, the images, the teacher.

    Raises:
        ValueError: in one sentence, for whatever does not fit.
    """
    chosen = settings("quick/digits", given, seed=seed, device=device)
    check(chosen)
    data = chosen.dataset()
    chosen = settings(preset_for(data.shape), given, seed=seed, device=device)
    return chosen, data, opened_teacher(chosen, data)


def methods_for(teacher: nn.Module, label: str | None = None) -> tuple[str, str]:
    """The labels of the undefended and of the defended student of a teacher.

    Args:
        label: of the defended one; None takes the preset's, :data:`abdlab.presets.DEFENDED`,
            or for a teacher without batch norm the one that needs none.

    >>> methods_for(nn.Linear(2, 2), "unlearn+bounded/cmi+tc")
    ('cmi', 'unlearn+bounded/cmi+tc')
    """
    defended = label or (DEFENDED if batch_norms(teacher) else NORMLESS)
    return Label.parse(defended).source, defended


def purified_label(defended: str) -> list[str]:
    """The label of the purified teacher that a defended student learns from, in a list;
    empty where there is none.
    """
    purifiers = Label.parse(defended).purifiers
    return [str(Label(TEACHER, purifiers=purifiers))] if purifiers else []


def preset_for(shape: Sequence[int]) -> str:
    """The preset whose lengths and student suit images (C, H, W) of this size on a CPU.

    >>> preset_for((1, 16, 16)), preset_for((3, 32, 32))
    ('quick/digits', 'reduced/cifar10')
    """
    return "quick/digits" if min(shape[1:]) < 24 else "reduced/cifar10"


def share(value: float | None) -> str:
    """A share in percent, or "unknown".

    >>> share(0.981), share(None)
    ('98.1 %', 'unknown')
    """
    return "unknown" if value is None or value != value else f"{value:.1%}".replace("%", " %")


def introduce(teacher: nn.Module, chosen: Settings, data: Dataset, metrics: Mapping) -> str:
    """What was opened, in a few lines."""
    trigger = str(chosen.trigger) if chosen.trigger else "unknown"
    target = "unknown" if chosen.target is None else data.classes[chosen.target]
    images = f"{data.name}, {len(data.test_images)} test images"
    return "\n".join(
        (
            f"teacher: {chosen.opened or 'trained here'} ({layers_told(teacher)})",
            f"images: {images}, {'x'.join(map(str, data.shape))}, {len(data.classes)} classes",
            f"trigger: {trigger}, target: {target}, seed {chosen.seed}",
            f"ACC {share(metrics.get('acc'))}, ASR {share(metrics.get('asr'))}",
        )
    )


def identity(chosen: Settings, metrics: Mapping, classes: Sequence[str] = ()) -> str:
    """A teacher in one line: file or trigger, target, data, seed, ACC and ASR; what is
    not known is "unknown".

    Args:
        metrics: the teacher's; empty before it is trained or opened.
        classes: names of the data set's classes, where it is at hand.

    >>> identity(settings("quick/digits"), {}).split(", ")[:3]
    ['teacher made here', 'trigger badnet_sq', 'target 0']
    """
    values = chosen.section("data")
    shape = "x".join(map(str, values.get("shape") or ()))
    data = f"data {values['name']}" + (f" {shape}" if shape else "")
    target = "unknown" if chosen.target is None else str(chosen.target)
    if chosen.target is not None and chosen.target < len(classes) and classes[chosen.target]:
        target = classes[chosen.target]
    return ", ".join(
        (
            f"teacher {Path(chosen.opened).name if chosen.opened else 'made here'}",
            f"trigger {chosen.trigger or 'unknown'}",
            f"target {target}",
            data,
            f"seed {chosen.seed}",
            f"ACC {share(metrics.get('acc'))}",
            f"ASR {share(metrics.get('asr'))}",
        )
    )


def audited(
    run: Run,
    teacher: nn.Module,
    data: Dataset,
    seed: int,
    tell: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """The audit of a teacher, kept in a run's folder (audit.safetensors): held once, then
    loaded, as long as teacher and seed are the same.
    """
    path, who = run.file("audit.safetensors"), {"teacher": fingerprint(teacher), "seed": seed}
    if path.exists():
        state, card = load_state(path)
        if card.get("of") == who:
            return Audit.of(state)
    options = {} if tell is None else {"tell": tell}
    where = data.train_images.device
    found = audit(teacher, data.shape, seed=seed, device=where, **options)
    save_state(path, found.state(), {"of": who})
    return found


def triggered_pairs(
    chosen: Settings, data: Dataset, teacher: nn.Module
) -> tuple[Tensor, Tensor, Tensor, str]:
    """The same images without and with the trigger, to look into networks with.

    Where no attack is known, the trigger is the one that stands out most of those that
    are inverted on the teacher (:func:`abdlab.audit.audit`), on the user's images, or
    else on synthetic ones.

    Returns:
        clean, triggered (N, C, H, W), none of them of the target; the class that each
        triggered one shall be called (N,); and how a figure calls that class.
    """
    if chosen.attacks and len(data.test_labels):
        attack = chosen.attacks[0]
        wanted = attack.wanted(data.test_labels, len(data.classes))
        others = wanted != data.test_labels
        clean, wanted = data.test_images[others], wanted[others]
        called = "the next class" if attack.all_to_all else f"class {data.classes[attack.target]}"
        return clean, attack.trigger(clean), wanted, called
    found = audit(teacher, data.shape, seed=chosen.seed, device=data.train_images.device)
    images = data.test_images if len(data.test_images) else found.pool
    trigger = found.triggers.triggers[0]
    clean = images[predict(teacher, images).argmax(1) != trigger.target]
    called = f"class {data.classes[trigger.target]}, inverted"
    with torch.no_grad():
        return clean, trigger(clean), torch.full((len(clean),), trigger.target), called


def examine(
    models: Mapping[str, nn.Module],
    teacher: nn.Module,
    found: Audit,
    heritage: Mapping[str, Heritage],
    metrics: Mapping[str, Mapping],
    images: Tensor | None = None,
) -> list[dict]:
    """One row per model: what is known of it, and what it inherited.

    Args:
        models, heritage, metrics: by label.
        images: (N, C, H, W) of the user's own; None takes the audit's synthetic ones.

    Returns:
        rows with label, name, acc, asr (None: unknown), agrees (share of the images on
        which it predicts what the teacher does) and turned (the share of synthetic
        images that the teacher's best inverted trigger turns).
    """
    shown = found.pool if images is None or not len(images) else images
    shown = shown.to(next((p.device for p in teacher.parameters()), shown.device))
    return [
        {
            "label": label,
            "name": name_of(label),
            "acc": metrics[label].get("acc"),
            "asr": metrics[label].get("asr"),
            "agrees": agreement(model, teacher, shown),
            "turned": heritage[label].share,
        }
        for label, model in models.items()
    ]


def conclude(
    found: Audit,
    rows: Sequence[Mapping],
    undefended: str,
    defended: str,
    classes: Sequence[str] = (),
) -> list[str]:
    """The verdict, a sentence or two each: on the teacher, on both students, on what to
    do with them.
    """
    by = {row["label"]: row for row in rows}
    plain, safe = by[undefended], by[defended]
    lines = [f"Teacher: {found.verdict(classes)}"]
    lines += [
        f"{'Undefended' if row is plain else 'Defended'} student ({row['name']}): the teacher's"
        f" inverted triggers turn {share(row['turned'])} of images, it agrees with the teacher on"
        f" {share(row['agrees'])}, ACC {share(row['acc'])}, ASR {share(row['asr'])}."
        for row in (plain, safe)
    ]
    if safe["agrees"] < 0.5:
        lines.append(
            "Advice: the defended student has not learnt what the teacher knows: distil it longer"
            f" (settings of {Label.parse(defended).source}, by -p), and judge it then."
        )
    elif found.target is None:
        lines.append(
            "Advice: no backdoor was found, and none is excluded. The defended student costs"
            f" {share(max(0.0, plain['agrees'] - safe['agrees']))} of agreement: take it where the"
            " teacher's origin is in doubt."
        )
    elif safe["turned"] <= 0.5 * plain["turned"] or safe["turned"] < 0.2:
        lines.append(
            "Advice: take the defended student; the inverted triggers work less on it. A trigger"
            " that was not inverted may still work."
        )
    else:
        lines.append(
            "Advice: do not rely on either student: the defense did not remove what was found."
        )
    return lines


def estimate(
    run: str | Path | None,
    chosen: Settings,
    data: Dataset,
    teacher: nn.Module,
    defended: str | None = None,
) -> list[Forecast]:
    """About what the audit and both students of a teacher take here, purification
    included, from passes and pseudo-batches that are timed (:mod:`abdlab.forecast`).

    Args:
        run: the folder; what is done in it is left out. None counts all.
        defended: as for :func:`methods_for`.

    Raises:
        ValueError: where the folder holds one of them with other settings.
    """
    labels = [label for label in methods_for(teacher, defended) if label != TEACHER]
    if run is not None:
        check_folders(run, chosen, data, labels)
    looking = Forecast("audit", 0, audit_seconds(teacher, data))
    return [looking, *forecast(run, chosen, data, labels, teacher)]


def audit_seconds(teacher: nn.Module, data: Dataset) -> float:
    """About how long :func:`abdlab.audit.audit` takes here: its images times passes,
    times the time of one, which is measured.
    """
    count = len(data.classes)
    inverted = count * 4 * 8 * steps_for(data.shape)
    passes = POOL * 44 + inverted + count * 8 * 60 + count * 4 * 60
    return passes * seconds_per_image(teacher, data)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;"
    "color:#222}table{border-collapse:collapse}td,th{padding:.3em .8em;border-bottom:1px solid"
    " #ccc;text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:.8em;"
    "white-space:pre-wrap}p.verdict{border-left:4px solid #555;padding-left:1em}"
)


def page(
    path: str | Path,
    title: str,
    intro: str,
    verdict: Sequence[str],
    rows: Sequence[Mapping],
    figures: Mapping[str, Path],
) -> Path:
    """Write a report as one HTML file that needs nothing else: figures are inside.

    Args:
        intro: plain text, see :func:`introduce`. verdict: see :func:`conclude`.
        rows: those of :func:`examine`.
        figures: caption -> PNG file.
    """

    def cell(text: str, tag: str = "td") -> str:
        return f"<{tag}>{html.escape(text)}</{tag}>"

    heads = ("model", "ACC", "ASR", "agrees with the teacher", "turned by inverted triggers")
    table = "".join(
        "<tr>"
        + cell(row["name"])
        + "".join(cell(share(row[key])) for key in ("acc", "asr", "agrees", "turned"))
        + "</tr>"
        for row in rows
    )
    drawn = "".join(
        f"<h2>{html.escape(caption)}</h2><img alt='{html.escape(caption)}'"
        f" src='data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}'>"
        for caption, file in figures.items()
    )
    body = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}"
        f"</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        + "".join(f"<p class='verdict'>{html.escape(line)}</p>" for line in verdict)
        + f"<pre>{html.escape(intro)}</pre><table><tr>{''.join(cell(h, 'th') for h in heads)}</tr>"
        f"{table}</table>{drawn}</body></html>\n"
    )
    return write_atomically(path, body.encode())
