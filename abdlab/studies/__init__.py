"""Studies: one notebook over a grid of parameters, as jobs that survive failures.

This package hands names on. Its figures (:mod:`abdlab.studies.figures`) need seaborn and are
imported by whoever draws one.
"""

from abdlab.studies.job import run_job, status_of
from abdlab.studies.results import render, report, results, status, watch
from abdlab.studies.study import Job, Study, make_study, open_study, read_study, write_study
from abdlab.studies.sweep import estimate, sweep

__all__ = [
    "Job",
    "Study",
    "estimate",
    "make_study",
    "open_study",
    "read_study",
    "render",
    "report",
    "results",
    "run_job",
    "status",
    "status_of",
    "sweep",
    "watch",
    "write_study",
]
