"""A GR00T N1.6 checkpoint behind a socket, by GR00T's own Gr00tPolicy.

Tested with NVIDIA Isaac GR00T N1.6 (transformers 4.51.3).
"""

from __future__ import annotations

from typing import Any

from lara_adapter.errors import AdapterFormatError, PolicySourceError
from lara_adapter.storage.files import read_json
from lara_adapter.storage.hub import locate_folder

from ..hosts import import_host
from ..loading import attempt
from ..module_policy import seeded

__all__ = ["Gr00tPolicy"]


class Gr00tPolicy:
    """GR00T's policy, with its checks of observations and actions, and with `options={"seed": int}`, which it ignores."""

    stateful = False  # N1.6's reset does nothing

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.get_modality_config, self.reset = policy.get_modality_config, policy.reset

    @classmethod
    def load(cls, source: str, device: str, embodiment_tag: str | None) -> Gr00tPolicy:
        """Load from a folder or the Hub; see :func:`lara_adapter.integrations.served.open_served` for the arguments.

        Raises:
            HostNotInstalled: gr00t is missing.
            PolicySourceError: no or an unknown embodiment, or GR00T cannot load it.
        """
        stock = import_host("gr00t.policy.gr00t_policy", f"{source} is a GR00T checkpoint, and ").Gr00tPolicy
        from gr00t.data.embodiment_tags import EmbodimentTag

        try:
            folder = locate_folder(source, None, ["*.json", "*.safetensors", "*.txt", "*.model"])
            known = list(read_json(folder / "processor_config.json")["processor_kwargs"]["modality_configs"])
        except (AdapterFormatError, KeyError, TypeError) as error:
            raise PolicySourceError(f"{source} has no processor that lists its embodiments: {error}") from error
        if embodiment_tag is None and len(known) == 1:
            embodiment_tag = known[0]
        if embodiment_tag not in known:
            known = sorted(known)
            raise PolicySourceError(f"{source}: embodiment_tag={embodiment_tag!r}, but the checkpoint knows {known}")
        tag = EmbodimentTag(embodiment_tag)
        return attempt(source, lambda: cls(stock(embodiment_tag=tag, model_path=str(folder), device=device)))

    def get_action(self, observation: dict[str, Any], options: dict[str, Any] | None = None) -> Any:
        """Predict the chunk; see :func:`seeded` for `options`."""
        with seeded(options, next(self.policy.model.parameters()).device):
            return self.policy.get_action(observation, options)
