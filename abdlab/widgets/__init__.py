"""Jupyter controls over the library's own calls. This module hands names on and defines
nothing.

Each widget stands alone in a notebook of yours; :class:`Workbench` puts all side by side.
"""

from abdlab.widgets.defense_tuner import DefenseTuner
from abdlab.widgets.many_runs import ManyRuns
from abdlab.widgets.queue import Queue
from abdlab.widgets.run_browser import RunBrowser
from abdlab.widgets.sample_explorer import SampleExplorer
from abdlab.widgets.teacher_chooser import TeacherChooser, TeacherOpener
from abdlab.widgets.trigger_designer import TriggerDesigner
from abdlab.widgets.workbench import Workbench

__all__ = [
    "DefenseTuner",
    "ManyRuns",
    "Queue",
    "RunBrowser",
    "SampleExplorer",
    "TeacherChooser",
    "TeacherOpener",
    "TriggerDesigner",
    "Workbench",
]
