"""What the machine is, and what Megatron-Core needs to run on it.

`base.build_platform` is called once per process, before any Megatron module is used. This file imports
nothing, because the package itself imports from this room when it is first imported.
"""
