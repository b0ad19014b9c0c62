"""``graphserve serve`` over a real model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class ServeProcess:
    """``graphserve serve MODEL`` as a process; ``stderr`` grows as it writes.

    Args:
        path: a folder that the process finds modules in before the repository.
        environment: further variables.
    """

    def __init__(self, model: str, *options: str, path: Path | None = None, **environment: str) -> None:
        command = [sys.executable, "-m", "graphserve", "serve", model, "--port", "0", *options]
        modules = os.pathsep.join(str(folder) for folder in (path, REPOSITORY) if folder is not None)
        environment = {**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.stderr = ""
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self, timeout_s: float = 240.0) -> str:
        """The server's address."""
        assert self._is_ready.wait(timeout_s), self.stderr
        found = re.search(r"serving .* on (http://\S+)", self.stderr)
        assert found, f"the server did not start:\n{self.stderr}"
        return found[1]

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        status = self.process.wait(60)
        self._reader.join(10)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.stderr += line
                if line.startswith("try: "):
                    self._is_ready.set()
        self._is_ready.set()
