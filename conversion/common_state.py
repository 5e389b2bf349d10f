"""What a torch_dist checkpoint holds beside tensors: iteration, arguments and the like.

megatron-core < 0.19 writes `common.pt`; later versions an object `common_state` among the tensors.
"""

from __future__ import annotations

import argparse
import pickle
from typing import Any

import torch

from conversion.torch_dist_reader import TorchDistReader
from megatron_drpo.weights.torch_dist import COMMON_FILE

_OBJECT = "common_state/shard_0_1"


def read_common_state(reader: TorchDistReader) -> dict[str, Any]:
    """Its values by name, from whichever place; arguments as `args.NAME`.

    Only plain types and argparse's Namespace are unpickled. Of a state with others, such as Megatron-LM's
    enumerations, the reason is returned under `common state`.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if (reader.path / COMMON_FILE).is_file():
                state = torch.load(reader.path / COMMON_FILE, map_location="cpu", weights_only=True)
            elif _OBJECT in reader.objects:
                (state,) = reader.read_object(_OBJECT)
            else:
                return {"common state": "none"}
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        return {"common state": f"not readable: {str(error).partition(chr(10))[0]}"}
    if not isinstance(state, dict):
        return {"common state": f"not readable: {type(state).__name__}"}
    values: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, argparse.Namespace):
            values |= {f"args.{key}": getattr(value, key) for key in sorted(vars(value))}
        else:
            values[str(name)] = value
    return values
