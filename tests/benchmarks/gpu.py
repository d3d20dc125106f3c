"""What a GPU is wanted for, in one script that ends when its time is up: the GPU's tests,
the speed of our loops, poisoned CIFAR-10 teachers, their students, and the paper's full
length, piece by piece.

    python tests/benchmarks/gpu.py run FOLDER --data cifar10-jpeg.tar.xz --seconds 520
    python tests/benchmarks/gpu.py merge FOLDER [FOLDER ...] --into FOLDER

``run`` goes through :data:`STAGES` in order of worth. Each is a process (or several) with a
time limit, killed when it is over; an error is a row, and the next stage goes on. Rows go
to FOLDER/rows.jsonl as they are measured. A later run in the same folder keeps the
teachers, skips what is done, and goes on with the long run where it stopped. ``merge``
makes one table, Markdown and CSV, of one folder or several. ``--tiny`` tries all of it in
a minute, on a CPU too.

It needs torch, torchvision, numpy, pandas, safetensors and Pillow; pytest for the tests.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for folder in (ROOT, HERE.parent, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

#: the stages in order of worth, and the most seconds that each may take of a run of 520;
#: a shorter run shortens all alike. What a stage leaves is there for those after it.
STAGES = {
    "tests": 70,
    "speed": 45,
    "together": 45,
    "teachers": 95,
    "students": 240,
    "compile": 50,
    "long": 520,  # all that is left
}
WHOLE = 520
#: those that want the data set
DATA_FOR = {"teachers", "students", "long"}
#: seconds that the last row and the table may take
RESERVE = 6
#: triggers of the teachers; None is a clean one. Whose students are made first comes first.
TEACHERS = {
    "badnet_grid": "badnet_grid",
    "trojan_wm": "trojan_wm",
    "blend": "blend",
    "badnet_sq": "badnet_sq",
    "clean": None,
}
#: whose students a run makes, at once, a process each
WITH_STUDENTS = ("badnet_grid", "trojan_wm", "blend")
#: the one whose full ZSKT run is the long one
LONG = "badnet_grid"
#: a teacher is trained no longer than this
MOST_EPOCHS = 40
#: the trigger that the clean teacher is examined with: its floor
FLOOR = "badnet_grid"
#: name of a way -> options of distill, and TF32 and cuDNN's search where they are not at
#: torch's defaults (convolutions in TF32, no search)
WAYS = {
    "eager": ({}, {}),
    "eager, no TF32": ({}, {"tf32": False}),
    "graphs": ({"graphs": True}, {}),
    "graphs, no TF32": ({"graphs": True}, {"tf32": False}),
    "bf16": ({"precision": "bf16"}, {}),
    "graphs, bf16": ({"graphs": True, "precision": "bf16"}, {}),
    "graphs, bf16, cuDNN searches": ({"graphs": True, "precision": "bf16"}, {"search": True}),
}
COMPILED = {
    "graphs, bf16, compile": {"graphs": True, "precision": "bf16", "compile": True},
    "bf16, compile": {"precision": "bf16", "compile": True},
    "compile": {"compile": True},
}
#: a source's settings in a run that is many times shorter than its paper's: rounds are
#: shortened, so that images are made as often as the student's time allows
SHORTER = {"fastdfkd": {"kd_steps": 60, "warmup": 10}}
#: sources of the students, and each one's share of their time; the first with three seeds
SHARES = {"fastdfkd": 0.8, "zskt": 0.2}
#: the share of the students' time that cleaning a teacher may take
PURIFYING = 0.3
#: the way that stages after the measurements compute in
BEST = {"graphs": True, "precision": "bf16"}


class Record:
    """Rows of one lease, appended to a file; what a row is of comes first.

    Args:
        folder: where rows.jsonl is.
        stage: of every row. lease: names the run that the row is from.
    """

    def __init__(self, folder: Path, stage: str, lease: str, tiny: bool):
        self.path, self.common = folder / "rows.jsonl", {"stage": stage, "lease": lease}
        self.common |= {"tiny": True} if tiny else {}

    def __call__(self, kind: str, **fields) -> None:
        row = {"kind": kind, **self.common, **fields}
        with self.path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        shown = {k: v for k, v in row.items() if k not in ("lease", "tiny", "error")}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
        if "error" in fields:
            print(fields["error"][-1500:], file=sys.stderr, flush=True)

    def failed(self, what: str) -> None:
        self("failed", what=what, error=traceback.format_exc()[-4000:])


def rows_of(folder: Path) -> list[dict]:
    """All whole rows of a folder; none where there is no file."""
    path = Path(folder) / "rows.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a process was killed while it wrote
    return rows


# ------------------------------------------------------------------ run: the parent


class Child:
    """A stage's process: it imports what it needs, and begins when it is told to."""

    def __init__(self, options: argparse.Namespace, lease: str, stage: str, part: str, log):
        command = [sys.executable, str(Path(__file__).resolve()), "stage", str(options.folder)]
        command += ["--name", stage, "--lease", lease, "--scratch", str(options.scratch)]
        command += ["--part", part] if part else []
        command += ["--tiny"] if options.tiny else []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},  # several at once share the cores
        )

    def begin(self, seconds: float) -> None:
        try:
            self.process.stdin.write(f"{seconds}\n".encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it died while it imported; its exit status says so

    def end(self) -> None:
        """Kill it and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def parts_of(stage: str, tiny: bool) -> list[str]:
    """The parts of a stage, a process each; "" where it is one."""
    if stage != "students":
        return [""]
    return list(WITH_STUDENTS[:2] if tiny else WITH_STUDENTS)


def run(options: argparse.Namespace) -> int:
    """Go through the stages; the exit status is 0 when each has a row that it is done."""
    # whoever ends this ends its stages too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    lease = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    options.folder.mkdir(parents=True, exist_ok=True)
    options.scratch.mkdir(parents=True, exist_ok=True)
    done = {row["stage"] for row in rows_of(options.folder) if row["kind"] == "done"}
    wanted = [s for s in STAGES if s in options.stages] if options.stages else list(STAGES)
    # the long run goes on for as long as it is not at its end; a stage that is named is
    # run anew
    wanted = [s for s in wanted if options.stages or s not in done or s in ("long", "teachers")]
    end = began + options.seconds - RESERVE
    results = {}
    with (options.folder / "log.txt").open("a") as log:
        print(f"lease {lease}: {', '.join(wanted)}", file=log, flush=True)
        data = decoding(options, log) if DATA_FOR & set(wanted) else None
        waiting = {}

        def start(stage: str) -> list[Child]:
            return [
                Child(options, lease, stage, part, log) for part in parts_of(stage, options.tiny)
            ]

        try:
            for number, stage in enumerate(wanted):
                record = Record(options.folder, stage, lease, options.tiny)
                children = waiting.pop(stage, None) or start(stage)
                waiting[stage] = children
                for following in wanted[number + 1 : number + 2]:
                    waiting[following] = start(following)
                if stage in DATA_FOR and data is not None:
                    try:
                        data.wait(max(1, end - time.monotonic()))
                    except subprocess.TimeoutExpired:
                        data.kill()
                left = end - time.monotonic()
                limit = min(left, STAGES[stage] * max(1, options.seconds / WHOLE))
                if limit < 3:
                    record("skipped", why="no time was left")
                    continue
                for child in children:
                    child.begin(limit)
                results[stage] = watch(children, limit, record)
                waiting.pop(stage)
        finally:
            for children in waiting.values():
                for child in children:
                    child.end()
            if data is not None and data.poll() is None:
                data.kill()
        try:
            merge([options.folder], options.folder)
        except Exception:
            traceback.print_exc(file=log)
    passed = time.monotonic() - began
    if (options.folder / "report.md").exists():
        print((options.folder / "report.md").read_text())
    print(f"{passed:.0f} s in all: {results}", flush=True)
    return 0 if set(results.values()) == {"done"} and len(results) == len(wanted) else 1


def watch(children: list[Child], limit: float, record: Record) -> str:
    """Wait for a stage's processes and end those that outlast it; how it ended."""
    began = time.monotonic()
    try:
        # a stage ends by itself a little before its limit, where it can
        while time.monotonic() - began < limit and any(
            child.process.poll() is None for child in children
        ):
            time.sleep(0.05)
        late = [child for child in children if child.process.poll() is None]
    finally:
        for child in children:
            child.end()
    codes = [child.process.returncode for child in children]
    seconds = round(time.monotonic() - began, 1)
    state = "killed" if late else "done" if not any(codes) else "failed"
    record(state, seconds=seconds, limit=round(limit, 1), codes=codes)
    return state


# ------------------------------------------------------------------ the data set


def decoding(options: argparse.Namespace, log) -> subprocess.Popen | None:
    """A process that decodes the archive into the scratch folder, unless that is done."""
    if options.tiny or (options.scratch / "cifar10.npz").exists():
        return None
    if options.data is None:
        raise SystemExit("--data ARCHIVE is needed: train/CLASS/*.jpg and test/CLASS/*.jpg")
    if not options.data.exists():
        raise SystemExit(f"--data {options.data} is not there")
    command = [sys.executable, str(Path(__file__).resolve()), "decode", str(options.data)]
    return subprocess.Popen([*command, str(options.scratch)], stdout=log, stderr=log)


def pixels(files: list[bytes]):
    """uint8 (N, 3, H, W) of image files."""
    import numpy as np
    from PIL import Image

    found = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
    return np.stack(found).transpose(0, 3, 1, 2)


def decode(archive: Path, scratch: Path, processes: int | None = None) -> Path:
    """Decode an archive of train/CLASS/* and test/CLASS/*, its images all of one size,
    into scratch/cifar10.npz, labels in the order of the class names; each split in a
    random order.
    """
    import numpy as np

    began = time.perf_counter()
    found: dict[str, list] = {}
    with tarfile.open(archive, "r|*") as files:  # read once, from front to back
        for member in files:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) >= 3 and parts[-3] in ("train", "test"):
                data = files.extractfile(member).read()
                found.setdefault(parts[-3], []).append((parts[-2], parts[-1], data))
    if set(found) != {"train", "test"}:
        raise SystemExit(f"{archive} must hold train/CLASS/* and test/CLASS/*")
    classes, arrays = sorted({name for name, *_ in found["train"]}), {}
    with get_context("fork").Pool(processes or os.cpu_count()) as pool:
        for split, files in found.items():
            files.sort(key=lambda file: file[:2])  # the same order whatever the archive's
            chunks = [[f[2] for f in files[i : i + 500]] for i in range(0, len(files), 500)]
            images = np.concatenate(pool.map(pixels, chunks, chunksize=1))
            labels = np.array([classes.index(name) for name, *_ in files])
            order = np.random.default_rng(0).permutation(len(labels))
            arrays |= {f"{split}_images": images[order], f"{split}_labels": labels[order]}
    path = scratch / "cifar10.npz"
    partial = scratch / f"{os.getpid()}.partial.npz"
    np.savez(partial, **arrays)
    partial.replace(path)
    print(f"decoded {archive} in {time.perf_counter() - began:.1f} s", flush=True)
    return path


def data_of(options: argparse.Namespace, device, train: bool = True) -> dict:
    """Images as floats in [0, 1] and labels on the device, by split, and mean and std of
    the training images.
    """
    import numpy as np
    import torch

    if options.tiny:
        # ten colours with noise: something to learn, in no time
        rng = torch.Generator().manual_seed(0)
        arrays = {}
        colours = torch.rand(10, 3, 1, 1, generator=rng)
        for split, count in (("train", 200), ("test", 100)):
            labels = torch.arange(count) % 10
            noise = 0.1 * torch.randn(count, 3, 8, 8, generator=rng)
            images = ((colours[labels] + noise).clamp(0, 1) * 255).byte()
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    else:
        with np.load(options.scratch / "cifar10.npz", allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    sample = arrays["train_images"].to(device).float().div(255)
    std, mean = torch.std_mean(sample, dim=(0, 2, 3))
    found = {"mean": mean.tolist(), "std": std.tolist()}
    for split in ("train", "test") if train else ("test",):
        images = arrays[f"{split}_images"].to(device)
        found[split] = images.float().div(255), arrays[f"{split}_labels"].long().to(device)
    return found


# ------------------------------------------------------------------ the stages


class Stage:
    """What a stage's process has: options, a record, a clock, the device, sizes."""

    def __init__(self, options: argparse.Namespace):
        import torch

        self.options, self.tiny = options, options.tiny
        self.record = Record(options.folder, options.name, options.lease, options.tiny)
        self.torch, self.part = torch, options.part
        told = sys.stdin.readline()
        if not told:
            raise SystemExit("nobody said how many seconds this stage has: its parent is gone")
        self.seconds = float(told)
        self.began = time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.gpu = self.device.type == "cuda"
        self.shape = (3, 8, 8) if self.tiny else (3, 32, 32)
        if self.tiny and not self.gpu:
            torch.set_num_threads(1)

    @property
    def left(self) -> float:
        """Seconds that are left to this stage; a little is kept back."""
        return self.seconds - (time.monotonic() - self.began) - (0.5 if self.tiny else 2)

    def ways(self, options: dict) -> dict:
        """The options as this device can have them: a CPU has no graphs."""
        return options if self.gpu else {k: v for k, v in options.items() if k != "graphs"}

    def networks(self):
        """An untrained teacher and student of the paper's sizes."""
        from measure import MAIN

        return MAIN.networks()


def pull(stream, seconds: float, least: int = 1) -> tuple[float, int]:
    """(items per second, items) of a stream, pulled for so long, at least some.

    Nobody waits for the device: an item holds numbers that were read from it, and a
    device may not be waited for while another thread captures a graph.
    """
    began, count = time.perf_counter(), 0
    while count < least or time.perf_counter() - began < seconds:
        next(stream)
        count += 1
    return count / (time.perf_counter() - began), count


def calls(function):
    """An endless stream of a function's results."""
    while True:
        yield function()


def tests(stage: Stage) -> None:
    """The tests that are marked gpu; one row each, as they end."""
    import pytest

    class Rows:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                if report.when == "teardown" and report.outcome == "passed":
                    return
                told = str(report.longrepr)[-2500:] if report.outcome == "failed" else ""
                stage.record(
                    "test",
                    test=report.nodeid.split("::", 1)[-1],
                    outcome=report.outcome,
                    seconds=round(report.duration, 2),
                    **({"error": told} if told else {}),
                )

    os.chdir(ROOT)
    arguments = ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:cov"]
    arguments += ["-p", "no:xdist"]
    code = pytest.main([*arguments, "tests/test_gpu.py"], plugins=[Rows()])
    stage.record("tests", pytest=str(code))


def speed(stage: Stage) -> None:
    """Student steps per second of one run, by way of computing, beside the naive loop."""
    from measure import Loops

    from abdlab import SelfRetrospection

    long = 0.05 if stage.tiny else 1.2

    def measured(way: str, ours: bool, options: dict, setting: dict, **more) -> None:
        if stage.left < long + 1:
            stage.record("skipped", what=way, why="no time was left")
            return
        try:
            with computing_with(stage, **setting):
                forget(stage)
                loops = Loops(main_size(), stage.device, **stage.ways(options), **more)
                side = calls(loops.ours if ours else loops.theirs)
                # pieces are captured in their fourth call, the generator's is called once
                # in a pseudo-batch
                pull(side, 0, 1 if stage.tiny or not ours else 6)
                pace, count = pull(side, long)
                stage.record(
                    "speed",
                    way=way,
                    runs=1,
                    steps_per_s=round(pace * loops.steps, 1),
                    pseudo_batches=count,
                    peak_mb=peak(stage),
                )
        except Exception:
            stage.record.failed(way)

    measured("naive, eager", False, {}, {})
    for way, (options, setting) in WAYS.items():
        measured(way, True, options, setting)
    measured("ABD's first part: graphs, bf16, SV", True, BEST, {}, vaccine=True)
    sr = SelfRetrospection(start=0)
    measured("ABD's last part: graphs, bf16, SR", True, BEST, {}, defenses=[sr])
    measured("eager, SV", True, {}, {}, vaccine=True)
    measured("naive, eager, SV", False, {}, {}, vaccine=True)


def compile(stage: Stage) -> None:  # as the option of distill is called
    """One run through torch.compile; what it takes to compile is a figure of its own."""
    from measure import Loops

    for way, options in list(COMPILED.items())[-1 if stage.tiny else 0 :]:
        if stage.tiny and not stage.gpu:
            options = {}  # a compiler is not part of the trial
        if stage.left < 5 and not stage.tiny:
            stage.record("skipped", what=way, why="no time was left")
            continue
        try:
            forget(stage)
            began = time.perf_counter()
            loops = Loops(main_size(), stage.device, **stage.ways(options))
            side = calls(loops.ours)
            pull(side, 0, 1 if stage.tiny else 6)
            ready = time.perf_counter() - began
            pace, count = pull(side, 0.05 if stage.tiny else 1.5)
            stage.record(
                "speed",
                way=way,
                runs=1,
                steps_per_s=round(pace * loops.steps, 1),
                pseudo_batches=count,
                peak_mb=peak(stage),
                ready_s=round(ready, 1),
            )
        except Exception:
            stage.record.failed(way)


def together(stage: Stage) -> None:
    """Student steps per second of several runs in one process, all together."""
    from abdlab import ZSKT, distill, side_by_side

    size = main_size()
    most = 1 if stage.tiny else 6

    def measured(way: str, runs: int, options: dict) -> None:
        streams = []
        for seed in range(runs):
            teacher, student = stage.networks()
            source = ZSKT(
                stage.shape, pseudo_batches=10_000, batch_size=size.batch, width=size.generator
            )
            streams.append(
                distill(
                    teacher,
                    student,
                    source,
                    seed=seed,
                    device=stage.device,
                    **stage.ways(options),
                )
            )
        forget(stage)
        stream = side_by_side(streams)
        try:
            pull(stream, 0, most * runs)
            pace, count = pull(stream, 0.1 if stage.tiny else 2.5, runs)
        finally:
            stream.close()
        stage.record(
            "speed",
            way=way,
            runs=runs,
            steps_per_s=round(pace * source.student_steps, 1),
            pseudo_batches=count,
            peak_mb=peak(stage),
        )

    plan = [("graphs, bf16", runs, BEST) for runs in ((1, 2) if stage.tiny else (1, 4, 8, 16, 2))]
    plan += [] if stage.tiny else [("bf16", 4, {"precision": "bf16"})]
    for way, runs, options in plan:
        if stage.left < (0 if stage.tiny else 4 + runs / 2):
            stage.record("skipped", what=f"{way}, {runs} runs", why="no time was left")
            continue
        try:
            measured(way, runs, options)
        except Exception:
            stage.record.failed(f"{way}, {runs} runs")


def teachers(stage: Stage) -> None:
    """Teachers on data poisoned by each trigger, side by side; kept when all are there."""
    import copy

    from abdlab import Exam, accuracy, build, poison, trigger_from
    from abdlab.checkpoint import save_state
    from abdlab.train_together import train_together

    path = stage.options.folder / "teachers.safetensors"
    if path.exists():
        stage.record("kept", what=str(path.name))
        return
    began = time.perf_counter()
    data = data_of(stage.options, stage.device)
    images, labels = data["train"]
    sets, exams = [], []
    for trigger in TEACHERS.values():
        made = trigger_from(trigger or FLOOR)
        exams.append(Exam.of(*data["test"], made, target=0))
        if trigger is None:
            sets.append((images, labels))
        else:
            poisoned = poison(images, labels, made, rate=0.1, target=0, seed=0)
            sets.append((poisoned.images, poisoned.labels))
    name, width = ("wrn-10-1", 4) if stage.tiny else ("wrn-16-2", None)
    fresh = [
        build(name, width=width, mean=data["mean"], std=data["std"], seed=i)
        for i in range(len(TEACHERS))
    ]
    settings = {"batch_size": 20, "lr": 0.2, "shift": 0, "flip": False} if stage.tiny else {}
    settings = {"batch_size": 256, "lr": 0.25, "shift": 4, "flip": True, **settings}
    settings |= {"precision": "bf16"}
    ready, found = time.perf_counter() - began, None

    def training(models, graphs: bool, epochs: int):
        return train_together(
            models, sets, epochs=epochs, device=stage.device, graphs=graphs, **settings
        )

    # without graphs where they fail: slower, and shorter
    for graphs in (True, False) if stage.gpu else (False,):
        try:
            # two epochs are timed first, the second without captures: a run that is cut
            # ends at a high rate, so its schedule has to be as long as there is time for
            models, passed = copy.deepcopy(fresh), [0.0]
            for steps in training(models, graphs, 2):
                passed.append(steps[0].seconds)
            pace = passed[2] - passed[1]
            epochs = 4 if stage.tiny else min(MOST_EPOCHS, int((stage.left - 8) / pace))
            stage.record("length", what="teachers", epochs=epochs, epoch_s=round(pace, 2))
            if epochs < 2:
                raise TimeoutError("no time was left for two epochs")
            models, at = copy.deepcopy(fresh), time.perf_counter()
            for steps in training(models, graphs, epochs):
                found = steps
                if steps[0].index == epochs // 2:
                    stage.record(
                        "epoch",
                        index=steps[0].index,
                        total=epochs,
                        seconds=round(steps[0].seconds, 1),
                        clean_acc=round(accuracy(models[-1], *data["test"]), 4),
                        losses=[round(step.losses["cross_entropy"], 4) for step in steps],
                    )
            break
        except Exception:
            found = None
            stage.record.failed(f"teachers, graphs={graphs}")
    if found is None:
        raise SystemExit("no teacher was trained")
    seconds, state = time.perf_counter() - at, {}
    for name, model, exam, step in zip(TEACHERS, models, exams, found, strict=True):
        model.eval()
        marks = exam(model)
        stage.record(
            "teacher",
            teacher=name,
            acc=round(marks["acc"], 4),
            asr=round(marks["asr"], 4),
            loss=round(step.losses["cross_entropy"], 4),
            epochs=step.index,
            seconds_of_all=round(seconds, 1),
            ready_s=round(ready, 1),
            graphs=graphs,
            peak_mb=peak(stage),
        )
        state[name] = model.state_dict()
    card = {"model": models[0].card, "lease": stage.options.lease, "settings": settings}
    save_state(path, {name: {k: v.cpu() for k, v in s.items()} for name, s in state.items()}, card)


def teacher_of(stage: Stage, name: str):
    """One of the trained teachers, on the device."""
    from abdlab import build
    from abdlab.checkpoint import load_state
    from abdlab.models import place

    path = stage.options.folder / "teachers.safetensors"
    if not path.exists():
        raise SystemExit("there are no teachers: their stage failed or was cut")
    state, card = load_state(path)
    model = build(**card["model"])
    model.load_state_dict(state[name])
    return place(model.eval(), stage.device), card


def student_like(teacher_card: dict, seed: int, tiny: bool):
    """An untrained student that normalises as its teacher does."""
    from abdlab import build

    card = {k: teacher_card["model"][k] for k in ("classes", "channels", "mean", "std")}
    return build("wrn-10-1" if tiny else "wrn-16-1", width=4 if tiny else None, seed=seed, **card)


def purified_of(stage: Stage, teacher):
    """(a purified teacher or None, why not)."""
    import inspect

    def late(*_):
        raise TimeoutError(f"cleaning took more than {cap:.0f} s")

    try:
        from abdlab.purifiers import PURIFIERS, purify, synthetic_pool
    except ImportError as error:
        return None, f"abdlab.purifiers has no purify: {error}"
    cap = PURIFYING * stage.seconds
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, cap)
    try:
        known = inspect.signature(purify).parameters
        more = {"device": stage.device, "seed": 0}
        steps = ["unlearn", "bounded"]
        if stage.tiny:  # both at work, on a sixth of the images
            steps[0] = PURIFIERS["unlearn"](rounds=1, starts=1, steps=2, guard=0)
            more["pool"] = synthetic_pool(teacher, stage.shape, images=64, doublings=0, **more)
        found = purify(teacher, steps, stage.shape, **{k: more[k] for k in more if k in known})
        return (found if hasattr(found, "state_dict") else found[0]), None
    except Exception as error:
        stage.record.failed("purify")
        return None, f"the purifier failed: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def length_key(source_class) -> str | None:
    """The argument that says how long a source's run is."""
    import inspect

    known = inspect.signature(source_class).parameters
    return next((k for k in ("pseudo_batches", "rounds", "epochs") if k in known), None)


def students(stage: Stage) -> None:
    """Students of one teacher by source, defense and seed, side by side.

    Each source has its share of the time. The runs that are made first, undefended and
    with ABD, are timed for a moment, all teachers' at once; the slowest teacher's pace
    is the length of all, so that rows can be compared.
    """
    from abdlab import Exam, trigger_from
    from abdlab.sources import SOURCES

    teacher, card = teacher_of(stage, stage.part)
    test = data_of(stage.options, stage.device, train=False)["test"]
    exam = Exam.of(*test, trigger_from(TEACHERS[stage.part] or FLOOR), target=0)
    stage.record("examined", teacher=stage.part, defense="the teacher", **marks_of(exam(teacher)))
    seeds = (0,) if stage.tiny else (0, 1, 2)
    plan = [name for name in SHARES if name in SOURCES]
    for name in SHARES.keys() - set(plan):
        stage.record("skipped", teacher=stage.part, source=name, why="no such source here")
    began = time.perf_counter()
    clean, why = purified_of(stage, teacher)
    if clean is None:
        stage.record("skipped", teacher=stage.part, defense="purified", why=why)
    else:
        stage.record(
            "examined",
            teacher=stage.part,
            defense="the purified teacher",
            **marks_of(exam(clean)),
            seconds=round(time.perf_counter() - began, 1),
        )
    whole = stage.left
    for name in plan:
        few = stage.left if name == plan[-1] else SHARES[name] * whole
        chosen = seeds if name == next(iter(SHARES)) else seeds[:1]
        try:
            one_source(stage, SOURCES[name], name, teacher, clean, card, exam, chosen, few)
        except Exception:
            stage.record.failed(f"{stage.part}, {name}")


def marks_of(found: dict) -> dict:
    return {name: round(found[name], 4) for name in ("acc", "asr")}


def one_source(stage, source_class, name, teacher, clean, card, exam, seeds, seconds) -> None:
    """The students of one source, all at once."""
    import copy
    import inspect

    from abdlab import SelfRetrospection, ShufflingVaccine, distill, side_by_side

    began = time.monotonic()
    key = length_key(source_class)
    signature = inspect.signature(source_class).parameters
    settings = dict(SHORTER.get(name, {}))
    if stage.tiny:
        settings |= {"batch_size": 8, "width": 4, "kd_steps": 3, "warmup": 1, "flip": False}
    settings = {k: v for k, v in settings.items() if k in signature}
    default = signature[key].default

    def abd():
        # the paper's settings; ours: self-retrospection for the last tenth, in place of
        # the last hundredth of a run that is many times longer, and of first order
        return [
            ShufflingVaccine(layers=3 if stage.tiny else 5, warmup=0.1, stop=0.9),
            SelfRetrospection(start=0.9, order=1, lr=5e-4, inner_steps=10),
        ]

    # undefended, ABD, purified, for each seed
    ways = [(way, seed) for seed in seeds for way in ("none", "abd", "purified")]
    ways = [(way, seed) for way, seed in ways if way != "purified" or clean is not None]

    def streams(length: int):
        students, found = [], []
        for way, seed in ways:
            student = student_like(card, seed, stage.tiny)
            source = source_class(stage.shape, **settings, **{key: length})
            found.append(
                distill(
                    copy.deepcopy(clean if way == "purified" else teacher),
                    student,
                    source,
                    defenses=abd() if way == "abd" else [],
                    seed=seed,
                    device=stage.device,
                    **stage.ways(BEST),
                )
            )
            students.append(student)
        return students, found, len(source)

    # timed after the pseudo-batches in which pieces are captured; where the length is in
    # rounds, which make images first, from the beginning
    _, found, steps = streams(default)
    unit = steps // default
    stream = side_by_side(found)
    trial = min(0.15 * seconds, 0.5 if stage.tiny else 12)
    at = time.monotonic()
    try:
        if unit == 1:
            pull(stream, 0, (1 if stage.tiny else 6) * len(ways))
        pace, timed = pull(stream, trial - (time.monotonic() - at), 1)
    finally:
        stream.close()
    left = seconds - (time.monotonic() - began)
    # of one run, all others beside it; the rest of the time is for captures, for
    # verification, and for self-retrospection, a step of which is worth ten
    wished = agreed(stage, name, 0.65 * left * pace / len(ways) / unit)
    length = max(2, min(default, int(wished)))
    length = min(length, 4) if stage.tiny else length
    stage.record(
        "length",
        teacher=stage.part,
        source=name,
        length=length,
        whole=default,
        steps_per_s=round(pace, 1),
        timed=timed,
    )
    at = time.monotonic()
    students, found, total = streams(length)
    stream, events, done = side_by_side(found), {i: [] for i in range(len(ways))}, {}
    # whatever has not ended then is cut, with time for its exam
    end = seconds - (0 if stage.tiny else 3 + 0.3 * len(ways))

    def report(number: int, index: int) -> None:
        way, seed = ways[number]
        stage.record(
            "student",
            teacher=stage.part,
            source=name,
            defense=way,
            seed=seed,
            index=index,
            total=total,
            **marks_of(exam(students[number])),
            seconds=round(time.monotonic() - at, 1),
            settings=settings | {key: length},
            events=events[number],
        )

    try:
        for number, step in stream:
            events[number] += step.events
            done[number] = step.index
            if step.index in (total // 2, total):
                report(number, step.index)
            if time.monotonic() - began > end:
                break
    finally:
        stream.close()
        for number, index in sorted(done.items()):
            if index != total:
                report(number, index)


def agreed(stage: Stage, name: str, value: float, patience: float = 20) -> float:
    """The least of what all teachers' processes say, each through a file; of those that
    said it in time.
    """
    parts = parts_of("students", stage.tiny)
    stem = f"{stage.options.lease}-{name}".replace(":", "")
    mine = stage.options.scratch / f"{stem}-{stage.part}.json"
    partial = mine.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(mine)
    files = [stage.options.scratch / f"{stem}-{part}.json" for part in parts]
    end = time.monotonic() + min(patience, max(0, stage.left / 4))
    while time.monotonic() < end and not all(file.exists() for file in files):
        time.sleep(0.05)
    return min(json.loads(file.read_text()) for file in files if file.exists())


def long(stage: Stage) -> None:
    """The paper's 80,000 pseudo-batches of ZSKT, from where the folder's checkpoint is."""
    from abdlab import ZSKT, Exam, distill, trigger_from

    teacher, card = teacher_of(stage, LONG)
    test = data_of(stage.options, stage.device, train=False)["test"]
    exam = Exam.of(*test, trigger_from(TEACHERS[LONG] or FLOOR), target=0)
    student = student_like(card, 0, stage.tiny)
    size = {"pseudo_batches": 12, "batch_size": 8, "width": 4} if stage.tiny else {}
    source = ZSKT(stage.shape, **size)
    path = stage.options.folder / "long.safetensors"
    stream = distill(
        teacher,
        student,
        source,
        checkpoint=path,
        checkpoint_every=4 if stage.tiny else 4000,
        seed=0,
        device=stage.device,
        **stage.ways(BEST),
    )
    first = step = None
    try:
        for step in stream:
            first = first or step.index
            if stage.tiny and step.index == first + 5:
                break
            if stage.left < 4 and not stage.tiny:
                break
    finally:
        stream.close()
    if step is None:
        stage.record("skipped", why="no time was left for a pseudo-batch")
        return
    stage.record(
        "long",
        teacher=LONG,
        source="zskt",
        defense="none",
        seed=0,
        first=first,
        index=step.index,
        total=step.total,
        **marks_of(exam(student)),
        seconds=round(step.seconds, 1),
    )


def main_size():
    from measure import MAIN

    return MAIN


def forget(stage: Stage) -> None:
    """Free what earlier measurements held, and begin to look for the peak anew."""
    import gc

    gc.collect()
    if stage.gpu:
        stage.torch.cuda.synchronize()
        stage.torch.cuda.empty_cache()
        stage.torch.cuda.reset_peak_memory_stats()


def peak(stage: Stage) -> int | None:
    """Most memory in MB that torch allocated on the GPU; None on a CPU."""
    return round(stage.torch.cuda.max_memory_allocated() / 2**20) if stage.gpu else None


class computing_with:
    """Convolutions with or without TF32, cuDNN with or without its search, for a block."""

    def __init__(self, stage: Stage, tf32: bool | None = None, search: bool = False):
        self.cudnn = stage.torch.backends.cudnn
        self.wanted = {} if tf32 is None else {"allow_tf32": tf32}
        self.wanted |= {"benchmark": True} if search else {}

    def __enter__(self):
        self.before = {name: getattr(self.cudnn, name) for name in self.wanted}
        for name, value in self.wanted.items():
            setattr(self.cudnn, name, value)

    def __exit__(self, *error):
        for name, value in self.before.items():
            setattr(self.cudnn, name, value)


def stage_main(options: argparse.Namespace) -> int:
    """One stage in this process: it imports, waits for its seconds on standard input,
    and begins.
    """
    if options.tiny:
        os.environ["ABDLAB_BENCH"] = "tiny"
    import abdlab  # the seconds of this are spent while another stage runs

    assert abdlab.__version__
    if options.name == "tests":
        import pytest

        assert pytest
    import gc

    gc.collect()
    gc.freeze()  # what was imported need not be looked through again before each capture
    stage = Stage(options)
    try:
        where = {"card": "none: a CPU", "device": str(stage.device)}
        if stage.gpu:
            where["card"] = stage.torch.cuda.get_device_name(0)
        stage.record(
            "begun",
            part=stage.part,
            seconds=stage.seconds,
            torch=stage.torch.__version__,
            python=sys.version.split()[0],
            **where,
        )
        globals()[options.name](stage)
        return 0
    except BaseException:
        stage.record.failed(options.name)
        return 1


# ------------------------------------------------------------------ merge: the table

#: graphs that are less than this many times faster than none are not worth their code
WORTH = 1.5


def merge(folders: list[Path], into: Path) -> str:
    """One report of all rows of several leases: report.md and report.csv in ``into``;
    the Markdown. Of two rows of the same thing the later one counts.
    """
    import csv

    rows = [row for folder in folders for row in rows_of(folder)]
    rows.sort(key=lambda row: row["lease"])
    latest: dict[tuple, dict] = {}
    names = ("kind", "test", "way", "runs", "teacher", "source", "defense", "seed")
    for row in rows:
        latest[tuple(row.get(name) for name in names)] = row
    kept = [
        row
        for row in latest.values()
        if row["kind"] in ("test", "speed", "teacher", "examined", "student", "long")
    ]
    into.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in kept for name in row if name != "error"))
    with (into / "report.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
    text = "\n".join(markdown(rows, kept)) + "\n"
    (into / "report.md").write_text(text)
    return text


def markdown(rows: list[dict], kept: list[dict]) -> list[str]:
    """The report's lines."""

    def of(kind: str) -> list[dict]:
        return [row for row in kept if row["kind"] == kind]

    text = ["# On a GPU", ""]
    leases = {}
    for row in rows:
        if row["kind"] == "begun":
            leases[row["lease"]] = (row["card"], row["torch"], bool(row.get("tiny")))
    text += _table(
        [
            {"lease": lease, "card": card, "torch": version, "date": lease[:10]}
            | ({"note": "tiny, to try the script: figures mean nothing"} if tiny else {})
            for lease, (card, version, tiny) in leases.items()
        ]
    )
    if found := of("test"):
        counts = {}
        for row in found:
            counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
        text += ["", "## Tests", "", ", ".join(f"{n} {what}" for what, n in counts.items())]
        text += [f"- failed: `{row['test']}`" for row in found if row["outcome"] == "failed"]
    if found := of("speed"):
        naive = next((r["steps_per_s"] for r in found if r["way"] == "naive, eager"), None)
        text += ["", "## Speed", "", decision(found), ""]
        text += _table(
            [
                {
                    "way": row["way"],
                    "runs": row["runs"],
                    "student steps/s": f"{row['steps_per_s']:,.0f}",
                    "x naive": f"{row['steps_per_s'] / naive:.1f}" if naive else "not measured",
                    "peak MB": row["peak_mb"] if row["peak_mb"] is not None else "not measured",
                    "ready after s": row.get("ready_s", ""),
                }
                for row in found
            ]
        )
    if found := of("teacher"):
        text += ["", "## Teachers", ""]
        text += _table(
            [
                {
                    "teacher": row["teacher"],
                    "ACC/ASR": _both([row]),
                    "epochs": row["epochs"],
                    "all of them, s": row["seconds_of_all"],
                }
                for row in found
            ]
        )
    groups: dict[tuple, list[dict]] = {}
    for row in [*of("examined"), *of("student"), *of("long")]:
        length = f"{row['index']:,} of {row['total']:,}" if "total" in row else ""
        key = (row["teacher"], row.get("source", ""), row["defense"], length)
        groups.setdefault(key, []).append(row)
    if groups:
        text += ["", "## Students", "", "Mean and standard deviation over seeds, in %.", ""]
        text += _table(
            [
                {
                    "teacher": key[0],
                    "source": key[1],
                    "defense": key[2],
                    "pseudo-batches": key[3],
                    "seeds": ", ".join(str(r["seed"]) for r in found if "seed" in r),
                    "ACC/ASR": _both(found),
                }
                for key, found in groups.items()
            ]
        )
    wrong = [row for row in rows if row["kind"] in ("failed", "killed", "skipped", "shortened")]
    if wrong:
        text += ["", "## What did not happen", ""]
        for row in wrong:
            told = row.get("why") or (row.get("error") or "").strip().splitlines()[-1:] or ""
            told = told[0] if isinstance(told, list) else told
            what = " ".join(
                str(row[k]) for k in ("teacher", "source", "defense", "what") if row.get(k)
            )
            text.append(f"- {row['stage']} {what}: {row['kind']}. {told[:200]}")
    return text


def decision(found: list[dict]) -> str:
    """Whether CUDA graphs stay, from the rows of one run."""
    pace = {row["way"]: row["steps_per_s"] for row in found if row["runs"] == 1}
    gains = {
        name: pace[with_it] / pace[without]
        for name, with_it, without in (
            ("float32", "graphs", "eager"),
            ("bf16", "graphs, bf16", "bf16"),
        )
        if with_it in pace and without in pace
    }
    if not gains:
        return "CUDA graphs: not measured."
    if all(row["peak_mb"] is None for row in found):
        return "CUDA graphs: not measured, these figures are a CPU's."
    told = ", ".join(f"{gain:.2f}x in {name}" for name, gain in gains.items())
    stay = max(gains.values()) >= WORTH
    return f"CUDA graphs {'stay' if stay else 'go'}: {told} (they stay from {WORTH}x on)."


def _both(rows: list[dict]) -> str:
    """Mean and, of several, standard deviation of ACC and ASR in %."""

    def one(name: str) -> str:
        values = [100 * row[name] for row in rows]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    return f"{one('acc')} / {one('asr')}"


def _table(rows: list[dict]) -> list[str]:
    """Rows as a Markdown table with the union of their columns."""
    if not rows:
        return []
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[str(row.get(name, "")) for name in columns] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *lines)]


# ------------------------------------------------------------------ the command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="all stages, in order of worth")
    one.add_argument("folder", type=Path, help="results and state; go on with an earlier one")
    one.add_argument("--data", type=Path, help="an archive of train/CLASS/*.jpg, test/CLASS/*.jpg")
    one.add_argument("--seconds", type=float, default=WHOLE, help="for all of it")
    one.add_argument("--stages", nargs="+", choices=STAGES, help="these only, and anew")
    one.add_argument("--scratch", type=Path, help="for the decoded data; by default in /tmp")
    one.add_argument("--tiny", action="store_true", help="try the script itself in seconds")
    two = commands.add_parser("merge", help="one table of several leases")
    two.add_argument("folders", nargs="+", type=Path)
    two.add_argument("--into", type=Path, help="by default the first folder")
    three = commands.add_parser("decode", help="the archive alone")
    three.add_argument("archive", type=Path)
    three.add_argument("scratch", type=Path)
    four = commands.add_parser("stage", help="one stage, as run starts it")
    four.add_argument("folder", type=Path)
    four.add_argument("--name", choices=STAGES, required=True)
    four.add_argument("--part", default="")
    four.add_argument("--lease", required=True)
    four.add_argument("--scratch", type=Path, required=True)
    four.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if options.command == "merge":
        print(merge(options.folders, options.into or options.folders[0]))
        return 0
    if options.command == "decode":
        options.scratch.mkdir(parents=True, exist_ok=True)
        decode(options.archive, options.scratch)
        return 0
    if options.command == "stage":
        return stage_main(options)
    options.folder = options.folder.resolve()
    options.scratch = options.scratch or Path(tempfile.gettempdir()) / "abdlab-gpu"
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
