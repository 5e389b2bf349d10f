"""Settings of all unit tests."""

from __future__ import annotations

from hypothesis import settings

# A deadline per example measures how busy the machine is.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
