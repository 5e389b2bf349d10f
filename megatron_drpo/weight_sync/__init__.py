"""From the policy to the rollout servers: HF-named weights in buckets, verified by a checksum."""
