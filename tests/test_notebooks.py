"""Every notebook under papermill with tiny settings: alone, and as a chain that shares
one folder.
"""

import json
import re

import nbformat
import pytest

from abdlab import batch, load
from abdlab.runs import Run
from abdlab.studies import tables
from abdlab.studies.sentences import outcome, trained_for

TINY = {
    "data.size": 8,
    "teacher.epochs": 2,
    "teacher.model": "wrn-10-1",
    "teacher.width": 4,
    "student.width": 4,
    "zskt.pseudo_batches": 6,
    "zskt.student_steps": 2,
    "zskt.width": 4,
    "zskt.batch_size": 16,
    "clean.epochs": 1,
    "sv.verify": False,
    "sv.layers": 3,
    "sr.inner_steps": 2,
    "tu.inner_steps": 2,
    "tu.triggers": 2,
    "tu.renewals": 1,
    "unlearn.starts": 1,
    "unlearn.steps": 2,
    "unlearn.rounds": 1,
    "unlearn.guard": 64,
    "nayer.rounds": 1,
    "nayer.warmup": 0,
    "nayer.kd_steps": 2,
    "nayer.width": 4,
}
STUDENTS = ["clean", "zskt", "zskt+sv+sr", "zskt+sv+tu", "unlearn+bounded/nayer"]
PURIFIED = "unlearn+bounded/teacher"

pytestmark = pytest.mark.slow


def execute(name, root, **given):
    output = batch.execute(
        name,
        root / f"{name}.ipynb",
        {"run": str(root), "overrides": TINY, "device": "cpu", **given},
    )
    book = nbformat.read(output, 4)
    folder = next(p for p in root.iterdir() if p.is_dir() and p.name.startswith(name))
    figures = {p.stem: p.stat().st_size for p in (folder / "figures").glob("*.png")}
    assert all(size > 5000 for size in figures.values())
    told = "".join(_texts(book))
    assert not re.search(r"\bnan\b|NaN|-0\.0\b", told), told
    assert "NaN" not in (folder / "metrics.json").read_text()
    return json.loads((folder / "metrics.json").read_text()), set(figures), book


def in_this_process(name, **given):
    """Run a notebook's cells without a kernel, whose imports take longer than tiny
    settings do; what the last one leaves.
    """
    cells = nbformat.read(batch.find_notebook(name), 4).cells
    first, *rest = [cell.source for cell in cells if cell.cell_type == "code"]
    scope = {"display": print}
    exec(first, scope)
    assert given.keys() <= scope.keys()
    scope |= {"overrides": TINY, "device": "cpu", **given}
    for source in rest:
        exec(source, scope)
    return scope


def _texts(book):
    """All that the cells printed and showed as text."""
    for cell in book.cells:
        for output in cell.get("outputs", []):
            yield output.get("text", "") if output.get("name") != "stderr" else ""
            yield from (v for k, v in output.get("data", {}).items() if k.startswith("text/"))


def last_line(book):
    """What a notebook ends with."""
    return book.cells[-1].outputs[-1]["text"].splitlines()[-1]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Six notebooks one after the other in one folder."""
    root = tmp_path_factory.mktemp("walk")
    few = {"03": {"images": 320}, "07": {"images": 64}}
    names = ("01", "02", "03", "04", "05", "07")
    return root, {name: execute(name, root, **few.get(name, {})) for name in names}


def test_01_trains_and_reports_the_teacher(walk):
    metrics, figures, book = walk[1]["01"]
    assert figures == {"trigger", "teacher_training", "predictions", "gallery"}
    assert {"badnet_grid", "badnet_sq", "blend", "sig", "trojan_wm", "cl"} == set(
        metrics["trigger_sizes"]
    )
    assert 0 <= metrics["acc"] <= 1
    assert metrics["poison_rate"] == pytest.approx(0.1, abs=0.01)
    text = json.dumps(book)
    # two epochs are not enough, and it says so before any distillation
    assert "WeakTeacher" in text
    assert len(Run(walk[0] / "seed0" / "teacher").history().dropna(subset=["acc", "asr"])) == 2
    assert last_line(book) == outcome([metrics])
    assert last_line(book).startswith("Teacher has ACC ")


def test_00_runs_to_its_end_without_anyone_clicking(tmp_path):
    metrics, figures, book = execute("00", tmp_path)
    assert figures == set()
    assert 0 <= metrics["asr"] <= 1
    assert (tmp_path / "seed0" / "zskt+sv+tu@1" / "student.safetensors").exists()
    assert "application/vnd.jupyter.widget-view+json" in json.dumps(book)


def test_02_compares_the_students_and_shows_the_floor(walk):
    metrics, figures, book = walk[1]["02"]
    assert last_line(book) == outcome(tables.rows(metrics["results"]))
    assert re.match(r"ZSKT\+SV\+TU (takes|leaves) ASR .*; the floor is .* %\.$", last_line(book))
    assert figures == {"acc_asr", "losses"}
    assert list(metrics["results"]) == ["clean", "zskt", "zskt+sv+tu"]
    assert metrics["results"]["zskt+sv+tu"]["defenses"]["sv"]["layers"] == [
        "stage3.0.conv1",
        "stage3.0.conv2",
        "stage3.0.shortcut",
    ]


def test_03_looks_at_the_students_images(walk):
    metrics, figures, book = walk[1]["03"]
    shares = ("target_share", "suspicious_share", "near_triggered_share")
    lines = (2 / 10, 0.02, 100 / 300)
    seen = sum(metrics[share] > line for share, line in zip(shares, lines, strict=True))
    assert last_line(book).startswith(f"ZSKT: its images show {seen} of 3 signs of the backdoor")
    told = "".join(_texts(book))
    assert all(sign in told for sign in metrics["signs"])
    assert sum(sign.endswith(": a sign") for sign in metrics["signs"]) == seen
    assert figures == {"over_training", "by_class", "suspicion", "most_suspicious", "tsne"}
    assert 0 <= metrics["target_share"] <= 1
    assert set(metrics["mean_score"]) == {"synthetic", "clean test", "triggered test"}


def test_04_compares_three_models_side_by_side(walk):
    metrics, figures, book = walk[1]["04"]
    *_, moved, told = book.cells[-1].outputs[-1]["text"].splitlines()
    assert moved.startswith("The trigger moves most: teacher: channel ")
    assert told == last_line(walk[1]["02"][2]).partition(";")[0] + "."  # the same, without a floor
    assert figures == {"channel_change", "participation", "attention_maps", "grad_cam"}
    assert list(metrics["largest_change"]) == ["teacher", "ZSKT", "ZSKT+SV+TU"]
    assert set(metrics["grad_cam_classes"]) == {"0"}, "the target"


def test_07_shows_what_a_purifier_sees(walk):
    metrics, figures, _ = walk[1]["07"]
    assert figures == {"costs", "inverted", "beyond", "bound"}
    assert len(metrics["costs"]) == 10
    assert len(metrics["costs"][0]) == len(metrics["families"])
    assert 1.5 <= metrics["k"] <= 5
    assert list(metrics["results"]) == ["teacher", PURIFIED]
    assert [done["name"] for done in metrics["purified"]] == ["unlearn", "bounded"]


def test_05_reuses_the_chain_and_adds_what_is_missing(walk):
    root, done = walk
    metrics, figures, book = done["05"]
    assert last_line(book) == outcome(metrics["rows"])
    assert "Control" not in "".join(_texts(book))
    assert not [c for c in book.cells if c.cell_type == "markdown" and "Control" in c.source]
    assert figures == {"ablation"}
    labels = ["teacher", PURIFIED, *STUDENTS]
    assert [row["label"] for row in metrics["rows"]] == labels
    for label in STUDENTS:
        assert (root / "seed0" / label.replace("/", ",") / "student.safetensors").exists()
    same = {row["label"]: row["asr"] for row in metrics["rows"]}
    assert same["zskt"] == done["02"][0]["results"]["zskt"]["asr"]


def test_other_settings_in_the_same_folder_are_refused(walk):
    root, _ = walk
    with pytest.raises(ValueError, match=r"clean\.epochs was 1 and is 3"):
        in_this_process("02", run=str(root), overrides={**TINY, "clean.epochs": 3})


def test_05_alone_runs_seeds_and_the_control_and_says_its_scales(walk, tmp_path_factory):
    """In the walk it has one seed and the control is off; here it begins in a folder of
    its own, with the code's scales.
    """
    plain = walk[1]["05"][0]
    assert plain["control"] is None
    assert "loss scales: the preset's own" in plain["notes"]
    root = tmp_path_factory.mktemp("control")
    given = {
        "seeds": [1, 2],
        "control": True,
        "scales": "code",
        "methods": ["zskt", "zskt+sv+sr"],
        "overrides": {**TINY, "sv.pool": 64},
    }
    metrics, _, book = execute("05", root, **given)
    assert metrics["scales"] == "code"
    assert "loss scales: code" in metrics["notes"]
    rows, vaccines = metrics["control"]["rows"], metrics["control"]["vaccines"]
    assert (
        [(row["seed"], row["label"]) for row in rows]
        == [(row["seed"], row["label"]) for row in metrics["rows"]]
        == [(seed, label) for seed in (1, 2) for label in ("teacher", "zskt", "zskt+sv+sr")]
    )
    assert rows != metrics["rows"]
    assert [(row["seed"], row["teacher"]) for row in vaccines] == [
        (seed, teacher) for seed in (1, 2) for teacher in ("poisoned", "clean")
    ]
    assert all(0 <= row["accepted"] <= row["tries"] for row in vaccines)
    config = json.loads(
        (root / "clean_teacher_control" / "seed1" / "zskt+sv+sr" / "config.json").read_text()
    )
    assert (config["attack"]["rate"], config["sr"]["perturb"], config["sv"]["per"]) == (
        0,
        "teacher",
        "agreeing",
    )
    shown = [
        o["data"]["text/html"]
        for c in book.cells
        for o in c.get("outputs", [])
        if "text/html" in o.get("data", {})
    ]
    assert any("accepted" in table for table in shown)
    assert "## Control: a teacher without a backdoor" in "".join(_texts(book))


def test_04_alone_asks_each_image_for_its_own_class_when_labels_are_all_to_all(tmp_path):
    overrides = {**TINY, "attack.relabel": "all_to_all"}
    given = {"run": str(tmp_path), "defended": "zskt+sr", "images": 4, "overrides": overrides}
    folder = in_this_process("04", **given)["book"].path
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures == {"channel_change", "participation", "attention_maps", "grad_cam"}
    assert set(metrics["asr"]) == {"zskt", "zskt+sr"}
    labels = load("digits", size=8).test_labels[:4].tolist()
    assert metrics["grad_cam_classes"] == [str((label + 1) % 10) for label in labels]


@pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
def test_09_and_10_put_teachers_beside_each_other(tmp_path, capsys):
    """They share a plain teacher."""
    overrides = {**TINY, "trades.steps": 1}
    given = {"run": str(tmp_path), "overrides": overrides, "methods": ["clp/teacher"]}
    for name, kind in (("10", "trades"), ("09", "clamped")):
        in_this_process(name, **given, objectives=[kind])
        told = capsys.readouterr().out
        folder = next(p for p in tmp_path.iterdir() if p.name.startswith(name))
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        assert [(r["objective"], r["label"]) for r in rows] == [
            (of, label) for of in ("none", kind) for label in ("teacher", "clp/teacher")
        ]
        config = Run(tmp_path / kind / "seed0" / "teacher").config
        assert config["teacher"]["objective"] == kind
        assert [p.stem for p in (folder / "figures").glob("*.png")] == ["objectives"]
        assert told.splitlines()[-1] == trained_for(rows, "clp/teacher")
        assert not re.search(r"\bnan\b|NaN", told)


def test_every_figure_is_shown_once(walk):
    for name, (_, figures, book) in walk[1].items():
        pictures = [
            o
            for cell in book.cells
            for o in cell.get("outputs", [])
            if "image/png" in o.get("data", {})
        ]
        assert len(pictures) == len(figures), name


@pytest.mark.parametrize("name", ["01", "02", "05"])
def test_papermills_own_overrides_are_a_text(name, tmp_path):
    """Its first cells run with what papermill -p hands over, which is a text."""
    book = nbformat.read(batch.find_notebook(name), 4)
    first = [cell for cell in book.cells if cell.cell_type == "code"][:2]
    lines = "".join(first[1].source.partition("data = chosen.dataset()")[0])
    lines = lines.replace("for seed in seeds:", "for seed in [0]:")
    scope = {}
    exec(first[0].source, scope)
    scope |= {"run": str(tmp_path), "overrides": '{"tu.hold": false, "sv.cap": null}'}
    exec(lines, scope)
    assert scope["chosen"].values["tu"]["hold"] is False
    assert scope["chosen"].values["sv"]["cap"] is None
