"""Where a student's inputs come from. A new source is one file and one line here."""

from abdlab.sources.clean import CleanKD
from abdlab.sources.source import Batch, Source
from abdlab.sources.zskt import ZSKT

#: name -> class, as presets and parameter cells name them
SOURCES = {"clean": CleanKD, "zskt": ZSKT}

__all__ = ["SOURCES", "ZSKT", "Batch", "CleanKD", "Source"]
