"""megatron-core plumbing: layout, log-probs, forward and backward, gathering; no objectives."""
