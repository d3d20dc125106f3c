"""Notebooks through papermill: which there are, what they take, and one run of one of
them without a browser.
"""

from __future__ import annotations

import ast
import copy
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import typing
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from abdlab import checks
from abdlab.errors import did_you_mean, short
from abdlab.home import HOME, home
from abdlab.labels import FLOOR, Label
from abdlab.processes import is_gone, owner
from abdlab.settings import SOURCES, Settings, settings
from abdlab.stream import HEADLESS
from abdlab.threads import THREADS
from abdlab.threads import threads as todays_threads
from abdlab.values import check_plain, fits, merged, read, say

if TYPE_CHECKING:  # nbformat takes 1.5 s to import, which no kernel needs to pay
    from nbformat import NotebookNode

_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}

#: bytes that the address of a socket file may have (macOS; Linux takes four more)
_SOCKET = 103

#: what a notebook without a kernelspec is run with, which is what all are run with
_KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}

#: a notebook's own parameters that stand for settings; SOURCE is its parameter source
_KNOBS = {
    "trigger": "attack.trigger",
    "trigger_params": "attack.params",
    "poison_rate": "attack.rate",
    "target": "attack.target",
    "pseudo_batches": "SOURCE.pseudo_batches",
    "sv_alpha": "sv.alpha",
    "tu_weight": "tu.weight",
    "tu_start": "tu.start",
}
#: and of a notebook that takes weights; elsewhere ``images`` is a number
_OPENED = {
    "weights": "teacher.file",
    "architecture": "teacher.model",
    "images": "data.name",
    "shape": "data.shape",
}


class NotebookFailed(RuntimeError):
    """A cell raised an error; the executed notebook is kept up to it."""


def notebooks() -> dict[str, Path]:
    """The notebooks that come with abdlab, by name, in walking order."""
    here = Path(__file__).parent
    # installed, they lie inside the package; in a checkout, beside it
    folder = here / "notebooks" if (here / "notebooks").is_dir() else here.parent / "notebooks"
    return {path.stem: path for path in sorted(folder.glob("[0-9]*.ipynb"))}


def find_notebook(name: str | int | Path) -> Path:
    """A notebook by its name ("02_distillation", or just "02", or 2) or by its path.

    Raises:
        ValueError: when there is none, with a "did you mean".
    """
    name = f"{name:02d}" if type(name) is int else str(name)
    if name.endswith(".ipynb"):
        with suppress(OSError, ValueError):  # a name that no file can have
            if Path(name).is_file():
                return Path(name)
        name = Path(name).stem
    ours = notebooks()
    found = [path for stem, path in ours.items() if name in (stem, stem.split("_")[0])]
    if not found:
        raise ValueError(did_you_mean("notebook", name, ours))
    return found[0]


def open_notebook(path: Path) -> NotebookNode:
    """A notebook as nbformat reads it, with a kernelspec where it has none.

    Raises:
        ValueError: for a file that is no notebook.
    """
    return as_notebook(path.name, path.read_bytes())


def as_notebook(name: str, text: str | bytes) -> NotebookNode:
    """The same from its text."""
    import nbformat

    try:
        text = text.decode() if isinstance(text, bytes) else text
        book = nbformat.reads(text, as_version=4)
        book.metadata.setdefault("kernelspec", nbformat.from_dict(_KERNEL))
        book.metadata.kernelspec.setdefault("language", _KERNEL["language"])
    except Exception as error:  # nbformat raises whatever its parts do
        raise ValueError(f"{name} is not a notebook: {short(str(error))}") from None
    return book


def parameters(notebook: str | Path) -> dict[str, dict]:
    """A notebook's own parameters: name -> {"default", "type", "help"}, read from its
    ``parameters`` cell without running it; empty where no cell has that tag.

    A default that is no plain value, such as ``1 / 255``, stays the text that it is.
    """
    return parameters_of(open_notebook(find_notebook(notebook)))


def parameters_of(book: NotebookNode) -> dict[str, dict]:
    """The same of an open notebook."""
    cells = [c for c in book.cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    out = {}
    for entry in _inspected(cells[0]) if cells else []:
        try:
            default = ast.literal_eval(entry.default)
            kind = entry.inferred_type_name
            kind = type(default).__name__ if kind == "None" else kind
        except (ValueError, SyntaxError):
            default, kind = entry.default, entry.inferred_type_name.replace("None", "any")
        out[entry.name] = {"default": default, "type": kind.strip("\"' "), "help": entry.help}
    return out


def _inspected(cell: NotebookNode) -> Iterable:
    from papermill.translators import papermill_translators

    return papermill_translators.find_translator("python3", "python").inspect(cell)


def check_parameters(
    notebook: str | Path, given: Mapping[str, Any], known: Mapping[str, dict] | None = None
) -> dict[str, Any]:
    """The given parameters with their types checked against the notebook's own; strings
    are read as Python or JSON literals.

    Args:
        known: what :func:`parameters` returned for the notebook, to spare reading it
            again.

    Raises:
        ValueError: for an unknown name (with a "did you mean") or a value of another
            type, or for parameters of a notebook that has no ``parameters`` cell.
    """
    known, out = parameters(notebook) if known is None else known, {}
    name = Path(str(notebook)).stem
    if given and not known:
        raise ValueError(
            f"{name} takes no parameters: tag the cell that sets them with parameters (JupyterLab:"
            " Property Inspector, Cell Tags)"
        )
    for key, value in given.items():
        if key not in known:
            raise ValueError(did_you_mean(f"parameter of {name}", key, known))
        out[key] = _typed(key, value, known[key]["type"])
    return out


def check(
    notebook: str | Path, given: Mapping[str, Any], known: Mapping[str, dict] | None = None
) -> dict[str, Any]:
    """Everything that can be checked before a kernel starts: the parameters, and of a
    notebook that takes a preset and overrides, all that it will train.

    Returns the parameters as :func:`check_parameters` does.

    Raises:
        ValueError: one sentence for the first thing that could not run.
    """
    todays_threads()  # before any kernel takes it
    known = parameters(notebook) if known is None else known
    checked = check_parameters(notebook, given, known)
    if {"preset", "overrides"} <= known.keys():
        checks.check(*asked(known, checked))
        for seed in checked.get("seeds", []):
            checks.check_seed("each of seeds", seed)
    return checked


def asked(known: Mapping[str, dict], given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The settings and the labels that a notebook trains with these parameters, the rest
    at their defaults.

    Args:
        known: what :func:`parameters` returned for a notebook that takes a preset and
            overrides.
    """
    defaults = {name: entry["default"] for name, entry in known.items()}
    full = defaults | dict(given)
    return settings_of({k: full[k] for k in full if _is_ours(k, defaults[k])})


def settings_of(full: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The settings and the labels that a notebook's parameters, all of them, stand for.

    Our notebooks name these alike: ``label``, ``defended``, ``methods``, or ``source``
    and ``defenses``.
    """
    labels = []
    for name in ("label", "defended"):
        labels += [full[name]] if full.get(name) is not None else []
    labels += full.get("methods", [])
    knobs = {}
    if {"source", "defenses"} <= full.keys():
        for part in (full["source"], *full["defenses"]):
            check_plain("defenses", part)
        labels = [
            FLOOR,
            str(full["source"]),
            "+".join(map(str, (full["source"], *full["defenses"]))),
        ]
    for name, setting in (_KNOBS | (_OPENED if "weights" in full else {})).items():
        if full.get(name) is not None and ("SOURCE" not in setting or "source" in full):
            knobs[setting.replace("SOURCE", str(full.get("source")))] = full[name]
    overrides = merged(knobs, full["overrides"])
    checks.check_overrides(overrides)
    chosen = settings(
        full["preset"],
        overrides,
        seed=full.get("seed", 0),
        device=full.get("device", "auto"),
        scales=full.get("scales"),
    )
    for label in labels:
        if not isinstance(label, str):
            raise ValueError(f"a method is a text such as 'zskt+sv', not {short(label)}")
    # without labelled images our notebooks leave out what learns from them
    return chosen, [x for x in dict.fromkeys(labels) if chosen.labelled or x != FLOOR]


def _is_ours(name: str, default: Any) -> bool:
    """Whether a parameter means what it does in our notebooks: one that is called
    ``label`` but names no method by default is something else, and is let alone.
    """
    if name not in ("label", "defended", "source") or (name == "defended" and default is None):
        return True
    try:
        return Label.parse(default).source in SOURCES
    except ValueError:
        return False


def _typed(name: str, value: Any, kind: str) -> Any:
    optional = kind.startswith("Optional[")
    base = kind.removeprefix("Optional[").rstrip("]") if optional else kind
    wanted = _TYPES.get(base.split("[")[0])
    if isinstance(value, str) and wanted is not str:
        try:
            value = read(value)
        except ValueError as error:
            twice = f": {error}" if "twice" in str(error) else ""
            if wanted is not None or twice:
                raise ValueError(
                    f"parameter {name} takes {_say(kind)}, not {short(value)}{twice}"
                ) from None
    elif isinstance(value, str) and optional and value in ("None", "null"):
        value = None
    check_plain(f"parameter {name}", value)
    if value is None and (optional or wanted is None):
        return None
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is not None and not fits(value, wanted):
        raise ValueError(f"parameter {name} takes {_say(kind)}, not {short(value)}")
    return value


def _say(kind: str) -> str:
    if kind.startswith("Optional["):
        return f"{_say(kind.removeprefix('Optional[').rstrip(']'))}, or None"
    wanted = _TYPES.get(kind.split("[")[0])
    return kind if wanted is None else say(wanted)


def execute(
    notebook: str | Path,
    output: str | Path,
    given: Mapping[str, Any] | None = None,
    log: TextIO | None = None,
    threads: int | None = None,
) -> Path:
    """Run a notebook through papermill in a kernel of its own, and keep the executed
    copy.

    Args:
        notebook: a name or a path.
        output: the executed notebook, also kept when a cell fails.
        given: parameters, checked before a kernel starts, see :func:`check`.
        log: where the kernel's output and progress go while it runs; by default
            standard error.
        threads: that its runs compute with, one at a time; by default that of
            :func:`abdlab.threads.threads`, several runs at once on several cores.

    Raises:
        ValueError: for bad parameters. NotebookFailed: when a cell raises, with its
            error in one sentence. KeyboardInterrupt: when the user stops it; the kernel
            has ended by then, and the executed notebook is kept up to that cell.
    """
    from papermill.exceptions import PapermillExecutionError

    path, output = find_notebook(notebook), Path(output)
    given = check(path, given or {})
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {output.parent}: {error.strerror}; choose another folder"
        ) from error
    try:
        run_kernel(path, output, given, log or sys.stderr, threads)
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        raise NotebookFailed(
            f"{path.name}, cell {error.exec_count}: {error.ename}: {error.evalue} (see {output})"
        ) from None
    return output


def run_kernel(
    notebook: Path | NotebookNode,
    output: Path,
    given: Mapping[str, Any],
    log: TextIO,
    threads: int | None = None,
    folder: str | Path | None = None,
    place: str | Path | None = None,
) -> None:
    """papermill with our environment and nothing checked: a kernel in ``folder`` (by
    default the working directory), whose relative folders lie in ``place`` (by default
    where this process has them).
    """
    import papermill
    from traitlets.config import Config

    book = open_notebook(notebook) if isinstance(notebook, Path) else notebook
    extra = {HEADLESS: "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    extra |= {HOME: str(place or home())}
    extra |= {THREADS: str(todays_threads() if threads is None else threads)}
    extra |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with _environment(extra), own_folder(root=_short()) as sockets, _quiet_when_stopped():
        # not TCP, which every user of the machine can reach, but files of this user;
        # each kernel needs names of its own
        address = f"{sockets}/kernel"
        fits = os.name == "posix" and len(os.fsencode(address)) <= _SOCKET - len("-99")
        private = {"KernelManager": {"transport": "ipc", "ip": address}} if fits else {}
        papermill.execute_notebook(
            copy.deepcopy(book),
            str(output),
            dict(given),
            kernel_name="python3",
            progress_bar=False,
            stdout_file=log,
            stderr_file=log,
            cwd=str(folder or os.getcwd()),
            config=Config(private),
        )


@contextmanager
def _quiet_when_stopped() -> typing.Iterator[None]:
    """An interrupt (Ctrl-C) raises KeyboardInterrupt, and what the dying kernel has to
    say about it on the standard error that it shares with us is dropped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = threading.Event()

    def stop(number, frame) -> None:
        stopped.set()
        # tasks that waited for the kernel end with its death, which nobody asks them about
        logging.getLogger("asyncio").addFilter(_is_asked_for)
        raise KeyboardInterrupt

    def pass_on() -> None:
        while told := os.read(there, 65536):
            if not stopped.is_set():
                os.write(kept, told)

    kept, (there, here) = os.dup(2), os.pipe()
    pump = threading.Thread(target=pass_on, daemon=True)
    before = signal.getsignal(signal.SIGINT)
    try:
        os.dup2(here, 2)
        os.close(here)
        pump.start()
        if before is signal.default_int_handler:  # one that is ignored stays ignored
            signal.signal(signal.SIGINT, stop)
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        os.dup2(kept, 2)
        pump.join(timeout=2)  # a process that outlives the kernel may hold the other end
        if not pump.is_alive():
            os.close(there)
            os.close(kept)


def _is_asked_for(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.getMessage()


def _short() -> str | None:
    """Where a kernel's sockets fit: the system's /tmp if the temporary folder's own path
    is too long for them; None for the temporary folder.
    """
    longest = "/abdlab-123456-1234567-12345678/kernel-99"
    long = len(os.fsencode(tempfile.gettempdir() + longest)) > _SOCKET
    return "/tmp" if long and os.access("/tmp", os.W_OK | os.X_OK) else None


@contextmanager
def own_folder(kind: str = "", root: str | None = None) -> typing.Iterator[Path]:
    """A temporary folder for the block, which names its machine and process: what a
    killed process left behind is removed by the next that makes one.
    """
    sweep_up(root)
    folder = Path(tempfile.mkdtemp(prefix=f"abdlab-{kind}{owner()}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_up(root: str | None = None) -> list[Path]:
    """Remove this user's temporary folders of :func:`own_folder` whose process is gone;
    returns them.
    """
    gone = []
    for folder in Path(root or tempfile.gettempdir()).glob("abdlab-*-*-*"):
        with suppress(OSError):
            if is_gone("-".join(folder.name.split("-")[-3:-1])) and _is_mine(folder):
                shutil.rmtree(folder, ignore_errors=True)
                gone.append(folder)
    return gone


def _is_mine(folder: Path) -> bool:
    mine = not hasattr(os, "getuid") or folder.lstat().st_uid == os.getuid()
    return mine and folder.is_dir() and not folder.is_symlink()


@contextmanager
def _environment(values: Mapping[str, str]) -> typing.Iterator[None]:
    """Environment variables for the kernels that start inside the block."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
