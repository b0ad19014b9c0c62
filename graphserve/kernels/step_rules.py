"""What every implementation of a step's two ends agrees on, without torch."""

from __future__ import annotations

STOPPED = -1  # "last token" of a lane that has ended
