"""Where compiled artifacts are kept between runs."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path


def cache_dir() -> Path:
    """``$GRAPHSERVE_CACHE``, else ``$XDG_CACHE_HOME/graphserve``, else ``~/.cache/graphserve``.

    A folder that cannot be made or written is replaced by one of this process's own, so that a read-only home stops
    nobody; it is deleted when the process ends.
    """
    named = os.environ.get("GRAPHSERVE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(named) if named else Path(home) / "graphserve"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _own_folder()


def remove_own_folder() -> None:
    """Delete this process's own folder, if there is one. Python's end calls this, and who ends with ``os._exit``."""
    if _own_folder.cache_info().currsize:
        shutil.rmtree(_own_folder(), ignore_errors=True)
        _own_folder.cache_clear()


@cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="graphserve-"))
    atexit.register(remove_own_folder)
    return folder
