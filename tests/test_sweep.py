"""Studies: what a YAML file stands for, and jobs that survive failing notebooks, dead
kernels, dead workers and a killed sweep.
"""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from chromium import CHROMIUM, SHOTS
from ray_nodes import start_node, stop_node
from rich.console import Console

from abdlab import studies
from abdlab.checks import check
from abdlab.settings import settings
from abdlab.studies.engines import LocalEngine, RayEngine
from abdlab.studies.job import _scores as scores_of_folder
from abdlab.studies.results import _frame as frame_of
from abdlab.studies.sentences import outcome

#: a notebook without torch: what it does depends on ``mode``, and "once" modes succeed
#: when tried again
CELLS = [
    (
        'run = "runs"  # folder\nx = 0  # a number\nmode = "ok"  # what happens\nseconds = 0.0  #'
        " to wait\nseed = 0  # of everything"
    ),
    """import json, os, pathlib, signal, time
folder = pathlib.Path(run) / f"seed{seed}" / "zskt"
folder.mkdir(parents=True, exist_ok=True)
first = not (folder / "tried").exists()
(folder / "tried").touch()
with (folder / "starts.txt").open("a") as file: file.write("start\\n")
time.sleep(seconds)""",
    """if mode == "fail": raise ValueError("x is wrong")
if mode == "fail once" and first: raise ValueError("only the first time")
dies = mode == "kernel dies" or (mode == "kernel dies once" and first)
if dies: os.kill(os.getpid(), signal.SIGKILL)
if mode == "worker dies once" and first:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)""",
    """values = {"label": "zskt", "seed": seed, "acc": x / 10, "asr": x / 100, "pid": os.getpid()}
(folder / "metrics.json").write_text(json.dumps(values))""",
]


@pytest.fixture
def notebook(tmp_path):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    path = tmp_path / "trivial.ipynb"
    nbformat.write(book, path)
    return path


def starts(out):
    """How many times each job's notebook began."""
    return {
        p.parent.parent.parent.name: len(p.read_text().splitlines())
        for p in out.glob("jobs/*/seed*/zskt/starts.txt")
    }


def study_file(tmp_path, **content):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"notebook": "trivial.ipynb", **content}, sort_keys=False))
    return path


def command(*words):
    return [sys.executable, "-c", "from abdlab.cli import main; main()", "sweep", *map(str, words)]


# --- what a study stands for ----------------------------------------------------------


def test_axes_multiply_and_exclusions_leave_out(notebook, tmp_path):
    path = study_file(
        tmp_path,
        parameters={"seconds": 0},
        grid={"x": [1, 2, 3]},
        zip={"mode": ["ok", "fail"], "seconds": [0.5, 1.5]},
        seeds=[0, 1],
        exclude=[{"x": 3, "mode": "fail"}, {"x": [1, 2], "seed": 1}],
    )
    study = studies.read_study(path)
    # 3 x 2 x 2 = 12; (3, fail) leaves out 2, (1 or 2, seed 1) leaves out 2 x 2
    assert len(study.jobs) == 6
    assert study.teachers == ()
    assert {(j.axes["x"], j.axes["mode"], j.axes["seed"]) for j in study.jobs} == {
        *((x, mode, 0) for x in (1, 2) for mode in ("ok", "fail")),
        (3, "ok", 0),
        (3, "ok", 1),
    }
    assert all(
        j.parameters["seconds"] == {"ok": 0.5, "fail": 1.5}[j.parameters["mode"]]
        for j in study.jobs
    )
    assert study.title == "study"


def test_a_list_axis_sets_several_names_and_equal_jobs_are_one(notebook):
    study = studies.make_study(notebook, list=[{"x": 1}, {"x": 2, "mode": "ok"}, {"x": 1}])
    assert [j.parameters for j in study.jobs] == [{"x": 1}, {"x": 2, "mode": "ok"}]


def test_1e_3_is_a_number_in_a_study(notebook, tmp_path):
    # YAML 1.1 wants 1.0e-3, and takes this for a text
    path = tmp_path / "study.yaml"
    path.write_text(
        "notebook: trivial.ipynb\ngrid: {seconds: [1e-3, 2E+1, -5e2, .5], mode: [e1, 1e, ok]}\n"
    )
    seen = {
        (job.parameters["seconds"], job.parameters["mode"]) for job in studies.read_study(path).jobs
    }
    assert seen == {
        (seconds, mode) for seconds in (0.001, 20.0, -500.0, 0.5) for mode in ("e1", "1e", "ok")
    }


def test_folders_are_addressed_by_content(notebook):
    key = {
        name: studies.make_study(notebook, **given).jobs[0].key
        for name, given in {
            "a": {"grid": {"x": [1]}},
            "again": {"parameters": {"x": 1}},
            "b": {"grid": {"x": [2]}},
        }.items()
    }
    assert key["a"] == key["again"] != key["b"]
    notebook.write_text(notebook.read_text().replace("x is wrong", "x is bad"))
    assert studies.make_study(notebook, grid={"x": [1]}).jobs[0].key != key["a"]


def test_dotted_names_are_settings_and_teachers_are_shared():
    study = studies.make_study(
        "02_distillation",
        parameters={"overrides": {"zskt.pseudo_batches": 5}},
        grid={"attack.trigger": ["badnet_sq", "blend"], "sv_alpha": [0.1, 0.5]},
        seeds=[0, 1],
    )
    assert len(study.jobs) == 8
    # two triggers, two seeds: neither alpha nor the length makes another teacher
    assert len(study.teachers) == 4
    assert all(job.parameters["overrides"]["zskt.pseudo_batches"] == 5 for job in study.jobs)
    assert {len(job.needs) for job in study.jobs} == {1}
    assert {t.notebook for t in study.teachers} == {"01_poisoning"}
    both = studies.make_study("05_abd_ablation", parameters={"seeds": [0, 1]})
    assert len(both.jobs[0].needs) == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"grids": {"x": [1]}}, "unknown key of study.yaml 'grids': did you mean 'grid'"),
        ({"grid": {"mod": ["ok"]}}, "unknown parameter of trivial 'mod': did you mean 'mode'"),
        ({"grid": {"x": ["many"]}}, "parameter x takes a whole number, not 'many'"),
        ({"grid": {"x": []}}, "the axis grid.x is empty"),
        ({"grid": {"x": 3}}, "the axis grid.x is a list of values, not 3"),
        ({"grid": [1]}, "grid holds names and values"),
        ({"zip": {"x": [1, 2], "seed": [1]}}, "need as many values each: x has 2, seed has 1"),
        ({"grid": {"seed": [1]}, "seeds": [1]}, "seed is set by two axes"),
        ({"seeds": []}, "the axis seeds is empty"),
        ({"grid": {"x": [1]}, "exclude": [{"x": 1}]}, "every combination is excluded"),
        ({"grid": {"x": [1]}, "exclude": [{"y": 1}]}, "unknown name in exclude 'y'"),
        (
            {"grid": {"sv.alpha": [1]}},
            "sv.alpha is a setting, but trivial has no parameter overrides",
        ),
        ({"parameters": {"run": "here"}}, "run is set by the sweep"),
        ({"timeout": 0}, "timeout is seconds above 0"),
        ({"timeout": float("inf")}, "timeout is seconds above 0"),
        ({"retries": -1}, "retries is a whole number of at least 0"),
        ({"threads": True}, "threads is a whole number of at least 1"),
        ({"exclude": {"x": 1}}, "exclude is a list of names and values"),
        ({"title": ["a"]}, "title is a text"),
        ({"grid": {"x": [float("nan")]}}, "which is no finite number"),
        ({"parameters": {"mode": {1: 2}}}, "names its values by texts, not by 1"),
        ({"grid": {"x": [*range(200)], "seed": [*range(200)]}}, "the axes make 40,000 jobs"),
        ({"notebook": "02", "grid": {"source": ["zsktt"]}}, "did you mean 'zskt'"),
        ({"notebook": "02", "grid": {"defenses": [["sv", "rs"]]}}, "unknown defen"),
        ({"notebook": "05", "grid": {"methods": [["zskt", "cmi+sw"]]}}, "did you mean 'sv'"),
        ({"notebook": "03", "grid": {"label": ["zskt+"]}}, "a method is"),
        ({"notebook": "02", "grid": {"tu.hold": ["yes"]}}, "tu.hold takes True or False"),
        ({"notebook": "02", "grid": {"dfad.width": ["24"]}}, "dfad.width takes a whole number"),
        ({"notebook": "05", "grid": {"teacher.model": ["vgg-12"]}}, "did you mean 'vgg-1"),
        ({"notebook": "01", "grid": {"target": [10]}}, "attack.target is a class from 0 to 9"),
        ({"notebook": "05", "seeds": [-1]}, "each of seeds is a whole number from 0"),
        (
            {"notebook": "02_distillation", "grid": {"sv.alpa": [1]}},
            "unknown setting 'sv.alpa': did you mean 'sv.alpha'",
        ),
        (
            {"notebook": "02_distillation", "grid": {"preset": ["quick/digit"]}},
            "unknown preset 'quick/digit'",
        ),
        ({"notebook": "02_distilation"}, "did you mean '02_distillation'"),
    ],
)
def test_a_wrong_study_is_one_sentence_before_anything_starts(
    notebook, tmp_path, content, sentence
):
    with pytest.raises(ValueError, match=r".+") as caught:
        studies.read_study(study_file(tmp_path, **content))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seeds: [0]\nseeds: [1]", "line 3: 'seeds' stands twice, first in line 2"),
        ("grid:\n  x: [1]\n  mode: [ok]\n  x: [2, 3]", "line 5: 'x' stands twice"),
        ("list: [{x: 1, 'x': 2}]", "line 2: 'x' stands twice"),
        ("parameters: {overrides: {sv.k: 1, sv.k: 2}}", "line 2: 'sv.k' stands twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(notebook, tmp_path, text, sentence):
    path = tmp_path / "study.yaml"
    path.write_text(f"notebook: trivial.ipynb\n{text}\n")
    with pytest.raises(ValueError, match=r"^study\.yaml, line") as caught:
        studies.read_study(path)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "title"),
    [("2026-11-26", "2026-11-26"), ("05", "05"), ("1.10", "1.10"), ("no", "no"), ("~", "study")],
)
def test_a_title_is_a_text_however_it_looks(notebook, tmp_path, text, title):
    path = tmp_path / "study.yaml"
    path.write_text(f"notebook: trivial.ipynb\ntitle: {text}\n")
    study = studies.read_study(path)
    assert study.title == title
    studies.write_study(study, tmp_path / "out")
    assert studies.open_study(tmp_path / "out").title == title


@pytest.mark.parametrize("name", ["05", "5", "02_distillation", "2"])
def test_a_notebook_by_its_number(tmp_path, name):
    path = tmp_path / "study.yaml"
    path.write_text(f"notebook: {name}\n")
    if len(name) > 1:
        assert studies.read_study(path).jobs[0].notebook.startswith(name)
    else:
        with pytest.raises(ValueError, match=f"unknown notebook '{name}'"):
            studies.read_study(path)
    assert studies.make_study(5).jobs[0].notebook == "05_abd_ablation"


def test_a_date_is_a_text(notebook, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("notebook: trivial.ipynb\ngrid: {mode: [2026-11-26, 2026-11-26 10:00:00]}\n")
    assert [job.axes["mode"] for job in studies.read_study(path).jobs] == [
        "2026-11-26",
        "2026-11-26 10:00:00",
    ]


def test_preset_in_an_axis_is_the_job_without_it_and_null_is_none():
    study = studies.make_study("05", grid={"sv.cap": ["preset", None, 2]})
    assert [job.parameters["overrides"] for job in study.jobs] == [
        {},
        {"sv.cap": None},
        {"sv.cap": 2},
    ]
    assert study.jobs[0].axes == {"sv.cap": "preset"}
    plain = studies.make_study("05", parameters={"overrides": {}})
    assert study.jobs[0].key == plain.jobs[0].key


def test_a_notebook_that_lacks_a_kernelspec_or_the_tag(notebook, tmp_path):
    book = nbformat.read(notebook, 4)
    del book.metadata["kernelspec"]
    nbformat.write(book, notebook)
    assert len(studies.make_study(notebook, grid={"x": [1, 2]}).jobs) == 2
    book.cells[0].metadata["tags"] = []
    nbformat.write(book, notebook)
    with pytest.raises(ValueError, match="tag the cell that sets them with parameters"):
        studies.make_study(notebook, grid={"x": [1, 2]})
    assert len(studies.make_study(notebook).jobs) == 1
    notebook.write_text("no notebook")
    with pytest.raises(ValueError, match=r"trivial\.ipynb is not a notebook"):
        studies.make_study(notebook)


def test_a_file_that_is_no_study(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no study"):
        studies.read_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("grid: [1, 2")
    with pytest.raises(ValueError, match="is not YAML"):
        studies.read_study(tmp_path / "bad.yaml")
    (tmp_path / "text.yaml").write_text("hello")
    with pytest.raises(ValueError, match="must hold keys and values"):
        studies.read_study(tmp_path / "text.yaml")
    (tmp_path / "none.yaml").write_text("title: nothing")
    with pytest.raises(ValueError, match="does not say which notebook"):
        studies.read_study(tmp_path / "none.yaml")


# --- jobs -----------------------------------------------------------------------------


@pytest.mark.slow
def test_failures_are_told_apart_and_tried_again_where_that_helps(notebook, tmp_path):
    out = tmp_path / "out"
    modes = ["ok", "fail", "kernel dies once", "kernel dies", "worker dies once"]
    study = studies.make_study(notebook, grid={"mode": modes}, parameters={"x": 7}, retries=1)
    frame = studies.sweep(study, out, LocalEngine(2)).set_index("mode")
    assert frame["state"].to_dict() == {
        "ok": "done",
        "fail": "failed",
        "kernel dies once": "done",
        "kernel dies": "failed",
        "worker dies once": "done",
    }
    assert (frame.loc["ok", "acc"], frame.loc["ok", "asr"]) == (0.7, 0.07)
    assert frame.loc["fail", "error"] == "cell 4: ValueError: x is wrong"
    assert frame.loc["kernel dies", "error"].startswith(
        "given up after 2 tries; the last one: RuntimeError: the kernel died"
    )
    assert frame["attempts"].to_dict() == {**dict.fromkeys(modes, 2), "ok": 1, "fail": 1}
    (folder,) = (p.parent for p in out.glob("jobs/*/traceback.txt"))
    assert "ValueError" in (folder / "traceback.txt").read_text()
    assert "x is wrong" in (folder / "trivial.ipynb").read_text()  # the executed notebook is kept
    # a second call leaves the done ones alone and tries the failed ones anew
    before = starts(out)
    again = studies.sweep(study, out, LocalEngine(1)).set_index("mode")
    assert again["state"].to_dict() == frame["state"].to_dict()
    more = {name: starts(out)[name] - count for name, count in before.items()}
    assert sum(more.values()) == 1 + 2  # fail once, kernel dies twice
    found = studies.results(out)
    assert sorted(found["mode"]) == ["kernel dies once", "ok", "worker dies once"]
    assert set(found["source"]) == {"zskt"}
    assert set(found["defense"]) == {"none"}


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_stopped_with_its_kernel(notebook, tmp_path):
    study = studies.make_study(notebook, parameters={"seconds": 60.0}, timeout=4)
    began = time.time()
    frame = studies.sweep(study, tmp_path / "out", LocalEngine(1))
    assert time.time() - began < 40
    assert frame["error"].tolist() == ["longer than the study's timeout of 4 seconds"]
    assert not kernels_under(tmp_path / "out")


def kernels_under(out):
    """Kernels that still run a job of this study: their connection files are anonymous,
    their open log is not.
    """
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "ipykernel_launcher" in " ".join(process.info["cmdline"] or []):
                found += [f.path for f in process.open_files() if f.path.startswith(str(out))]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("blow", "slots"), [(signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_a_stopped_sweep_goes_on_without_repeating_done_jobs(notebook, tmp_path, here, blow, slots):
    path, out = (
        # the blow falls within 0.2 s of the second job's start, a second of its kernel's
        study_file(tmp_path, parameters={"seconds": 1.5}, grid={"x": [1, 2]}),
        tmp_path / "out",
    )
    process = subprocess.Popen(
        command(path, "--out", out, "--slots", 1),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # tests that run in the background inherit a deaf ear for interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: len(states(out, "done")) >= 1 and len(states(out, "running")) == 1)
    os.kill(process.pid, blow)
    _, told = process.communicate(timeout=60)
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on where it was" in told
        assert "Traceback" not in told
    wait_for(lambda: not kernels_under(out))
    done, before = states(out, "done"), starts(out)
    assert len(done) == 1
    wait_for(lambda: "stopped" in set(studies.status(out)["state"]))
    code, told, error = here("sweep", path, "--out", out, "--slots", slots)
    assert code == 0, error
    assert "2 of 2 jobs done" in told
    assert all(starts(out)[name] == before[name] for name in done)
    assert sorted(studies.results(out)["acc"]) == [0.1, 0.2]


def states(out, wanted):
    """Names of the jobs whose status.json says so."""
    found = {}
    for path in out.glob("jobs/*/status.json"):
        found[path.parent.name] = json.loads(path.read_text())["state"]
    return {name for name, state in found.items() if state == wanted}


def wait_for(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_full_disk_and_a_place_that_is_no_folder_are_clear(notebook, tmp_path):
    study = studies.make_study(notebook)
    folder = tmp_path / "out" / study.jobs[0].folder
    folder.mkdir(parents=True)
    (folder / "log.txt").symlink_to("/dev/full")
    result = studies.run_job(
        {
            "folder": str(folder),
            "key": "k",
            "notebook": "trivial",
            "text": notebook.read_text(),
            "parameters": {"mode": "ok"},
            "takes_run": True,
            "threads": 1,
            "timeout": None,
            "attempt": 1,
            "cwd": str(tmp_path),
        }
    )
    assert result["state"] in ("failed", "done")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*choose another folder"):
        studies.write_study(study, tmp_path / "file" / "out")


TINY = {
    "data.size": 8,
    "teacher.epochs": 1,
    "teacher.model": "wrn-10-1",
    "teacher.width": 4,
    "student.width": 4,
    "zskt.pseudo_batches": 4,
    "zskt.student_steps": 1,
    "zskt.width": 4,
    "zskt.batch_size": 16,
    "clean.epochs": 1,
    "sv.verify": False,
    "sr.inner_steps": 1,
}


@pytest.fixture(scope="module")
def tiny():
    """Two methods of one poisoned teacher, through the real notebooks, and their
    numbers on the local engine.
    """
    return studies.make_study(
        "05_abd_ablation",
        parameters={"overrides": TINY, "device": "cpu"},
        grid={"methods": [["zskt"], ["zskt+sv"]]},
        seeds=[3],
    )


@pytest.fixture(scope="module")
def by_local(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    frame = studies.sweep(tiny, out, LocalEngine(2))
    assert set(frame["state"]) == {"done"}, frame["error"].tolist()
    return out


def numbers(out):
    found = studies.results(out)
    return sorted((r["label"], r["seed"], r["acc"], r["asr"]) for r in found.to_dict("records"))


@pytest.mark.slow
def test_a_shared_teacher_is_trained_once(tiny, by_local):
    frame = studies.status(by_local)
    assert frame["kind"].tolist() == ["teacher", "job", "job"]
    (trained,) = by_local.glob("teachers/*/seed3/teacher/teacher.safetensors")
    taken = [*by_local.glob("jobs/*/seed3/teacher/teacher.safetensors")]
    assert len(taken) == 2
    assert all(path.read_bytes() == trained.read_bytes() for path in taken)
    assert len([*by_local.glob("jobs/*/seed3/teacher/history.jsonl")]) == 2
    assert [label for label, *_ in numbers(by_local)] == ["teacher", "teacher", "zskt", "zskt+sv"]
    assert set(studies.results(by_local)["trigger"]) == {"badnet_sq"}


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_numbers(by_local, tmp_path):
    axes = {"grid": {"methods": [["zskt+sv"]]}, "seeds": [3]}
    path, out = (
        study_file(tmp_path, **axes, parameters={"overrides": TINY, "device": "cpu"}),
        tmp_path / "out",
    )
    path.write_text(path.read_text().replace("trivial.ipynb", "05_abd_ablation"))
    with_its_teacher(out, by_local)
    process = subprocess.Popen(
        command(path, "--out", out, "--slots", 1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: len(states(out, "running")) == 1, 180)
    process.kill()  # the parent, while the student is distilled
    process.wait()
    wait_for(lambda: not kernels_under(out))
    assert not states(out, "done")
    (teacher,) = out.glob("teachers/*/seed3/teacher/teacher.safetensors")
    trained = teacher.stat().st_mtime
    process = subprocess.Popen(
        command(path, "--out", out, "--slots", 1), stdout=subprocess.PIPE, text=True
    )
    wait_for(
        lambda: len(states(out, "running")) == 1 and [*out.glob("jobs/*/seed3/zskt*/config.json")],
        180,
    )
    workers = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "ipykernel_launcher" in " ".join(p.cmdline())
    ]
    workers[0].parent().kill()  # one worker
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert 2 in studies.status(out)["attempts"].tolist()
    assert teacher.stat().st_mtime == trained  # done before the kill, and not done again
    assert [label for label, *_ in numbers(out)] == ["teacher", "zskt+sv"]
    assert {*numbers(out)} < {*numbers(by_local)}


def with_its_teacher(out, by_local):
    """A study whose teacher is done: the same as on the local engine."""
    shutil.copytree(by_local / "teachers", out / "teachers")


@pytest.fixture(scope="module")
def html(by_local, tmp_path_factory):
    """The report of the tiny study as one file."""
    page = tmp_path_factory.mktemp("report") / "report.html"
    assert studies.report(by_local, page) == by_local / "report" / "06_sweep_report.ipynb"
    return page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, and there is none on the PATH")
def test_the_report_opens_in_a_browser(html):
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright (pip install '.[test]')"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, asked = browser.new_page(viewport={"width": 1280, "height": 900}), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(html.as_uri())
        page.get_by_role("heading", name="ASR before and after").wait_for()
        widths = page.eval_on_selector_all(
            "img", "images => images.map(image => image.naturalWidth)"
        )
        assert len(widths) == 2
        assert min(widths) > 300
        assert page.get_by_text("badnet_sq").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        assert not [url for url in asked if url.startswith("http")]  # it needs nothing but itself
        SHOTS.mkdir(exist_ok=True)
        page.screenshot(path=SHOTS / "sweep_report.png", full_page=True)
        browser.close()


@pytest.mark.slow
def test_the_report_reads_without_the_code(by_local, html):
    folder = by_local / "report"
    assert {p.stem for p in (folder / "figures").glob("*.png")} == {
        "heatmaps",
        "tradeoff",
    }  # no numeric axis, no line
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["done"], metrics["jobs"], metrics["failed"]) == (3, 3, [])
    mine = {(c["source"], c["defense"]): c for c in metrics["cells"]}
    assert set(mine) == {("teacher", "none"), ("zskt", "none"), ("zskt", "sv")}
    assert all(c["n"] == 1 for c in mine.values())  # two jobs share the teacher: it counts once
    (acc,) = {acc for label, _, acc, _ in numbers(by_local) if label == "zskt"}
    assert mine["zskt", "none"]["ACC mean (%)"] == pytest.approx(100 * acc, abs=0.05)
    assert "zskt" in (folder / "summary.csv").read_text()
    assert "tabular" in (folder / "summary.tex").read_text()
    page = html.read_text()
    assert "study_heatmaps(" not in page  # code is hidden
    assert page.count("data:image/png;base64") >= 2
    book = nbformat.read(folder / "06_sweep_report.ipynb", 4)
    told = book.cells[-1].outputs[-1]["text"].splitlines()[-1]
    assert told == outcome(studies.results(by_local))
    assert told.startswith("ZSKT+SV ")
    assert "NaN" not in (folder / "metrics.json").read_text()
    (table,) = (
        o["data"]["text/html"]
        for c in book.cells
        for o in c.get("outputs", [])
        if "text/html" in o.get("data", {})
    )
    assert ("<td>-</td>" in table, "NaN" in table) == (True, False)  # the deviation of one run
    assert 'src="http' not in page


@pytest.mark.slow
def test_the_command_line_prints_a_study_as_a_matrix_and_exports_it(by_local, here, tmp_path):
    page, csv = tmp_path / "table.md", tmp_path / "table.csv"
    code, out, _ = here("report", by_local, "--matrix", "--markdown", page, "--csv", csv)
    assert code == 0
    score = {label: f"{100 * acc:.1f}/{100 * asr:.1f}" for label, _, acc, asr in numbers(by_local)}
    heading, rule, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text().splitlines()
    )
    assert heading == ["trigger", "defense", "teacher", "zskt"]
    assert {character for cell in rule for character in cell} == {"-"}
    assert rows == [
        ["badnet_sq", "none", score["teacher"], score["zskt"]],
        ["badnet_sq", "sv", "", score["zskt+sv"]],
    ]
    assert csv.read_text().splitlines() == [",".join(row) for row in (heading, *rows)]
    assert score["zskt+sv"].replace("/", " / ") in " ".join(out.split())


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["teacher"], "teacher"),
        (["clean", "teacher"], "clean"),
        (["clean_teacher", "teacher"], "teacher"),
        (["clean", "teacher", "zskt", "zskt+sr", "zskt+sv+sr"], "zskt+sv+sr"),
        (["zskt+sv", "bounded+unlearn,zskt+sv", "zskt+sv+sr"], "bounded+unlearn,zskt+sv"),
    ],
)
def test_a_job_shows_its_most_defended_student(tmp_path, labels, shown):
    for number, label in enumerate(labels):
        folder = tmp_path / "seed0" / label
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(
            json.dumps(
                {
                    "label": label.replace(",", "/"),
                    "seed": 0,
                    "acc": number / 10,
                    "asr": number / 20,
                }
            )
        )
    at, shown = labels.index(shown), shown.replace(",", "/")
    assert scores_of_folder(tmp_path) == {"label": shown, "acc": at / 10, "asr": at / 20}


def test_nothing_done_is_nothing_to_report(notebook, tmp_path):
    with pytest.raises(ValueError, match="holds no study"):
        studies.report(tmp_path)
    studies.write_study(studies.make_study(notebook), tmp_path / "out")
    with pytest.raises(ValueError, match="is done yet"):
        studies.report(tmp_path / "out")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine: a head, and a second one that the last of the tests
    kills; (address, the second one).
    """
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = start_node("--head", f"--port={port}", "--include-dashboard=false")
    try:
        second = start_node(f"--address=127.0.0.1:{port}")
        try:
            yield f"127.0.0.1:{port}", second
        finally:
            stop_node(second)
    finally:
        stop_node(head)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_ray_gives_the_same_numbers_as_local(tiny, by_local, cluster, tmp_path, shared):
    engine = RayEngine(tmp_path / "out", cluster[0], shared=None if shared else False)
    assert engine.slots == 2
    assert engine.shared == shared  # both nodes see this machine's folder
    if shared:  # the other one has both jobs, on two nodes
        tiny = studies.make_study(
            "05_abd_ablation",
            parameters={"overrides": TINY, "device": "cpu"},
            grid={"methods": [["zskt"]]},
            seeds=[3],
        )
        with_its_teacher(tmp_path / "out", by_local)
    frame = studies.sweep(tiny, tmp_path / "out", engine, shipped=not engine.shared)
    assert set(frame["state"]) == {"done"}, frame["error"].tolist()
    if shared:
        assert {*numbers(tmp_path / "out")} < {*numbers(by_local)}
    else:
        assert numbers(tmp_path / "out") == numbers(by_local)
    assert not [*(tmp_path / "out").glob(".ray-*")]


@pytest.mark.slow
def test_a_ray_node_that_dies_loses_no_job(notebook, cluster, tmp_path):
    out = tmp_path / "out"
    study = studies.make_study(notebook, parameters={"seconds": 3.0}, grid={"x": [1, 2, 3]})
    engine, killed = RayEngine(out, cluster[0]), []

    def tell(frame, study):
        if not killed and (frame["state"] == "running").sum() == 2:
            stop_node(cluster[1])
            killed.append(time.time())

    frame = studies.sweep(study, out, engine, tell=tell)
    assert killed
    assert frame["state"].tolist() == ["done"] * 3, frame["error"].tolist()
    assert sorted(frame["attempts"]) == [1, 1, 2]
    assert sorted(frame["acc"]) == [0.1, 0.2, 0.3]


def test_ray_errors_are_one_sentence(tmp_path):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(ValueError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        RayEngine(tmp_path, "127.0.0.1:1")


def test_a_dry_run_plans_and_starts_nothing(notebook, tmp_path, here):
    path, out = study_file(tmp_path, grid={"x": [1, 2]}), tmp_path / "out"
    code, told, _ = here("sweep", path, "--out", out, "--dry-run", "--slots", 2)
    assert code == 0
    assert "2 jobs and 0 shared teachers, 2 to run, 2 at a time" in told
    assert "no estimate" in told
    assert not out.exists()
    # two jobs done in 30 and 50 s: two to run in two slots take 40
    study = studies.read_study(path)
    for number, seconds in enumerate((30, 50)):
        other = tmp_path / "past" / "jobs" / str(number)
        other.mkdir(parents=True)
        (other / "status.json").write_text(
            json.dumps({"state": "done", "notebook": "trivial", "seconds": seconds})
        )
    assert studies.estimate(study, out, 2) == (2, 40)


def test_the_live_table_shows_jobs_at_work_first_and_what_failed(notebook):
    study = studies.make_study(notebook, grid={"x": [1, 2, 3, 4]})
    states = [
        {"state": "done", "seconds": 60.0, "label": "zskt", "acc": 0.5, "asr": 0.25},
        {"state": "failed", "seconds": 1.0, "error": "cell 4: ValueError: [x] is wrong"},
        {"state": "running", "seconds": 30.0},
        {"state": "waiting"},
    ]
    frame = frame_of(study, {job.key: state for job, state in zip(study.jobs, states, strict=True)})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(studies.render(frame, "Study"))
    title, _, *lines = [line.rstrip() for line in console.export_text().splitlines()]
    # one done in 60 s, one running for 30 and one waiting: 60 x 2 - 30 = 90 s
    assert title == "Study: 1 done, 1 running, 1 waiting, 1 failed of 4, about 2 min left"
    assert [line.split()[1] for line in lines] == ["running", "failed", "done"]
    assert "[x] is wrong" in lines[1]
    assert "50.0   25.0  zskt" in lines[2]
    assert frame["error"].tolist() == [None, "cell 4: ValueError: [x] is wrong", None, None]


def test_bad_arguments_are_one_sentence_and_exit_code_2(notebook, tmp_path, here):
    path = study_file(tmp_path, grid={"x": [1]})
    for words, sentence in (
        ((path, "--engine", "rya"), "unknown engine 'rya': did you mean 'ray'"),
        ((path, "--slots", 0), "--slots is above 0"),
        ((tmp_path / "none.yaml",), "there is no study"),
    ):
        code, _, told = here("sweep", *words)
        assert code == 2
        assert sentence in told
        assert "Traceback" not in told


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "notebooks" / "studies").glob("*.yaml")),
    ids=lambda p: p.stem,
)
def test_the_studies_that_are_shipped_can_be_read(path):
    study = studies.read_study(path)
    assert study.title != path.stem
    if path.stem == "quick":
        assert len(study.jobs) >= 12
        assert len([name for name in study.axes if name not in ("seed", "seeds")]) >= 2
        assert len(study.axes.get("seed") or study.axes["seeds"]) == 2


def test_every_attacker_of_the_study_is_accepted_up_to_eight_triggers():
    path = Path(__file__).parents[1] / "notebooks" / "studies" / "attacks.yaml"
    numbers = set()
    for row in yaml.safe_load(path.read_text())["list"]:
        chosen = settings("quick/digits", row)
        check(chosen)
        numbers.add(len(chosen.attacks))
        assert len({attack.target for attack in chosen.attacks}) == len(chosen.attacks)
        if len(chosen.attacks) == 8:  # on disjoint samples, as many for each target
            poisoned = chosen.poison(chosen.dataset())
            assert poisoned.which[poisoned.mask].bincount().unique().numel() == 1
            assert poisoned.rate == pytest.approx(8 * 0.05, abs=0.005)
    assert numbers == {1, 2, 4, 8}
