"""Checkpoints in Hugging Face's format, of the dense Qwen3 and Qwen2.5 decoders: what their
``config.json`` says, where each tensor lies, and how one is written.

Needs json, torch and safetensors alone, and the last two only for weights. What touches megatron's
modules is in ``nemo_apo.trainer.hf_weights``.
"""
