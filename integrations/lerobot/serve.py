"""A LeRobot policy behind a socket: its own class, its own saved processors, and no state from call to call.

Tested with lerobot 0.6.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lara_adapter.errors import AdapterFormatError, LaraArgumentError, PolicySourceError
from lara_adapter.serving import ModalityConfig
from lara_adapter.storage.hub import locate_folder

from ..loading import attempt, lerobot_class
from ..module_policy import seeded
from ..observations import read_instructions, read_states, read_views

__all__ = ["LeRobotPolicy", "load_stock"]

_IMAGES, _STATE = "observation.images.", "observation.state"
_NO_CAMERA = f"{_IMAGES}empty_camera_"  # that pi0, pi0.5, SmolVLA and X-VLA fill themselves
_WHOLE_CHUNKS = ("groot",)  # relative actions and per-step statistics need the whole chunk


def load_stock(folder: str | Path, device: str) -> tuple[Any, Any, Any]:
    """Load a saved policy as any user of LeRobot does: its own class, strictly, its own saved processors.

    Args:
        folder: what `save_pretrained` of policy and processors wrote; with LoRA the adapter, which names its base policy.
        device: where the policy will be.

    Returns:
        Policy in eval mode, preprocessor, postprocessor.
    """
    policy_class, config = lerobot_class(str(folder), Path(folder))
    from lerobot.policies.factory import make_pre_post_processors

    config.device = device
    policy = _load_weights(policy_class, config, str(folder))
    processors = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": device}}
    )
    return policy.to(device).eval(), *processors


def _load_weights(policy_class: Any, config: Any, folder: str) -> Any:
    """The weights of a folder; of one that holds LoRA alone, the base policy's with the LoRA in them."""
    if not config.use_peft:
        return policy_class.from_pretrained(folder, config=config, strict=True)
    from peft import PeftConfig, PeftModel

    adapter = PeftConfig.from_pretrained(folder)
    if not adapter.base_model_name_or_path:
        raise ValueError(f"{folder}/adapter_config.json names no base policy (base_model_name_or_path)")
    base = policy_class.from_pretrained(
        adapter.base_model_name_or_path, config=config, revision=adapter.revision, strict=True
    )
    return PeftModel.from_pretrained(base, folder, config=adapter).get_base_model()


class LeRobotPolicy:
    """Serves a policy in GR00T's layout.

    Views and states have LeRobot's names without "observation.images." and "observation.", the action is "action", the
    instruction "task". No state is kept between calls, so clients may take turns: policies that look back get the
    `n_obs_steps` steps that the client sends.
    """

    stateful = False

    def __init__(self, policy: Any, preprocessor: Any, postprocessor: Any) -> None:
        self.policy, self.preprocessor, self.postprocessor = policy, preprocessor, postprocessor
        config = policy.config
        self.steps = int(getattr(config, "n_obs_steps", 1) or 1)
        features = config.input_features
        cameras = [name for name in config.image_features if not name.startswith(_NO_CAMERA)]
        self.views = [name.removeprefix(_IMAGES) for name in cameras]
        self.state_width = int(features[_STATE].shape[0]) if _STATE in features else 0
        self.horizon = int(getattr(config, "chunk_size", 0) or config.n_action_steps)
        images = {name for name in config.image_features if name.startswith(_IMAGES)}
        if features.keys() - images - {_STATE}:
            raise PolicySourceError(
                f"a LeRobot policy with the inputs {sorted(features)} cannot be served: {_IMAGES}* and {_STATE} are known"
            )

    @classmethod
    def load(cls, source: str, device: str) -> LeRobotPolicy:
        """Load from a folder or the Hub.

        Raises:
            HostNotInstalled: lerobot, or a part that this policy needs, is missing.
            PolicySourceError: the folder lacks something, or LeRobot cannot load it.
        """
        try:
            folder = locate_folder(source, None, ["*.json", "*.safetensors"])
        except AdapterFormatError as error:
            raise PolicySourceError(str(error)) from error
        if not (folder / "policy_preprocessor.json").is_file():
            raise PolicySourceError(
                f"{source} has no policy_preprocessor.json: its processors must be saved beside the policy "
                "(preprocessor.save_pretrained, postprocessor.save_pretrained), as lerobot-train does"
            )
        return attempt(source, lambda: cls(*load_stock(folder, device)))

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """The views, states and steps that it expects in an observation."""
        past = list(range(1 - self.steps, 1))
        return {
            "video": ModalityConfig(past, self.views),
            "state": ModalityConfig(past, [_STATE.removeprefix("observation.")] if self.state_width else []),
            "action": ModalityConfig(list(range(self.horizon)), ["action"]),
            "language": ModalityConfig([0], ["task"]),
        }

    def reset(self, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Nothing is kept between calls."""
        return {}

    @torch.inference_mode()
    def get_action(
        self, observation: dict[str, Any], options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Predict the chunk; see :func:`seeded` for `options`.

        Returns:
            {"action": float32 [B, H, A]}, and {}.

        Raises:
            FrameError, LaraArgumentError: the observation does not fit.
        """
        views = read_views(observation, self.views, self.steps)
        states = read_states(observation, "state", self.state_width, self.steps) if self.state_width else None
        sizes = {name: len(array) for name, array in views.items()} | ({} if states is None else {"state": len(states)})
        if len(set(sizes.values())) != 1:
            raise LaraArgumentError(f"observation: one batch size is expected, but there are {sizes}")
        batch = next(iter(sizes.values()))
        tasks = read_instructions(observation, "task", batch)
        for part in (self.policy, self.preprocessor, self.postprocessor):
            part.reset()
        with seeded(options, self.policy.config.device):
            frames = []
            for step in range(self.steps):
                frame: dict[str, Any] = {
                    _IMAGES + view: torch.from_numpy(array[:, step]).permute(0, 3, 1, 2).float() / 255
                    for view, array in views.items()
                }
                if states is not None:
                    frame[_STATE] = torch.from_numpy(np.ascontiguousarray(states[:, step]))
                frames.append(self.preprocessor({**frame, "task": tasks}))
            chunk = self._predict(frames)
        if self.policy.config.type in _WHOLE_CHUNKS:
            return {"action": self.postprocessor(chunk).float().cpu().numpy()}, {}
        # one step at a time, as the processors see them in LeRobot's own rollouts
        steps = [self.postprocessor(chunk[:, step]).float().cpu().numpy() for step in range(chunk.shape[1])]
        return {"action": np.stack(steps, axis=1).astype(np.float32)}, {}

    def _predict(self, frames: list[Any]) -> torch.Tensor:
        """The chunk [B, H, A], still normalised."""
        queues = getattr(self.policy, "_queues", None) or {}
        if all(name == "action" for name in queues):
            chunk: torch.Tensor = self.policy.predict_action_chunk(frames[-1])
            return chunk
        # Policies that look back fill their queues in select_action, and sample when no action is left: a filler prevents
        # that at the steps before the present one.
        for frame in frames[:-1]:
            queues = self.policy._queues
            queues["action"].append(None)
            self.policy.select_action(frame)
        first = self.policy.select_action(frames[-1])
        return torch.stack([first, *self.policy._queues["action"]], dim=1)
