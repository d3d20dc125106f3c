"""One report of all benchmarks of a session: printed at its end, and written where
``ABDLAB_BENCH_README`` says.
"""

import os
from pathlib import Path

import pytest
import torch

REPORT = pytest.StashKey()


def pytest_collection_modifyitems(config, items):
    """A run that writes the report leaves out what adds nothing to it."""
    if "ABDLAB_BENCH_README" not in os.environ:
        return
    silent = [i for i in items if "report" not in i.fixturenames]
    items[:] = [i for i in items if "report" in i.fixturenames]
    config.hook.pytest_deselected(items=silent)


@pytest.fixture(scope="session")
def report(request):
    from measure import THREADS, Report

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    request.config.stash[REPORT] = Report()
    yield request.config.stash[REPORT]
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if REPORT not in config.stash:
        return
    text = config.stash[REPORT].markdown()
    terminalreporter.write_line(f"\n{text}")
    if path := os.environ.get("ABDLAB_BENCH_README"):
        if exitstatus:
            terminalreporter.write_line(f"{path} was not written: a benchmark failed")
        else:
            Path(path).write_text(text)
