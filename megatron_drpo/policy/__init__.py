"""The policy on Megatron-Core: process groups, model, schedules, optimizer, logprobs."""
