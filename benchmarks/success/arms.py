"""The arms of the success benchmark: what each policy gets of LARA, and the ablations around one of them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

HORIZON = 16  # steps of an action chunk, and C where an arm says nothing else
CONTROL = "control"  # no policy: the LAM trained on for as many steps without alignment
W = {"align_weight": 0.1, "lam_weight": 0.1}
CONTRASTIVE = {**W, "alignment": "contrastive"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train a policy.

    Attributes:
        options: of `attach_lara`; None: no LARA.
        lam: which latent action model it starts from: one trained on the seed's video, or one that never learnt.
        gap: C, steps from the present frame to the future one, of the LAM's training too; even, as every second is kept.
        video: episodes of play video per task that the LAM learnt from; None: all.
        policy: fields of `MiniVLAConfig` that are not the default's.
    """

    options: dict[str, Any] | None
    lam: Literal["video", "random"] = "video"
    gap: int = HORIZON
    video: int | None = None
    policy: dict[str, float] = dataclasses.field(default_factory=dict)


MAIN = {
    "dit_only": Arm(None),
    "frozen": Arm({**W, "train_lam": False}),
    "frozen_random": Arm({**W, "train_lam": False}, lam="random"),  # regularisation, or content?
    "paper": Arm({"align_weight": 0.01, "lam_weight": 0.01}),
    "cosine": Arm(W),
    "contrastive": Arm(CONTRASTIVE),
    "contrastive_0.3": Arm({**CONTRASTIVE, "lam_grad_scale": 0.3}),
}
# the paper's alignment with less of its gradient, or none, in the LAM
GRADIENT = {
    "cosine_0.3": Arm({**W, "lam_grad_scale": 0.3}),
    "cosine_0": Arm({**W, "lam_grad_scale": 0.0}),
}
BASE = "contrastive"  # one thing at a time is changed of this arm; names are "knob=value"
ABLATIONS = {
    **{f"layer={layer}": Arm({**CONTRASTIVE, "layer": layer}) for layer in (0, 1, 3, 4)},
    **{f"w1={weight}": Arm({**CONTRASTIVE, "align_weight": weight}) for weight in (0.001, 0.01, 1.0)},
    **{f"w2={weight}": Arm({**CONTRASTIVE, "lam_weight": weight}) for weight in (0.001, 0.01, 1.0)},
    "joint=no": Arm({**CONTRASTIVE, "train_lam": False}),
    **{f"C={gap}": Arm(CONTRASTIVE, gap=gap) for gap in (4, 8, 32)},
    **{f"video={episodes}": Arm(CONTRASTIVE, video=episodes) for episodes in (5, 10, 20)},
    "token=last": Arm({**CONTRASTIVE, "token": "last"}),
    "token=mean_valid": Arm({**CONTRASTIVE, "token": "mean_valid"}),
    "projector=linear": Arm({**CONTRASTIVE, "projector": "linear"}),
}
# the paper's own figure: depth of the alignment, by its cosine
COSINE_DEPTH = {f"cosine, layer={layer}": Arm({**W, "layer": layer}) for layer in (0, 1, 3, 4)}

# flow times near 1, where the tapped state knows the action and not only what is seen: 0.89 on average, by default 0.4.
# The whole policy is trained at them, so that all of the alignment is; for what its LAM learns, not for acting.
LATE = {"time_alpha": 1.0, "time_beta": 8.0}
FLOW_TIME = {"cosine_late": Arm(W, policy=LATE), "contrastive_late": Arm(CONTRASTIVE, policy=LATE)}

ARMS = {**MAIN, **GRADIENT, **ABLATIONS, **COSINE_DEPTH, **FLOW_TIME}
# what each knob stands at in the arm that it is changed of
DEFAULTS = {
    "layer": "2", "w1": "0.1", "w2": "0.1", "joint": "yes", "C": str(HORIZON), "video": "40", "token": "last_valid",
    "projector": "mlp",
}  # fmt: skip
STAGES: dict[str, tuple[str, ...]] = {
    "main": (*MAIN, CONTROL),
    "gradient": tuple(GRADIENT),
    "ablations": tuple(ABLATIONS),
    "cosine_depth": tuple(COSINE_DEPTH),
}
