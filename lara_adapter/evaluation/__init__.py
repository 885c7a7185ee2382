"""Closed-loop evaluation: a served policy acts in a simulator, and its successes are counted.

The simulators are in `lara_adapter.integrations.simulators`; the command is `lara eval`.
"""

from .chunking import ChunkExecutor
from .environment import Environment, Observation, Simulator
from .report import wilson_interval
from .rollout import Rollouts

__all__ = ["ChunkExecutor", "Environment", "Observation", "Rollouts", "Simulator", "wilson_interval"]
