"""Tests of the NeMo-Aligner hosts; those that need one run its real actors on a CPU."""
