"""Where relative folders lie: one place, whichever way abdlab was started."""

from __future__ import annotations

import os
from pathlib import Path

#: environment variable that names the place itself
HOME = "ABDLAB_HOME"


def home() -> Path:
    """The absolute folder that relative ones (``runs/walk``, ``data``) begin in.

    In this order: what the environment variable ABDLAB_HOME names; the clone of abdlab
    that the working directory lies in (a folder with notebooks/ and abdlab's
    pyproject.toml); the working directory. So ``abdlab run`` in a clone, JupyterLab's
    kernel in its notebooks/ and papermill write to the same runs/.

    >>> home().is_absolute()
    True
    """
    if named := os.environ.get(HOME):
        return Path(named).expanduser().absolute()
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if _is_clone(folder)), here)


def at_home(path: str | Path) -> Path:
    """A path as it is when absolute (``~`` is the user's folder), else below
    :func:`home`.
    """
    return home() / Path(path).expanduser()


def there(path: str | Path) -> Path:
    """An existing folder that a command names: as the shell sees it when it is there,
    else below :func:`home`.
    """
    seen = Path(path).expanduser()
    return seen.absolute() if seen.exists() else at_home(path)


def _is_clone(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    try:
        return (folder / "notebooks").is_dir() and 'name = "abdlab"' in project.read_text()
    except (OSError, UnicodeDecodeError):
        return False
