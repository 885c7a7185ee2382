"""The steps that hub.client runs in a process of its own: `python -m hub.steps`, JSON lines in and out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from helpers.toys import DitPolicy, make_batch
from huggingface_hub import constants

from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara, load_lara
from lara_adapter.storage.files import read_tensors, write_tensors

SIZES = {"encoder_width": 16, "idm_width": 16, "idm_mlp": 16, "fdm_width": 16, "fdm_mlp": 16, "fdm_layers": 1}
waits: list[float] = []
policies: dict[str, Any] = {}
lams: dict[str, Any] = {}


class _Kept(logging.Handler):
    """Warnings of the library since they were last asked for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


kept = _Kept()


def tiny_lam(seed: int = 0, **changes: Any) -> LatentActionModel:
    torch.manual_seed(seed)
    return LatentActionModel(LatentActionConfig.tiny(**{**SIZES, "queries": 2, "latent_dim": 8, **changes}))


def versions() -> dict[str, str]:
    return {
        "huggingface_hub": huggingface_hub.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def environ(**changes: str | None) -> None:
    for name, value in changes.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def clear_waits() -> list[float]:
    seen = waits[:]
    waits.clear()
    return seen


def warnings() -> list[str]:
    seen = kept.lines[:]
    kept.lines.clear()
    return seen


# ---------------------------------------------------------------------- adapters


def _wrapped(policy: Any, lora: bool) -> Any:
    if not lora:
        return policy
    from peft import LoraConfig, get_peft_model

    return get_peft_model(policy, LoraConfig(target_modules=["mlp.0", "mlp.2"], r=2, init_lora_weights=False))


def base_policy(lora: bool = False) -> Any:
    torch.manual_seed(7)
    return _wrapped(DitPolicy(), lora).train()


def make(name: str, steps: int = 0, lora: bool = False, lam: str | None = None, told: dict | None = None) -> None:
    """An attached policy; `told` becomes its `config`, as a policy from the Hub has one."""
    policy = base_policy(lora)
    if told is not None:
        policy.config = type("Config", (), told)()
    lara = attach_lara(policy, lams[lam] if lam else tiny_lam(1), token="mean_valid", alignment="contrastive")
    policies[name] = (policy, lara)
    if steps:
        train(name, steps, seed=100)


def train(name: str, steps: int, seed: int) -> list[str]:
    """SGD steps; the exact losses."""
    policy, _ = policies[name]
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.02)
    torch.manual_seed(seed)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = policy(make_batch(seed=seed + step))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return losses


def digest(name: str) -> str:
    """Of every tensor of the adapter, in order."""
    policy, lara = policies[name]
    state = {
        **{f"p.{k}": v for k, v in policy.state_dict().items()},
        **{f"l.{k}": v for k, v in lara.state_dict().items()},
    }
    total = hashlib.sha256()
    for key in sorted(state):
        total.update(key.encode())
        total.update(state[key].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def save_policy(name: str, path: str) -> None:
    """The policy's own weights: a full fine-tune is the user's to keep."""
    policy, _ = policies[name]
    own = {k: v for k, v in policy.state_dict().items() if not k.startswith("lara.")}
    write_tensors(path, own)


def save(name: str, folder: str) -> None:
    policies[name][1].save_pretrained(folder)


def push(name: str, repo: str, **options: Any) -> str:
    return policies[name][1].push_to_hub(repo, **options)


def push_as_rank(name: str, repo: str, rank: int, meet: str) -> str:
    """Push as one of two processes of torch.distributed, as a training program does that calls it on each."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    try:
        return push(name, repo)
    finally:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def set_step(name: str, step: int) -> None:
    policies[name][1].step = step


def load(
    name: str, repo: str, revision: str | None = None, weights: str | None = None, lora: bool = False,
    told: dict | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Attach what the Hub has to a fresh policy."""
    policy = base_policy(lora)
    if told is not None:
        policy.config = type("Config", (), told)()
    if weights:
        policy.load_state_dict(read_tensors(weights))
    lara = load_lara(policy, repo, revision=revision)
    policies[name] = (policy, lara)
    return {"step": lara.step, "origins": lara.config.origins, "token": lara.config.token}


def fetch(repo: str, file: str) -> None:
    """What a host does that downloads its policy itself."""
    huggingface_hub.hf_hub_download(repo, file)


def cached(repo: str) -> list[str]:
    """Files of a repository in the cache's snapshots."""
    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    return sorted({path.relative_to(cache).as_posix().partition("/")[2] for path in cache.rglob("*") if path.is_file()})


# ---------------------------------------------------------------------- latent action models


def make_lam(name: str, seed: int = 1, **changes: Any) -> None:
    lams[name] = tiny_lam(seed, **changes)


def push_lam(name: str, repo: str, **options: Any) -> str:
    return lams[name].push_to_hub(repo, **options)


def load_lam(name: str, repo: str, revision: str | None = None) -> dict[str, Any]:
    lam = lams[name] = LatentActionModel.from_pretrained(repo, revision)
    return {"origin": lam.origin, "encoder": lam.config.image_encoder_revision}


def same_lams(one: str, other: str) -> bool:
    first, second = lams[one].state_dict(), lams[other].state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def describe_encoder(name: str, revision: str | None = None) -> dict[str, Any]:
    from lara_adapter.lam.image_encoder import describe_image_encoder

    return describe_image_encoder(name, revision)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints is taken for an answer
    torch.set_num_threads(1)
    logging.getLogger("lara_adapter").addHandler(kept)
    # the client waits for seconds between its tries, which is not what is tested
    time.sleep = lambda seconds, sleep=time.sleep: (waits.append(seconds), sleep(min(seconds, 0.01)))[1]
    # a download is resumed from the last whole piece: 10 MB, our files are smaller
    constants.DOWNLOAD_CHUNK_SIZE = 100
    for line in sys.stdin:
        step, arguments = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": globals()[step](**arguments)}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"kinds": kinds, "message": str(error), "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
