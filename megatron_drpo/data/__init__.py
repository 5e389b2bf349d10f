"""Prompts: from a JSONL file to seeded batches with a resumable cursor."""
