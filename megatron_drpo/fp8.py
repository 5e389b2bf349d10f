"""The one FP8 block quantiser."""
