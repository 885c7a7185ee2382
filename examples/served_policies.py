"""Policies to serve: what the demo trained, and the simulator's scripted expert.

    lara serve examples/served_policies.py:lara_contrastive      # after `make demo`; also dit_only, frozen_lam, lara_cosine
    lara serve examples/served_policies.py:expert                # checks the whole chain: it must succeed
    lara eval drawer-open --output outputs/evaluation            # in another terminal

A served policy is any object with `get_action(observation)`. Here it takes and gives GR00T's layout, so that `lara eval`
and GR00T's own clients can talk to it; `get_modality_config` tells them its names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lara_adapter.integrations.module_policy import seeded
from mini_vla import MiniVLA, MiniVLAConfig

from lara_adapter.serving import ModalityConfig

OUTPUT = Path(os.environ.get("QUICKSTART_OUTPUT", "outputs/quickstart"))  # of `make demo`
TASKS = ("button-press-topdown", "drawer-open")  # in the order in which the demo numbers them


class ServedMiniVLA:
    """A MiniVLA in GR00T's layout."""

    def __init__(self, policy: MiniVLA, tasks: tuple[str, ...] = TASKS) -> None:
        self.policy, self.tasks = policy.eval(), {task.replace("-", " "): i for i, task in enumerate(tasks)}

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """What it wants and gives."""
        return {
            "video": ModalityConfig([0], ["front"]),
            "state": ModalityConfig([0], ["state"]),
            "action": ModalityConfig(list(range(self.policy.config.horizon)), ["action"]),
            "language": ModalityConfig([0], ["task"]),
        }

    def get_action(self, observation: dict[str, Any], options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Act; `options={"seed": int}` decides the sampling noise.

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
    """Meta-World's scripted experts; they see the state of the simulator itself and predict one action at a time."""

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """No camera, and all that the simulator knows."""
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
    """What the demo trained for an arm, the newest if it ran several times."""
    files = sorted(OUTPUT.glob(f"cache/policy-{arm}-*/policy.pt"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{OUTPUT}/cache has no policy of {arm}; run `make demo`, or set QUICKSTART_OUTPUT")
    state = torch.load(files[-1], weights_only=True)
    policy = MiniVLA(MiniVLAConfig.of_weights(state))
    policy.load_state_dict(state)  # the policy alone: nothing of LARA is needed to act
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
    """Random weights, always the same."""
    torch.manual_seed(0)
    return ServedMiniVLA(MiniVLA())


def expert() -> Expert:
    """The scripted expert."""
    return Expert()
