"""The embedded host: RL of a megatron-core GPTModel on a laptop CPU or on GPUs."""
