"""Every example of a docstring runs, and every public source has one."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import abdlab
from abdlab.sources import SOURCES, Batch, Source
from abdlab.sources.generated import Generated
from abdlab.sources.pooled import Pooled

#: modules whose examples are sketches: they name a teacher and images that are not there
SKETCHES: set[str] = set()


def modules():
    """Names of all modules with an example that is meant to run."""
    names = []
    found = pkgutil.walk_packages(abdlab.__path__, "abdlab.")
    for name in (module.name for module in found):
        if name not in SKETCHES:
            source = importlib.util.find_spec(name).loader.get_source(name)
            if ">>>" in source:
                names.append(name)
    return names


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0, "the report above says which"


@pytest.mark.parametrize("public", [Generated, Pooled, Source, Batch, *SOURCES.values()])
def test_every_source_has_an_example_and_few_words(public):
    assert ">>>" in public.__doc__
    assert len(public.__doc__.split()) <= 200
