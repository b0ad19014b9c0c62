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

    A folder that may only be read serves what is in it. One that cannot even be made is replaced by one of this
    process's own, so that a read-only home stops nobody.
    """
    named = os.environ.get("GRAPHSERVE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(named) if named else Path(home) / "graphserve"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return own_folder()
    return folder


def remove_own_folder() -> None:
    """Delete this process's own folder, if there is one. Python's end calls this, and who ends with ``os._exit``."""
    if own_folder.cache_info().currsize:
        shutil.rmtree(own_folder(), ignore_errors=True)
        own_folder.cache_clear()


@cache
def own_folder() -> Path:
    """A folder of this process, deleted when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="graphserve-"))
    atexit.register(remove_own_folder)
    return folder
