"""What reads and writes a chunk of logits: one interface, one module per backend."""
