"""Grading of completions by code that may fail in any way, in killable worker processes.

    Grading (trainer) -> WorkerPool -> supervisor process -> forked process that calls the grader

The trainer talks to one supervisor per worker over pipes. A supervisor never runs foreign code: it
forks the process that does, hands it one sample at a time, and kills it with everything it has
started when a limit is passed. What comes back is a fixed record of numbers, never a pickle.
Nothing here imports torch.
"""

from nemo_apo.grading.outcome import REASONS, Grade
from nemo_apo.grading.pool import GradingBroken
from nemo_apo.grading.service import Grading
from nemo_apo.grading.settings import GradingSettings, Sample
from nemo_apo.grading.shaping import Shaping

__all__ = ["REASONS", "Grade", "Grading", "GradingBroken", "GradingSettings", "Sample", "Shaping"]
