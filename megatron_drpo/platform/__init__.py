"""What the machine is, and what Megatron-Core needs to run on it.

`build_platform` is called once per process, before any Megatron module is used.
"""

from megatron_drpo.platform.base import Platform, build_platform

__all__ = ["Platform", "build_platform"]
