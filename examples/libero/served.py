"""A MiniVLA that was trained on LIBERO, behind `lara serve`.

    LIBERO_POLICY=outputs/libero/policy-dit_only-0123456789 lara serve examples.libero.served:policy
    lara eval all --simulator libero --setting suite=libero_object image_size=128 gripper=raw quality=fast --output out

The settings are those of its demonstrations.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from lara_adapter.integrations.module_policy import seeded

from examples.libero.tables import shrink
from examples.mini_vla import MiniVLA, MiniVLAConfig
from lara_adapter.serving import ModalityConfig
from lara_adapter.storage.files import read_json, write_json

VARIABLE = "LIBERO_POLICY"
_WEIGHTS, _ABOUT = "policy.pt", "policy.json"


@dataclasses.dataclass(frozen=True)
class ServedLiberoPolicy:
    """A MiniVLA in GR00T's layout.

    Attributes:
        policy: in eval mode.
        instructions: the text of each task, in the order of training.
    """

    policy: MiniVLA
    instructions: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> ServedLiberoPolicy:
        """Read what :func:`describe` and training wrote.

        Raises:
            AdapterFormatError: there is nothing.
        """
        about = read_json(folder / _ABOUT)
        policy = MiniVLA(MiniVLAConfig(**{**about["config"], "views": tuple(about["config"]["views"])}))
        policy.load_state_dict(torch.load(folder / _WEIGHTS, weights_only=True))
        return cls(policy.eval(), tuple(about["instructions"]))

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """Inputs and outputs."""
        return {
            "video": ModalityConfig([0], list(self.policy.config.views)),
            "state": ModalityConfig([0], ["state"]),
            "action": ModalityConfig(list(range(self.policy.config.horizon)), ["action"]),
            "language": ModalityConfig([0], ["task"]),
        }

    def get_action(self, observation: dict[str, Any], options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Act; `options={"seed": int}` seeds the sampling noise.

        Args:
            observation: video "image" and "wrist_image" uint8 [B, 1, S, S, 3], state "state" float32 [B, 1, 8], language
                "task" [[str]] * B.
            options: see above.

        Returns:
            {"action": [B, H, 7]}; the gripper's -1 opens and 1 closes.
        """
        asked = [row[0] for row in observation["language"]["task"]]
        unknown = set(asked) - set(self.instructions)
        if unknown:
            raise ValueError(f"this policy knows the tasks {list(self.instructions)}, not {sorted(unknown)}")
        images = {view: shrink(observation["video"][view][:, 0]) for view in self.policy.config.views}
        state = torch.from_numpy(observation["state"]["state"][:, 0])
        task = torch.tensor([self.instructions.index(text) for text in asked])
        with seeded(options):
            return {"action": self.policy.get_action({**images, "state": state, "task": task}).numpy()}


def describe(folder: Path, config: MiniVLAConfig, instructions: list[str]) -> None:
    """Write what is needed beside the weights."""
    write_json(folder / _ABOUT, {"config": dataclasses.asdict(config), "instructions": instructions})


def policy() -> ServedLiberoPolicy:
    """The policy in the folder that the environment names."""
    if VARIABLE not in os.environ:
        raise ValueError(f"set {VARIABLE} to the folder of a policy that examples.libero trained")
    return ServedLiberoPolicy.load(Path(os.environ[VARIABLE]))
