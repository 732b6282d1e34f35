"""Tests of the NeMo-RL host; those that need it run its real code on a CPU."""
