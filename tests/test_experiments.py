"""Several experiments side by side: the numbers of each alone, and no process is left."""

import multiprocessing
import subprocess
import sys
import time

import psutil
import pytest

from abdlab import Run, distill_all, distill_each, settings
from abdlab.processes import skip_grammars

pytestmark = pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")
TINY = {
    "data.size": 8,
    "teacher.model": "wrn-10-1",
    "teacher.width": 4,
    "teacher.epochs": 1,
    "student.model": "wrn-10-1",
    "student.width": 4,
    "zskt.pseudo_batches": 2,
    "zskt.student_steps": 1,
    "zskt.batch_size": 8,
}
LABELS = ["zskt", "bounded/teacher"]


def chosen(**overrides):
    values = {**TINY, **{k.replace("__", "."): v for k, v in overrides.items()}}
    return settings("quick/digits", values, device="cpu")


def told(metrics):
    return {label: (row["acc"], row["asr"]) for label, row in metrics.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Settings by name, and the numbers of each by itself."""
    by_name = {"plain": chosen(), "shuffled": chosen(teacher__objective="shuffled")}
    root = tmp_path_factory.mktemp("alone")
    return by_name, {
        name: told(distill_all(root / name, each, each.dataset(), LABELS, with_teacher=True))
        for name, each in by_name.items()
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_each_has_the_numbers_that_it_has_alone(tmp_path, workers, alone):
    places = {tmp_path / name: each for name, each in alone[0].items()}
    found = distill_each(places, LABELS, with_teacher=True, workers=workers)
    assert list(found) == [str(root) for root in places]
    for root in places:
        assert told(found[str(root)]) == alone[1][root.name]
        assert list(found[str(root)]) == ["teacher", *LABELS]
    assert found[str(tmp_path / "plain")] != found[str(tmp_path / "shuffled")]
    again = distill_each(places, LABELS, with_teacher=True, workers=workers)
    assert again == found, "read, seconds and all"


def test_optimised_triggers_are_prepared(tmp_path):
    weak = chosen(attack__trigger="weak", attack__optimize={"steps": 2})
    found = distill_each({tmp_path: weak}, ["zskt"])
    assert found[str(tmp_path)]["zskt"]["acc"] >= 0
    assert Run(tmp_path / "seed0" / "trigger").path.exists()


def test_a_label_that_is_none_is_refused_before_anything(tmp_path):
    with pytest.raises(ValueError, match="zsk"):
        distill_each({tmp_path / "a": chosen()}, ["zskt", "zsk"])
    assert not (tmp_path / "a").exists()


def test_an_error_in_one_ends_the_others(tmp_path):
    (tmp_path / "bad").write_text("a file where a folder is wanted")
    with pytest.raises(ValueError, match=r"cannot write to .*bad"):
        distill_each({tmp_path / "bad": chosen(), tmp_path / "good": chosen()}, LABELS, workers=2)
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not multiprocessing.active_children()


def test_grammars_are_skipped_where_nothing_has_them_yet(monkeypatch):
    monkeypatch.delitem(sys.modules, "rfc3987_syntax", raising=False)
    skip_grammars()
    with pytest.raises(ImportError):
        import rfc3987_syntax  # noqa: F401
    monkeypatch.setitem(sys.modules, "rfc3987_syntax", pytest)
    skip_grammars()
    assert sys.modules["rfc3987_syntax"] is pytest


def test_a_process_ends_with_its_parent():
    child = (
        "import os, time; from abdlab.processes import end_with; end_with(os.getppid()); "
        "print(os.getpid(), flush=True); time.sleep(600)"  # it has begun to watch
    )
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as started:
        number = int(started.stdout.readline())
        assert psutil.pid_exists(number)
        started.kill()
    psutil.wait_procs([psutil.Process(number)] if psutil.pid_exists(number) else [], timeout=30)
    assert not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie"
