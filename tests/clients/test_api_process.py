"""What the API process of ``graphserve serve`` must not import, over a model whose tokenizer has to be converted."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import pytest
from clients.serve_process import ServeProcess

from graphserve.models.tokenizer import load_tokenizer

# Every Python process imports a module of this name; it refuses torch and transformers to all but the engine process.
SITECUSTOMIZE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            raise ImportError("the API process imported " + name)
if "serve" in sys.orig_argv:
    sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.full
def test_a_converted_tokenizer_that_no_store_takes_is_converted_by_the_engine_alone(
    shared_models: Path, tmp_path: Path
) -> None:
    original = shared_models / "stories260K"
    model = shutil.copytree(original, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    no_folder = tmp_path / "file" / "cache"
    no_folder.parent.touch()  # so that each process has a cache of its own, for as long as it lives
    server = ServeProcess(str(model), path=tmp_path, GRAPHSERVE_CACHE=str(no_folder))
    try:
        prompt = "Once upon a time, é"
        body = json.dumps({"prompt": prompt, "max_tokens": 4}).encode()
        url = server.wait_until_ready() + "/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            usage = json.load(response)["usage"]
        assert usage["prompt_tokens"] == len(load_tokenizer(original).encode(prompt))
        assert server.stop() == 0, server.stderr
    finally:
        server.process.kill()
        server.process.wait(10)
