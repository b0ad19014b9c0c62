"""What can be refused before torch is imported and anything of the model is read. No torch here."""

from __future__ import annotations

from pathlib import Path

from graphserve.artifacts import open_store
from graphserve.config import EngineConfig
from graphserve.models.generation_config import check_generation_options
from graphserve.models.hub import resolve_model
from graphserve.models.progress import Progress, no_progress


def find_model(config: EngineConfig, progress: Progress = no_progress) -> Path:
    """The model's folder, downloaded if need be; options that are wrong whatever the model are refused before that.

    Args:
        progress: told of downloaded bytes.

    Raises:
        ConfigError: there is no such model, compile cache or generation config, or a sampling default is not allowed.
    """
    open_store(config.compile_cache)
    check_generation_options(config.generation_config, config.override_generation_config)
    folder = resolve_model(config.model, config.revision, config.download_dir, config.hf_token, progress)
    check_generation_options(config.generation_config, config.override_generation_config, folder)
    return folder
