"""How good each source's undefended student is, and how soon it reaches ACC 95 %: one
row per source and seed, in a CSV file that grows as it goes.

    OMP_NUM_THREADS=1 python tests/benchmarks/sources_fast.py ROOT OUT.csv \
        --seeds 20 21 22 --sources cmi fastdfkd nayer cgdfkd zskt

Seconds are those of the distillation without its exams, held 20 times over a run.
``cpu_`` columns count this process's own time, which other processes on the machine
change little.
"""

import argparse
import csv
import time
from pathlib import Path

import torch

import abdlab

COLUMNS = [
    "study",
    "preset",
    "trigger",
    "method",
    "seed",
    "acc",
    "asr",
    "cpu_seconds",
    "cpu_seconds_to_acc95",
    "student_steps_to_acc95",
    "threads",
    "seconds",
    "seconds_to_acc95",
]


class Clock:
    """Wall and process time since it was made, less what was spent in pauses."""

    def __init__(self):
        self.began, self.paused = self._now(), (0.0, 0.0)

    def _now(self):
        return time.perf_counter(), time.process_time()

    def pause(self, function):
        """``function``, not counted."""

        def called(*args):
            before = self._now()
            result = function(*args)
            spent = (b - a for a, b in zip(before, self._now(), strict=True))
            self.paused = tuple(p + s for p, s in zip(self.paused, spent, strict=True))
            return result

        return called

    def read(self):
        """(wall seconds, process seconds)."""
        pairs = zip(self._now(), self.began, self.paused, strict=True)
        return tuple(round(now - began - paused, 2) for now, began, paused in pairs)


def row(root, preset, name, seed):
    """One student's row."""
    chosen = abdlab.settings(preset, seed=seed, device="cpu")
    data = chosen.dataset()
    teacher = abdlab.poisoned_teacher(root, chosen, data)
    student, source, exam = chosen.student(data), chosen.source(name, data), chosen.exam(data)
    clock, reached, at = Clock(), ("", ""), ""
    stream = abdlab.distill(
        teacher,
        student,
        source,
        exam=clock.pause(exam),
        exam_every=max(1, len(source) // 20),
        seed=seed,
        device="cpu",
        **chosen.distilling(),
    )
    for step in stream:
        if step.acc is not None and step.acc >= 0.95 and not at:
            reached, at = clock.read(), step.index * source.student_steps
    seconds, cpu = clock.read()
    return {
        "study": "sources-fast",
        "preset": preset,
        "trigger": chosen.values["attack"]["trigger"],
        "method": name,
        "seed": seed,
        "acc": round(100 * step.acc, 1),
        "asr": round(100 * step.asr, 1),
        "seconds": seconds,
        "seconds_to_acc95": reached[0],
        "threads": torch.get_num_threads(),
        "cpu_seconds": cpu,
        "cpu_seconds_to_acc95": reached[1],
        "student_steps_to_acc95": at,
    }


def main():
    """Read the command line and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", type=Path, help="folder for the teachers")
    parser.add_argument("out", type=Path, help="CSV file to append to")
    parser.add_argument("--preset", default="quick/digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    parser.add_argument("--sources", nargs="+", default=["cmi", "fastdfkd", "nayer", "cgdfkd"])
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.sources:
        for seed in options.seeds:
            found = row(options.root, options.preset, name, seed)
            fresh = not options.out.exists()
            with options.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if fresh:
                    writer.writeheader()
                writer.writerow(found)
            print(found, flush=True)


if __name__ == "__main__":
    main()
