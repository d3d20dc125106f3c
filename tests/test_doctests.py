"""Every example of a docstring runs, and every public source has one."""

import doctest
import importlib
import pkgutil

import pytest

import abdlab
from abdlab.sources import SOURCES, Batch, Source

#: modules whose examples are sketches: they name a teacher and images that are not there
SKETCHES = {"abdlab.features", "abdlab.attacks.optimize", "abdlab.attacks.triggers"}


def modules():
    found = pkgutil.walk_packages(abdlab.__path__, "abdlab.")
    for name in (module.name for module in found):
        if not name.startswith("abdlab.widgets") and name not in SKETCHES:
            source = importlib.util.find_spec(name).loader.get_source(name)
            if ">>>" in source:
                yield name


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0, "the report above says which"


@pytest.mark.parametrize("public", [Source, Batch, *SOURCES.values()])
def test_every_source_has_an_example_and_few_words(public):
    assert ">>>" in public.__doc__
    assert len(public.__doc__.split()) <= 200
