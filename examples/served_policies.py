"""Policies to serve: those that the demo trained, and the simulator's scripted expert.

    lara serve examples/served_policies.py:lara_contrastive      # after `make demo`; also dit_only, frozen_lam, lara_cosine
    lara serve examples/served_policies.py:expert                # a check of the whole chain: it must succeed
    lara eval drawer-open --output outputs/evaluation            # in another terminal

A served policy is any object with `get_action(observation)`. These use GR00T's layout, for `lara eval` and GR00T's own
clients, which read the names from `get_modality_config`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lara_adapter.integrations.module_policy import seeded
from mini_vla import MiniVLA, MiniVLAConfig

from lara_adapter.serving import ModalityConfig

TASKS = ("button-press-topdown", "drawer-open")  # in the demo's order


class ServedMiniVLA:
    """A MiniVLA in GR00T's layout."""

    def __init__(self, policy: MiniVLA, tasks: tuple[str, ...] = TASKS) -> None:
        self.policy, self.tasks = policy.eval(), {task.replace("-", " "): i for i, task in enumerate(tasks)}

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """Inputs and outputs."""
        return {
            "video": ModalityConfig([0], ["front"]),
            "state": ModalityConfig([0], ["state"]),
            "action": ModalityConfig(list(range(self.policy.config.horizon)), ["action"]),
            "language": ModalityConfig([0], ["task"]),
        }

    def get_action(self, observation: dict[str, Any], options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Act; `options={"seed": int}` seeds the sampling noise.

        Args:
            observation: video "front" uint8 [B, 1, S, S, 3], state "state" float32 [B, 1, 4], language "task" [[str]] * B.
            options: see above.

        Returns:
            {"action": [B, H, 4]}
        """
        unknown = {row[0] for row in observation["language"]["task"]} - self.tasks.keys()
        if unknown:
            raise ValueError(f"this policy knows the tasks {sorted(self.tasks)}, not {sorted(unknown)}")
        with seeded(options):
            action = self.policy.get_action(
                {
                    "image": torch.from_numpy(observation["video"]["front"][:, 0]).permute(0, 3, 1, 2),
                    "state": torch.from_numpy(observation["state"]["state"][:, 0]),
                    "task": torch.tensor([self.tasks[row[0]] for row in observation["language"]["task"]]),
                }
            )
        return {"action": action}


class Expert:
    """Meta-World's scripted experts; they use the simulator's full state and predict one action at a time."""

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """Inputs and outputs: no camera, but the full state."""
        return {
            "video": ModalityConfig([0], []),
            "state": ModalityConfig([0], ["full"]),
            "action": ModalityConfig([0], ["action"]),
            "language": ModalityConfig([0], ["task"]),
        }

    def get_action(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Act for one environment: state "full" [1, 1, 39]."""
        import numpy as np
        from metaworld.policies import ENV_POLICY_MAP

        expert = ENV_POLICY_MAP[observation["language"]["task"][0][0].replace(" ", "-") + "-v3"]()
        action = expert.get_action(observation["state"]["full"][0, 0].astype(np.float64))
        return {"action": np.clip(action, -1, 1).astype(np.float32)[None, None]}


def trained(arm: str) -> ServedMiniVLA:
    """The demo's policy of an arm, the newest if it ran several times."""
    output = Path(os.environ.get("DEMO_OUTPUT", "outputs/demo"))
    files = sorted(output.glob(f"cache/policy-{arm}-*/policy.pt"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{output}/cache has no policy of {arm}; run `make demo`, or set DEMO_OUTPUT")
    state = torch.load(files[-1], weights_only=True)
    policy = MiniVLA(MiniVLAConfig.from_state_dict(state))
    policy.load_state_dict(state)  # the policy alone: acting does not need LARA
    return ServedMiniVLA(policy)


def dit_only() -> ServedMiniVLA:
    """Trained without LARA."""
    return trained("dit_only")


def frozen_lam() -> ServedMiniVLA:
    """Trained with a frozen LAM."""
    return trained("frozen_lam")


def lara_cosine() -> ServedMiniVLA:
    """Trained with LARA as in the paper."""
    return trained("lara_cosine")


def lara_contrastive() -> ServedMiniVLA:
    """Trained with LARA, contrastive."""
    return trained("lara_contrastive")


def untrained() -> ServedMiniVLA:
    """Random weights with a fixed seed."""
    torch.manual_seed(0)
    return ServedMiniVLA(MiniVLA())


def expert() -> Expert:
    """The scripted expert."""
    return Expert()
