"""Builds or loads the demo model's Triton kernels; run by ``test_other_versions.py`` under several interpreters.

    python kernels_of_demo.py build|load BUNDLE TARGET FOLDER

``build`` writes the kernels to BUNDLE. ``load`` unpacks BUNDLE into FOLDER and takes every kernel that a start needs
from there; one that is missing is an error. Prints one JSON document.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

from graphserve.artifacts import ArtifactStore
from graphserve.artifacts.bundle import export_bundle, import_bundle
from graphserve.compiler.warmup_kernels import triton_kernels
from graphserve.config import EngineConfig
from graphserve.demo import demo_path
from graphserve.kernels.triton.compiled import TRITON_VERSION, find_compiled, find_or_compile_kernels
from graphserve.runtime.cubin import kernel_parameters
from graphserve.runtime.find_plan import find_or_compile_config


def main(action: str, bundle: Path, target: str, folder: Path) -> None:
    config = EngineConfig()
    if action == "load":
        import_bundle(bundle, ArtifactStore(folder))
    # A plan depends on torch and transformers: each interpreter makes its own.
    plan = find_or_compile_config(config, demo_path(), ArtifactStore(folder)).compiled.plan
    kernels = {kernel.key: kernel for kernel in triton_kernels(plan, config, target)}
    store = ArtifactStore(folder, is_strict=action == "load")
    compiled = find_or_compile_kernels(kernels, target, store)
    if action == "build":
        export_bundle(store.artifacts("triton"), bundle)
    found = [find_compiled(store, kernel, target) for kernel in kernels.values()]
    document = {
        "kernels": len(kernels),
        "parameters": [len(kernel_parameters(kernel.binary, kernel.name)) for kernel in compiled.values()],
        "made_by": sorted({artifact.manifest.built[TRITON_VERSION] for artifact in found if artifact is not None}),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "triton")},
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
