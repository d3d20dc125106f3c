"""What many tests share: one thread, tiny networks on real digits of 8x8 pixels, and a
reason for every skipped GPU test.
"""

import os
import sys

# the tests' own kernels and processes share the cores with the other workers
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# the package is imported where it is used: coverage of a worker begins after this file

#: files whose tests run whole notebooks, studies or browsers: they begin first, so that
#: no worker is left alone with one
LONG = ("test_sweep.py", "test_browser.py", "test_widgets.py", "test_notebooks.py")


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are cores: a test that waits for a browser, a kernel or a
    cluster leaves its core to another.
    """
    return 1 + (yield)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    from abdlab import pick_device

    # here, and not in pyproject.toml, which would import the package before coverage begins
    loud = pytest.mark.filterwarnings("error::abdlab.defenses.VaccineNotFound")
    for item in items:
        item.add_marker(loud, append=False)
    if pick_device("auto").type == "cpu":
        skip = pytest.mark.skip(reason="needs a GPU, and torch sees none on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):  # not a folder of that name
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks are fastest on one thread, and sums then have one order."""
    torch.set_num_threads(1)


@pytest.fixture
def here(monkeypatch, capsys):
    """The command line in this process, which saves the seconds of an import: (exit
    code, standard output, standard error).
    """
    # the core's tests do without the command line and what it needs
    from rich.console import Console

    from abdlab import cli

    def call(*arguments, columns=160):
        monkeypatch.setattr(cli, "console", Console(width=columns))
        monkeypatch.setattr(sys, "argv", ["abdlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def double():
    """Everything that a test makes is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def digits():
    """200 training and 100 test digits, 1x8x8."""
    from abdlab import load

    return load("digits", size=8, device="cpu").subset(train=200, test=100)


def tiny(name="wrn-10-1", seed=0, classes=10, channels=1, width=4):
    """A tiny Wide-ResNet in eval mode whose batch-norm layers have seen data, so that
    eval and train mode differ.
    """
    from abdlab import build

    model = build(name, classes=classes, channels=channels, width=width, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(
                    0.5 + torch.rand(module.weight.shape, generator=rng, dtype=dtype)
                )
                module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=rng, dtype=dtype))
                module.running_mean.copy_(
                    0.3 * torch.randn(module.bias.shape, generator=rng, dtype=dtype)
                )
                module.running_var.copy_(
                    0.5 + torch.rand(module.bias.shape, generator=rng, dtype=dtype)
                )
    return model.eval()


@pytest.fixture
def wrn():
    """Makes tiny Wide-ResNets: ``wrn("wrn-16-1", seed=1)``."""
    return tiny


@pytest.fixture
def teacher():
    return tiny(seed=1)


@pytest.fixture
def student():
    return tiny(seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the module's JupyterLab works."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(folder):
    """The address of a JupyterLab in ``folder``."""
    from lab import lab_server

    with lab_server(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    from chromium import CHROMIUM

    found = pytest.importorskip("playwright.sync_api")
    with found.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
