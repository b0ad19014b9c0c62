"""Settings for tests that trace models."""

import logging

# Torch's structured trace log hands each of its records to pytest, whose capture of them takes longer than the trace.
logging.getLogger("torch.__trace").setLevel(logging.WARNING)
