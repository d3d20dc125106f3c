"""What a sweep costs per job beyond papermill's own kernel start, and whether the
parent's memory stays flat over 200 jobs.
"""

import io
import os
import statistics
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from abdlab import studies
from abdlab.batch import run_kernel
from abdlab.studies.engines import LocalEngine

pytestmark = pytest.mark.benchmark


def test_overhead_per_job_and_memory(tmp_path):
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in ("x = 0", "y = x + 1")]
    )
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    path = tmp_path / "trivial.ipynb"
    nbformat.write(book, path)

    def alone(number):
        began = time.perf_counter()
        run_kernel(path, tmp_path / "alone.ipynb", {"x": number}, io.StringIO(), threads=1)
        return time.perf_counter() - began

    alone(0)
    before = [alone(n) for n in range(10)]
    study, process, seen = (
        studies.make_study(path, grid={"x": list(range(200))}),
        psutil.Process(os.getpid()),
        {},
    )

    def tell(frame, study):
        done = int((frame["state"] == "done").sum())
        seen.setdefault(done, (time.perf_counter(), process.memory_info().rss / 2**20))

    frame = studies.sweep(study, tmp_path / "out", LocalEngine(1), tell=tell)
    assert set(frame["state"]) == {"done"}
    after = [alone(n) for n in range(10)]
    # the machine's speed may drift over the minutes that this takes: compare with
    # papermill alone before and after
    kernel = statistics.mean([*before, *after])
    counts = sorted(seen)
    first, last = next(c for c in counts if c >= 10), counts[-1]
    per_job = (seen[last][0] - seen[first][0]) / (last - first)
    print(
        f"\npapermill alone {kernel:.2f} s, a job of the sweep {per_job:.2f} s: overhead"
        f" {per_job - kernel:+.3f} s per job"
    )
    print(
        f"memory of the parent: {seen[first][1]:.0f} MB after {first} jobs, {seen[last][1]:.0f} MB"
        f" after {last}"
    )
    assert per_job - kernel < 0.3
    assert seen[last][1] < 1.05 * seen[first][1] + 10


def test_what_a_worker_and_the_command_line_import():
    """nbformat with and without the grammars that no notebook needs, in turns."""
    seconds = {"": [], "from abdlab.processes import skip_grammars; skip_grammars()\n": []}
    for _ in range(5):
        for first, found in seconds.items():
            code = (
                f"import time, abdlab.processes\n{first}began = time.perf_counter()\n"
                "import nbformat\nprint(time.perf_counter() - began)"
            )
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            found.append(float(done.stdout))
    plain, skipped = map(min, seconds.values())
    ratio = plain / skipped
    print(f"\nimport nbformat {plain:.2f} s, without grammars {skipped:.2f} s: {ratio:.1f}x")
    assert ratio > 1.5
