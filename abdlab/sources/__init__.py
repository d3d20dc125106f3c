"""Where a student's inputs come from. A new source is one file and one line here."""

from abdlab.registry import Registry
from abdlab.sources.cgdfkd import CGDFKD
from abdlab.sources.choi import Choi
from abdlab.sources.clean import CleanKD
from abdlab.sources.cmi import CMI
from abdlab.sources.dafl import DAFL
from abdlab.sources.deepinversion import DeepInversion
from abdlab.sources.dfad import DFAD
from abdlab.sources.dfq import DFQ
from abdlab.sources.fastdfkd import FastDFKD
from abdlab.sources.mixed import Mixed
from abdlab.sources.nayer import NAYER
from abdlab.sources.ood import OOD
from abdlab.sources.source import Batch, Source
from abdlab.sources.zskt import ZSKT

#: name -> class, as presets and parameter cells name them
SOURCES = Registry(
    "source",
    {
        "clean": CleanKD,
        "zskt": ZSKT,
        "cmi": CMI,
        "deepinversion": DeepInversion,
        "dafl": DAFL,
        "dfad": DFAD,
        "dfq": DFQ,
        "choi": Choi,
        "fastdfkd": FastDFKD,
        "nayer": NAYER,
        "cgdfkd": CGDFKD,
        "ood": OOD,
        "mixed": Mixed,
    },
)

__all__ = [
    "CGDFKD",
    "CMI",
    "DAFL",
    "DFAD",
    "DFQ",
    "NAYER",
    "OOD",
    "SOURCES",
    "ZSKT",
    "Batch",
    "Choi",
    "CleanKD",
    "DeepInversion",
    "FastDFKD",
    "Mixed",
    "Source",
]
