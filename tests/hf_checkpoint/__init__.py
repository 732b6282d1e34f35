"""Checkpoints in Hugging Face's format, without megatron."""
