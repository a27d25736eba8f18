"""How good a model is, and how far from another one."""

from __future__ import annotations

from .job import EvaluationJob, Findings, run_evaluation
from .measures import Divergence, Evaluation, evaluate

__all__ = ["Divergence", "Evaluation", "EvaluationJob", "Findings", "evaluate", "run_evaluation"]
