"""An RL training backend for large mixture-of-experts language models."""

from megatron_drpo.platform.te_cpu.finder import offer

# Megatron asks for Transformer Engine when it is imported, and remembers the answer.
offer()
