"""A model's weights, wherever they lie: in HF files, in checkpoints, sharded over ranks. Knows no family."""
