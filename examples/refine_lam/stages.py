"""The jobs of one seed in one world, each with everything that its result depends on.

Recording, training of latent action models (LAMs) and of the policy with LARA, probes and closed loop are the demo's.
New is what uses a trained LAM: codes.py, pseudo_labels.py, moto_gpt.py and moto_train.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.demo.data import collect
from examples.demo.eval import Policy, closed_loop
from examples.demo.probe import examine_lam
from examples.demo.stages import Job, Progress
from examples.demo.train import continue_lam, pretrain_lam, train_policy
from examples.refine_lam.moto_gpt import MotoGPT
from examples.refine_lam.moto_train import train_moto_gpt
from examples.refine_lam.pseudo_labels import UNLABELLED, WithoutState, label, train_on_labels
from examples.refine_lam.settings import Settings


def load_any(file: Path) -> Policy:
    """Load a policy of either kind by its file name."""
    return MotoGPT.load(file) if file.name == "moto_gpt.pt" else WithoutState.load(file)


def act(folder: Path, progress: Progress, **settings: Any) -> None:
    """`closed_loop` for policies of either kind. A job."""
    closed_loop(folder, progress, load=load_any, **settings)


class Jobs:
    """Makes the jobs of one seed in one world.

    Args:
        settings: of the run.
        seed: of starts, weights, data order, noise and distractors.
        distractors: whether frames have distractors.
    """

    def __init__(self, settings: Settings, seed: int, distractors: bool) -> None:
        self.settings = settings
        self.world = {"distractors": distractors, "seed": seed}
        self.training = {**self.world, "batch": settings.batch, "lr": settings.lr}
        self.learning = {**self.training, "batch": settings.policy_batch}

    def record(self, task: str) -> Job:
        """Labelled and held-out demonstrations, and play video, of one task."""
        s = self.settings
        counts = {"demos": s.labelled, "heldout": s.heldout, "play": s.play}
        options = {"task": task, "counts": counts, "play_steps": s.play_steps, "seed": self.world["seed"]}
        return Job(f"record-{task}", collect, options, sum(counts.values()))

    def record_unlabelled(self, task: str) -> Job:
        """Further demonstrations of one task; their actions are the ceiling and a reference, and train no LAM."""
        s = self.settings
        counts = {"demos": s.unlabelled}
        options = {"task": task, "counts": counts, "play_steps": s.play_steps, "seed": UNLABELLED + self.world["seed"]}
        return Job(f"unlabelled-{task}", collect, options, s.unlabelled)

    def plain(self, data: list[Path]) -> Job:
        """The LAM before refinement: play video alone."""
        options = {"data": data, "steps": self.settings.lam_steps, **self.training}
        return Job("lam-plain", pretrain_lam, options, self.settings.lam_steps)

    def control(self, data: list[Path], lam: Path) -> Job:
        """The LAM trained on for the same steps on the same labelled demonstrations, without a policy."""
        options = {"data": data, "lam": lam, "steps": self.settings.joint_steps, **self.training}
        return Job("lam-control", continue_lam, options, self.settings.joint_steps)

    def joint(self, alignment: str, data: list[Path], lam: Path) -> Job:
        """LARA: the LAM trained jointly with the demo's policy, which is then discarded."""
        s = self.settings
        lara_options = {"align_weight": s.align_weight, "lam_weight": s.lam_weight, "alignment": alignment}
        options = {"data": data, "lam": lam, "lara_options": lara_options, "steps": s.joint_steps, **self.training}
        return Job(f"joint-{alignment}", train_policy, {**options, "execute": s.execute}, s.joint_steps)

    def probe(self, arm: str, data: list[Path], lam: Path) -> Job:
        """The demo's measurements of a LAM: linear probe, health of the codes, attention."""
        return Job(f"probe-{arm}", examine_lam, {"data": data, "lam": lam, "shown": 4, **self.world}, 1)

    def label(self, arm: str, data: list[Path], unlabelled: list[Path], lam: Path) -> Job:
        """Tokens and decoded actions of all demonstrations, and their quality."""
        return Job(f"label-{arm}", label, {"data": data, "unlabelled": unlabelled, "lam": lam, **self.world}, 1)

    def moto_gpt(self, arm: str, data: list[Path], unlabelled: list[Path], labels: Path | None) -> Job:
        """The latent-token policy on the tokens of one LAM; labels None: the reference without tokens."""
        s = self.settings
        steps = {"pretrain_steps": s.pretrain_steps, "finetune_steps": s.finetune_steps}
        options = {"data": data, "unlabelled": unlabelled, "labels": labels, **steps, "execute": s.execute}
        units = s.finetune_steps + (0 if labels is None else s.pretrain_steps)
        return Job(f"moto-gpt-{arm}", train_moto_gpt, {**options, **self.learning}, units)

    def policy(
        self, arm: str, data: list[Path], unlabelled: list[Path], labels: Path | None, use_unlabelled: bool = True
    ) -> Job:
        """The diffusion policy on labelled demonstrations, and on those labelled by one LAM or (labels None) truly."""
        s = self.settings
        options = {"data": data, "unlabelled": unlabelled, "labels": labels, "use_unlabelled": use_unlabelled}
        options |= {"steps": s.policy_steps, "execute": s.execute, **self.learning}
        return Job(f"policy-{arm}", train_on_labels, options, s.policy_steps)

    def closed_loop(self, task: str, policies: dict[str, Path]) -> Job:
        """All policies on one task, with the same starts, distractors and sampling noise."""
        s = self.settings
        options = {"task": task, "task_index": s.tasks.index(task), "policies": policies, "episodes": s.episodes}
        options |= {"filmed": 0, "max_steps": s.max_steps, "execute": s.execute, **self.world}
        return Job(f"closed-loop-{task}", act, options, s.episodes * len(policies))
