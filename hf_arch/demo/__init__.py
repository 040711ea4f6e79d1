"""`hf-arch demo`: from text to a merged checkpoint in a few minutes on two cores. It starts in `run.py`."""
