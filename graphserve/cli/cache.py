"""``graphserve cache``: look at stored artifacts, check, delete, move and compare them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphserve.artifacts.store import KINDS
from graphserve.errors import ConfigError
from graphserve.progress import format_bytes

if TYPE_CHECKING:
    from graphserve.artifacts import Artifact, ArtifactStore


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Declare the command, its actions and their flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "cache",
        help="list, check, prune, export, import and compare compiled artifacts",
        description="Compiled artifacts: plans, weight programs, tokenizers, C++ libraries, GPU kernels and tables of "
        "measured choices.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))
    for name, run_action, text in (
        ("ls", _ls, "list what is stored"),
        ("verify", _verify, "compare every file with its checksum; exit status 1 if one differs"),
        ("prune", _prune, "delete what was not used for longest, and what was found damaged"),
        ("export", _export, "write artifacts to one file"),
        ("import", _import, "add the artifacts of a file"),
        ("diff", _diff, "name what differs between two stores, or between a store and this installation"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.set_defaults(run=run_action)
        if name in ("export", "import"):
            action.add_argument("file", type=Path, metavar="FILE", help="a .tar.zst file")
        if name == "diff":
            action.add_argument("first", metavar="STORE", help="folder or .tar.zst file")
            action.add_argument("second", nargs="?", metavar="OTHER", help="another (default: this installation)")
        else:
            kinds = "folder" if name in ("import", "prune") else "folder or .tar.zst file"
            action.add_argument("--store", metavar="STORE", help=f"{kinds} (default: the user's cache)")
        if name in ("ls", "diff"):
            action.add_argument("--json", action="store_true", help="print one JSON document")
        if name == "prune":
            action.add_argument("--max-size", metavar="SIZE", help="such as 500M or 8G (default: 8G)")
        if name == "export":
            action.add_argument("--kind", action="append", choices=KINDS, help="only this kind; may be repeated")
    return parser


def _ls(options: argparse.Namespace) -> int:
    with _opened(options.store) as store:
        artifacts = list(store.artifacts())
        num_unreadable = len(list(store.folders())) - len(artifacts)
    if options.json:
        sys.stdout.write(json.dumps([_as_dict(artifact) for artifact in artifacts], indent=1) + "\n")
        return 0
    for artifact in artifacts:
        manifest = artifact.manifest
        size = format_bytes(manifest.num_bytes)
        sys.stdout.write(f"{manifest.kind:9}  {manifest.key[:12]}  {size:>10}  {manifest.label}\n")
    total = sum(artifact.manifest.num_bytes for artifact in artifacts)
    rest = f"; {num_unreadable} cannot be read (cache verify names them)" if num_unreadable else ""
    sys.stdout.write(f"{len(artifacts)} artifacts, {format_bytes(total)}, in {options.store or store.root}{rest}\n")
    return 0


def _verify(options: argparse.Namespace) -> int:
    with _opened(options.store) as store:
        results = list(store.verify())
    damaged = [(folder, reason) for folder, reason in results if reason is not None]
    for folder, reason in damaged:
        sys.stdout.write(f"damaged: {folder.parent.name} {folder.name}: {reason}\n")
    place = options.store or store.root
    sys.stdout.write(f"verified {len(results)} artifacts in {place}: {len(damaged)} damaged\n")
    return 1 if damaged else 0


def _prune(options: argparse.Namespace) -> int:
    from graphserve.artifacts.eviction import limit_bytes, parse_size, prune

    limit = parse_size(options.max_size) if options.max_size is not None else limit_bytes()
    store = _folder(options.store, must_exist=True)
    store.require_writable()
    removed = prune(store, limit, removes_damaged=True)
    freed = sum(entry.num_bytes for entry in removed)
    sys.stdout.write(f"deleted {len(removed)} artifacts, {format_bytes(freed)}, from {store.root}\n")
    return 0


def _export(options: argparse.Namespace) -> int:
    from graphserve.artifacts.bundle import export_bundle

    with _opened(options.store) as store:
        for folder, reason in store.verify():
            if reason is not None:
                raise ConfigError(f"{folder} is damaged ({reason}): warmup makes it again, cache prune deletes it")
        chosen = [a for a in store.artifacts() if options.kind is None or a.manifest.kind in options.kind]
        if not chosen:
            raise ConfigError(f"{options.store or store.root} has no such artifact: graphserve warmup fills it")
        count = export_bundle(chosen, options.file)
    sys.stdout.write(f"wrote {count} artifacts, {format_bytes(options.file.stat().st_size)}, to {options.file}\n")
    return 0


def _import(options: argparse.Namespace) -> int:
    from graphserve.artifacts.bundle import import_bundle
    from graphserve.artifacts.eviction import keep_below_limit

    store = _folder(options.store, must_exist=False)
    store.require_writable()
    count = import_bundle(options.file, store)
    keep_below_limit(store)
    sys.stdout.write(f"added {count} artifacts to {store.root}\n")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from graphserve.artifacts.comparison import compare_stores

    with _opened(options.first) as first:
        if next(first.folders(), None) is None:
            raise ConfigError(f"{options.first} has no artifacts: graphserve warmup fills a store")
        if options.second is None:
            from graphserve.runtime.installation import compare_with_installation

            differences = compare_with_installation(first)
        else:
            with _opened(options.second) as second:
                differences = compare_stores(first, second)
    if options.json:
        sys.stdout.write(json.dumps(differences, indent=1) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in differences or ["no difference"])
    return 1 if differences else 0


def _folder(place: str | None, must_exist: bool) -> ArtifactStore:
    """A store that is changed: the user's cache, or a folder."""
    from graphserve.artifacts import ArtifactStore
    from graphserve.artifacts.cache_dir import cache_dir

    root = Path(place) if place is not None else cache_dir()
    if must_exist and not root.is_dir():
        raise ConfigError(f"{place} is no folder: give that of a store")
    return ArtifactStore(root, must_keep=True)


@contextmanager
def _opened(place: str | None) -> Iterator[ArtifactStore]:
    """A store that is only read: the user's cache, a folder, or a bundle unpacked for the moment."""
    from graphserve.artifacts import ArtifactStore
    from graphserve.artifacts.bundle import import_bundle

    if place is None or Path(place).is_dir():
        yield _folder(place, must_exist=True)
        return
    if not Path(place).is_file():
        raise ConfigError(f"{place} does not exist: give a store's folder or a .tar.zst file")
    with tempfile.TemporaryDirectory(prefix="graphserve-bundle-") as folder:
        store = ArtifactStore(Path(folder), must_keep=True)
        import_bundle(Path(place), store)
        yield store


def _as_dict(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "kind": manifest.kind,
        "key": manifest.key,
        "label": manifest.label,
        "bytes": manifest.num_bytes,
        "factors": manifest.factors,
        "built": manifest.built,
    }
