"""As which version of Transformer Engine the stand-in behaves."""

from __future__ import annotations

import os

from packaging.version import Version

from megatron_drpo.platform.te_cpu.interface import DEFAULT_VERSION, VERSION_VARIABLE

VERSION = os.environ.get(VERSION_VARIABLE, DEFAULT_VERSION)

MARKS_EXPERT_WEIGHTS = Version(VERSION) < Version("2.13")
"""Grouped weights get Megatron's tensor-parallel attributes whatever the layout; since 2.13 not any more.

https://github.com/NVIDIA/Megatron-LM/issues/5916
"""
