"""Transformer Engine's fusible operations: Megatron names them in annotations; nothing here uses them."""

from __future__ import annotations

import torch


class FusibleOperation(torch.nn.Module):
    """See the module."""


class Sequential(torch.nn.Module):
    """See the module."""
