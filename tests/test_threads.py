"""One number of threads, from every launcher; what is recorded of it, and said."""

import json
import threading
import warnings
from collections import deque

import pandas as pd
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from abdlab import studies
from abdlab.checkpoint import load_model
from abdlab.runs import Run, config_of, table
from abdlab.settings import settings
from abdlab.students import distill_all, distillation, distilled
from abdlab.teachers import poisoned_teacher
from abdlab.threads import THREADS, ThreadsDiffer, computing_with, mixed, pulled_with, threads

TINY = {
    "data.size": 8,
    "teacher.epochs": 1,
    "teacher.model": "wrn-10-1",
    "teacher.width": 4,
    "student.width": 4,
    "zskt.pseudo_batches": 4,
    "zskt.student_steps": 1,
    "zskt.width": 4,
    "zskt.z": 4,
    "zskt.batch_size": 16,
    "clean.epochs": 1,
}

pytestmark = pytest.mark.filterwarnings("ignore::abdlab.teachers.WeakTeacher")


@pytest.fixture
def chosen():
    return settings("quick/digits", TINY, device="cpu")


@pytest.fixture(scope="module")
def data():
    return settings("quick/digits", TINY, device="cpu").dataset()


@pytest.fixture
def two_threads():
    """As in a kernel that may use two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("named", "number"), [(None, 1), ("", 1), ("3", 3), (" 12 ", 12)])
def test_one_thread_whatever_the_machine_unless_it_is_named(monkeypatch, named, number):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    if named is None:
        monkeypatch.delenv(THREADS, raising=False)
    else:
        monkeypatch.setenv(THREADS, named)
    assert threads() == number


@pytest.mark.parametrize("named", ["0", "-2", "1.5", "all", "9" * 5000, "²"])
def test_no_number_is_one_sentence_before_a_kernel_starts(monkeypatch, here, named):
    monkeypatch.setenv(THREADS, named)
    code, _, told = here("run", "01", "--dry-run")
    assert code == 2
    assert told.startswith("abdlab: ABDLAB_THREADS is a whole number from 1 to 1024, not ")
    assert len(told) < 300


def test_a_block_and_a_stream_compute_with_their_number_and_leave_nothing_behind(two_threads):
    def fail():
        with computing_with(1):
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 2
    seen, closed = [], []

    def numbers():
        try:
            for i in range(3):
                seen.append(torch.get_num_threads())
                yield i
        finally:
            closed.append(torch.get_num_threads())

    between = [(i, torch.get_num_threads()) for i in pulled_with(1, numbers())]
    assert (between, seen, closed) == ([(0, 2), (1, 2), (2, 2)], [1, 1, 1], [1])
    stream = pulled_with(1, numbers())
    next(stream)
    other = threading.Thread(target=lambda: seen.append(next(stream)))
    other.start()
    other.join()
    stream.close()
    assert seen == [1, 1, 1, 1, 1, 1]
    assert (closed, torch.get_num_threads()) == ([1, 1], 2)


def test_a_run_is_computed_with_the_number_and_records_it(tmp_path, chosen, data, two_threads):
    seen = set()
    hook = register_module_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        teacher = poisoned_teacher(tmp_path, chosen, data)
        going = distillation(tmp_path, chosen, data, teacher, "zskt")
        last = deque(going.stream, maxlen=1).pop()
    finally:
        hook.remove()
    going.finish(last)
    assert seen == {1}
    for folder in ("teacher", "zskt"):
        run = Run(tmp_path / "seed0" / folder)
        assert run.config["threads"] == run.metrics["threads"] == run.threads == 1
    assert table(tmp_path)["threads"].tolist() == [1, 1]
    assert torch.get_num_threads() == 2


def test_cores_are_used_by_students_side_by_side_and_the_numbers_stay(
    tmp_path, chosen, data, monkeypatch
):
    """Two threads may be used: two students of one thread each, in two processes. Then
    one: one student after the other.
    """
    monkeypatch.setattr("abdlab.students._in_processes", lambda *given: asked.append(given[2:4]))
    weights = []
    for share in (2, 1):
        asked, root = [], tmp_path / str(share)
        with computing_with(share):
            distill_all(root, chosen, data, ["zskt", "clean"])
        assert asked == ([([["clean"], ["zskt"]], 2)] if share == 2 else [])
        student = load_model(root / "seed0" / "zskt" / "student.safetensors")
        weights.append(torch.cat([p.flatten() for p in student.parameters()]))
    assert torch.equal(*weights)


def test_images_of_ones_own_are_used_on_any_number_of_cores(tmp_path, chosen, data):
    """A process would load all that the settings name, and learn from it."""
    few, found = data.subset(train=60, test=40), []
    for share in (2, 1):
        root = tmp_path / str(share)
        with computing_with(share):
            metrics = distill_all(root, chosen, few, ["zskt", "clean"])
        found.append({label: (row["acc"], row["asr"]) for label, row in metrics.items()})
        student = load_model(root / "seed0" / "clean" / "student.safetensors")
        found[-1]["weights"] = torch.cat([p.flatten() for p in student.parameters()]).tolist()
    assert found[0] == found[1]


def test_students_begin_beside_a_purifier_and_the_numbers_stay(tmp_path, chosen, data):
    """In processes: the numbers are those of one after the other, and the purified
    teacher's student begins when that is there.
    """
    weights = []
    for share in (2, 1):
        root = tmp_path / str(share)
        with computing_with(share):
            distill_all(root, chosen, data, ["clp/zskt", "zskt"])
        students = [root / "seed0" / name / "student.safetensors" for name in ("clp,zskt", "zskt")]
        began = [path.with_name("config.json").stat().st_mtime_ns for path in students]
        purified = (root / "seed0/clp,teacher/teacher.safetensors").stat().st_mtime_ns
        assert began[0] > purified
        weights.append([p for path in students for p in load_model(path).parameters()])
    assert all(map(torch.equal, *weights))


def test_a_run_goes_on_with_the_number_that_it_began_with_and_says_so(
    tmp_path, chosen, data, monkeypatch
):
    class Stop(Exception):
        pass

    def stop(_, step):
        if step.index == 2:
            raise Stop

    def go_on():
        seen = set()
        hook = register_module_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
        try:
            return distilled(tmp_path, chosen, data, teacher, "zskt")[1], seen
        finally:
            hook.remove()

    teacher = poisoned_teacher(tmp_path, chosen, data)
    with pytest.raises(Stop):
        distilled(tmp_path, chosen, data, teacher, "zskt", tell=stop)
    monkeypatch.setenv(THREADS, "2")
    with pytest.warns(ThreadsDiffer, match=r"zskt was begun with 1 thread .*ABDLAB_THREADS=1"):
        metrics, seen = go_on()
    run = Run(tmp_path / "seed0" / "zskt")
    assert metrics["threads"] == run.config["threads"] == run.threads == 1
    assert seen == {1}
    with pytest.warns(ThreadsDiffer, match="begun with 1 thread"):  # also one that is only read
        assert go_on() == (metrics, set())


def test_a_trunk_of_another_number_is_none(tmp_path, chosen, data):
    teacher, label = poisoned_teacher(tmp_path, chosen, data), "zskt+sr"
    distilled(tmp_path, chosen, data, teacher, "zskt")
    for threads_of_trunk, branches in ((1, True), (2, False)):
        trunk = Run(tmp_path / "seed0" / "zskt")
        trunk.save_config({**trunk.config, "threads": threads_of_trunk})
        found = distillation(tmp_path, chosen, data, teacher, label).resume_from
        assert (found is not None) == branches


def test_older_folders_load_and_stay_unknown(tmp_path, chosen, data):
    poisoned_teacher(tmp_path, chosen, data)
    folder = tmp_path / "seed0" / "teacher"
    for name in ("config.json", "metrics.json"):
        content = json.loads((folder / name).read_text())
        del content["threads"]
        (folder / name).write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ThreadsDiffer)
        poisoned_teacher(tmp_path, chosen, data)
        Run(folder, config_of(chosen, data, "data", "attack", "teacher"))
    assert "threads" not in Run(folder).config
    assert Run(folder).threads == 1


def test_rows_of_different_numbers_are_said_in_one_sentence():
    assert mixed([1, 1.0, 1]) == mixed([]) == mixed([None, float("nan")]) == ""
    assert mixed([4, 1, None, 4]) == (
        "Rows differ in threads (1 thread: 1 row, 4 threads: 2 rows, not recorded: 1 row):"
        " training amplifies that."
    )


def test_the_command_lines_table_shows_threads_and_says_a_mismatch(here, tmp_path):
    for name, number in (("zskt", 1), ("clean", 2)):
        metrics = {"label": name, "seed": 0, "acc": 0.9, "asr": 0.1, "threads": number}
        Run(tmp_path / "seed0" / name).save_metrics(metrics)
    Run(tmp_path / "02_distillation").save_metrics({"seed": 0})  # a notebook has none
    page = tmp_path / "page.csv"
    code, told, _ = here("report", tmp_path, "--csv", page)
    assert code == 0
    assert "Rows differ in threads (1 thread: 1 row, 2 threads: 1 row)" in told
    assert sorted(pd.read_csv(page)["threads"].dropna()) == [1, 2]
    Run(tmp_path / "seed0" / "clean").save_metrics({**metrics, "threads": 1})
    assert "Rows differ" not in here("report", tmp_path)[1]
    assert "threads" in here("report", tmp_path)[1]


def test_a_study_computes_with_the_number_of_its_file_or_of_the_environment(monkeypatch):
    def made(**more):
        return studies.make_study("05", parameters={"overrides": TINY}, **more).threads

    assert (made(), made(threads=3)) == (1, 3)
    monkeypatch.setenv(THREADS, "4")
    assert (made(), made(threads=3)) == (4, 3)
