"""Transformer Engine's Python interface on a CPU, as far as Megatron-Core's layers use it.

Where Transformer Engine is not installed and there is no GPU, Megatron finds this instead and takes the code
path that it takes on GPUs: the same layer specification, parameter names, tensor-parallel attributes, grouped
experts and fused functions. Everything is plain torch, with process groups of any backend. `interface.py`
lists which name of Transformer Engine stands where; README.md says what a CPU cannot prove.
"""
