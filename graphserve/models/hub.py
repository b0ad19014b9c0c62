"""Where a model lies: a local folder, the embedded demo, or a Hugging Face hub id that is downloaded."""

from __future__ import annotations

import fnmatch
import logging
from pathlib import Path
from typing import Any

from graphserve.errors import ConfigError
from graphserve.models.checkpoint import PICKLE_SUFFIXES
from graphserve.models.progress import Progress, no_progress

logger = logging.getLogger(__name__)

DEMO_NAME = "demo"

# Small files first: config and tokenizer say whether the model can be served before gigabytes are fetched.
CONFIG_PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*.safetensors.index.json",
]
WEIGHT_PATTERNS = ["*.safetensors"]
# consolidated*.safetensors and original/ hold the same weights a second time, under other names.
IGNORE_PATTERNS = ["*.py", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES), "original/*", "consolidated*", "adapter_*"]


def resolve_model(
    name: str,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    token: str | bool | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Return the folder that holds a model's config, tokenizer and weights.

    Args:
        name: ``"demo"``, a folder, or a hub id ``owner/name``. A folder wins over a hub id of the same name.
        revision: branch, tag or commit on the hub. Not allowed for a folder or the demo.
        download_dir: cache folder for downloads (None: huggingface_hub's own).
        token: access token (None: the stored one, False: none).
        progress: told of downloaded bytes.

    Raises:
        ConfigError: nothing was found under the name; says what was tried and what to do.
    """
    folder = Path(name).expanduser()
    if name == DEMO_NAME and not folder.is_dir():
        from graphserve.demo import demo_path

        _refuse_revision(name, revision)
        return Path(demo_path())
    if folder.is_dir():
        _refuse_revision(name, revision)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model folder {name!r} has no config.json: give the folder that holds config.json, tokenizer and "
                "*.safetensors"
            )
        return folder
    if not _is_hub_id(name):
        raise ConfigError(
            f"model {name!r} was not found: tried the folder {str(folder)!r} (does not exist), and it is not a hub id "
            "(owner/name). Give an existing folder, a hub id, or 'demo' for the embedded model"
        )
    return _download(name, revision, download_dir, token, progress)


def resolve_config(name: str, token: str | bool | None = None) -> Path:
    """The folder with a model's config.json; downloads nothing but configuration.

    Raises:
        ConfigError: there is no such folder or hub id, or it has no config.json.
    """
    folder = Path(name).expanduser()
    if name == DEMO_NAME or folder.is_dir() or not _is_hub_id(name):
        return resolve_model(name)
    folder = _snapshot(name, CONFIG_PATTERNS, None, None, token, no_progress)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name!r} has no config.json on the hub: it is not a transformers checkpoint")
    return folder


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(
            f"revision={revision!r} was given for {name!r}, which is not a hub id: drop revision, or give owner/name"
        )


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _download(
    name: str,
    revision: str | None,
    download_dir: str | Path | None,
    token: str | bool | None,
    progress: Progress,
) -> Path:
    """Fetch configuration, refuse what cannot be served, then fetch the weights."""
    from graphserve.models.config import check_servable, read_config_json

    def fetch(patterns: list[str]) -> Path:
        return _snapshot(name, patterns, revision, download_dir, token, progress)

    folder = fetch(CONFIG_PATTERNS)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name!r} has no config.json on the hub: it is not a transformers checkpoint")
    check_servable(read_config_json(folder))
    folder = fetch(CONFIG_PATTERNS + WEIGHT_PATTERNS)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(_no_weights_message(name, folder, revision, token))
    return folder


def _snapshot(
    name: str,
    patterns: list[str],
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    progress: Progress,
) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reporter = _DownloadReporter(f"download {name}", progress)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=patterns,
            ignore_patterns=IGNORE_PATTERNS,
            tqdm_class=reporter.tqdm_class(),
        )
        reporter.finish()
        return Path(folder)
    except GatedRepoError as error:
        raise ConfigError(
            f"{name!r} is gated on the hub: accept its terms on its page, then set HF_TOKEN or pass hf_token"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{name!r} has no revision {revision!r} on the hub: give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model {name!r} was not found: tried the folder {name!r} (does not exist) and the hub (no such "
            "repository, or a private one: set HF_TOKEN or pass hf_token)"
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, so nothing was downloaded: unset it once, or download the model elsewhere"
        else:
            reason = "and the hub could not be reached: check the network, or set HF_HUB_OFFLINE=1 once it is cached"
        raise ConfigError(
            f"model {name!r} (revision {revision or 'main'!r}) is not in the local cache "
            f"{str(cache_dir or constants.HF_HUB_CACHE)!r}; {reason}; or give a local folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"downloading {name!r} from the hub failed: {error}") from error


def _no_weights_message(name: str, folder: Path, revision: str | None, token: str | bool | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        files = HfApi(token=token).list_repo_files(name, revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return (
            f"{name!r} has no *.safetensors weights in the local cache ({folder}), and the hub could not be asked: "
            "unset HF_HUB_OFFLINE and check the network, or give a local folder"
        )
    pickles = [file for file in files if any(fnmatch.fnmatch(file, f"*{suffix}") for suffix in PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{name!r} has only pickle weights ({', '.join(pickles[:3])}), which can run code when opened and are "
            "never loaded; allowed: *.safetensors. Look for a revision with safetensors (often refs/pr/1, from the "
            "hub's conversion bot), or convert it once with transformers' save_pretrained in a place you trust"
        )
    return f"{name!r} has no *.safetensors weights on the hub (files: {', '.join(files[:8])})"


class _DownloadReporter:
    """Turns the progress bars of one download into reports.

    huggingface_hub shows the same bytes in several bars (received, written) whose totals grow as files are found; the
    furthest one counts. The last report, which ends the phase, is held back until the download is over.
    """

    def __init__(self, phase: str, progress: Progress) -> None:
        self._phase = phase
        self._progress = progress
        self._done = 0
        self._total = 0

    def update(self, done: float, total: float) -> None:
        self._done, self._total = max(self._done, int(done)), max(self._total, int(total))
        if self._total:
            self._progress(self._phase, min(self._done, self._total - 1), self._total)

    def finish(self) -> None:
        if self._total:
            self._progress(self._phase, self._total, self._total)

    def tqdm_class(self) -> type:
        """A class for ``snapshot_download(tqdm_class=...)`` that draws nothing."""
        from tqdm.auto import tqdm

        reporter = self

        class ReportingTqdm(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs.pop("name", None)  # huggingface_hub's own extension of the signature
                self._counts_bytes = kwargs.get("unit") == "B"
                super().__init__(*args, **{**kwargs, "disable": False, "gui": False})

            def display(self, *args: Any, **kwargs: Any) -> None:
                return None

            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                if self._counts_bytes and self.total:
                    reporter.update(self.n, self.total)
                return shown

        return ReportingTqdm
