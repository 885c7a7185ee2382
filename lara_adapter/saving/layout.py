"""The names of the files that an adapter is made of. Fixed: a name taken from a download could lead anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..storage.files import ADAPTER_FILE as CONFIG_FILE
from ..storage.hub import CARD_FILE

__all__ = ["ACTING", "CARD_FILE", "CONFIG_FILE", "CURVE_FILE", "LAM_FOLDER", "LORA_CONFIG", "LORA_FOLDER", "LORA_WEIGHTS",
           "OURS", "POLICY_FOLDER", "POLICY_INDEX", "TOP_LEVEL", "TRAINING", "WEIGHTS_FILE", "Part"]  # fmt: skip

WEIGHTS_FILE = "lara_adapter.safetensors"  # projector and counters
LAM_FOLDER = "lam"  # a latent action model's own format
LORA_FOLDER = "policy_lora"  # peft's own format
LORA_CONFIG, LORA_WEIGHTS = f"{LORA_FOLDER}/adapter_config.json", f"{LORA_FOLDER}/adapter_model.safetensors"
POLICY_FOLDER = "policy_weights"  # what was trained of the policy, in shards; "policy" may be the user's own
POLICY_INDEX = f"{POLICY_FOLDER}/model.safetensors.index.json"
CURVE_FILE = "lara_training.png"

# what is read to act, and to train; the first one must exist
ACTING = [CONFIG_FILE, f"{LORA_FOLDER}/*", f"{POLICY_FOLDER}/*"]
TRAINING = [*ACTING, WEIGHTS_FILE, f"{LAM_FOLDER}/*"]
# everything that an adapter may have in a folder or repository
OURS = [*TRAINING, CURVE_FILE]
TOP_LEVEL = (CONFIG_FILE, WEIGHTS_FILE, LAM_FOLDER, LORA_FOLDER, POLICY_FOLDER, CURVE_FILE)

Part = tuple[str, Callable[[Path], object]]  # a file or folder of an adapter: its name, and what writes it to a path
