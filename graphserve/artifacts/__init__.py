"""Compiled artifacts on disk: a store that is checked, shared between processes and portable. Imports no torch."""

from graphserve.artifacts.location import open_store
from graphserve.artifacts.store import Artifact, ArtifactStore

__all__ = ["Artifact", "ArtifactStore", "open_store"]
