"""The model that ships with graphserve and is served when no model is named."""

from __future__ import annotations

from pathlib import Path


def demo_path() -> Path:
    """Return the folder that holds the demo checkpoint, in the layout of a Hugging Face model folder."""
    return Path(__file__).resolve().parent
