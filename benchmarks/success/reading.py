"""What the success rows show, in words, with their numbers."""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.markdown import bullets
from benchmarks.speed import step_overhead
from benchmarks.success import libero_report, motion, motion_report, training, video
from benchmarks.success.arms import CONTROL, DEFAULTS
from benchmarks.success.report import compare, gain, recorded, success_rate, t_interval
from benchmarks.success.rows import read_rows

LIBERO = "benchmarks/README.md#libero-tasks-with-scripted-demonstrations"
MOTION = "benchmarks/README.md#motion-in-the-lams"
TRAINING = "benchmarks/README.md#motion-by-how-a-lam-is-trained"
VIDEO = "benchmarks/README.md#video-of-experts-without-actions"
# One seed, measured beside the rows and not yet a record of its own.
STILL_PAIRS = (
    "Most of what the probe reads is where the hand is, not how it moves: on the demo's seed a pair of two equal frames "
    "has .66 of the contrastive LAM's .83, and .59 of the control's .63."
)


class Group:
    """The numbers of one group of rows, as text."""

    def __init__(self, regime: str, demos: int, more: str = "") -> None:
        self.rows, self.summary = recorded()[f"{regime}, 2 tasks, {demos} demonstrations each{more}"]

    def success(self, arm: str) -> str:
        """Gain in success over DiT-only, points."""
        return gain(self.summary[arm]["success_gain"], 100, 1)

    def error(self, arm: str) -> str:
        """Difference in held-out action error to DiT-only."""
        return gain(self.summary[arm]["error_gain"], 1, 4)

    def probe(self, arm: str) -> str:
        """Gain of the linear probe over the control."""
        return gain(self.summary[arm]["probe_gain"], 1, 2)

    def r2(self, arm: str) -> str:
        """The linear probe."""
        return f"{self.summary[arm]['r2']:.2f}"

    def change(self, arm: str, measure: str) -> dict[str, Any]:
        """Difference of an ablation to the arm that it changes."""
        return self.summary[arm]["change"][measure]

    def probe_change(self, arm: str) -> str:
        """The mean of the same for the probe."""
        return f"{self.change(arm, 'r2')['mean']:+.2f}"


def mean_of(text: str) -> str:
    """The mean without its interval."""
    return text.partition(" (")[0]


def reading() -> str:
    """What the main arms show, and what not."""
    ten, clean, three = Group("distractors", 10), Group("clean", 10), Group("distractors", 3)
    thirty, clean_three = Group("distractors", 30), Group("clean", 3)
    again = Group("distractors", 3, ", confirmation")
    large = Group("distractors", 10, ", a policy of width 256 and depth 8")
    same = sorted({clean.r2(arm) for arm, row in clean.summary.items() if "r2" in row and arm != "frozen_random"})
    few = sorted(clean_three.r2(arm) for arm, row in clean_three.summary.items() if "r2" in row)
    return "What it shows, and what not:\n\n" + bullets(
        f"""**Success: no difference that held.** The primary endpoint, contrastive over DiT-only with distractors:
        {ten.success("contrastive")} points over eight seeds; the paper's cosine {ten.success("cosine")}. Without
        distractors {clean.success("contrastive")} and {clean.success("cosine")}. What lies outside an interval is
        excluded, at 95 %, for this policy and these tasks. Of so many comparisons some fall at the edge of their
        interval by chance: the paper's weights without distractors, {clean.success("paper")}, and the LAM that
        never learnt, {clean.success("frozen_random")}, are read so.""",
        f"""**Fewer and more demonstrations.** With 3 and distractors the contrastive form was ahead,
        {three.success("contrastive")} points. On eight new seeds, fixed before they ran, it was not:
        {again.success("contrastive")}; a LAM that never learnt {again.success("frozen_random")} there. The gain is
        read as chance, found among many comparisons. With 30 it is {thirty.success("contrastive")}, with 3 without
        distractors {clean_three.success("contrastive")}; cosine {three.success("cosine")},
        {thirty.success("cosine")}, {clean_three.success("cosine")}.""",
        f"""**Held-out action error: lower with the contrastive form, without distractors and with ten
        demonstrations only**: {clean.error("contrastive")} of {clean.summary["dit_only"]["action_error"]:.4f}, and
        {clean.error("contrastive_0.3")} with 0.3 of the gradient. No other arm lowers it beyond its interval.
        Success did not follow it.""",
        f"""**Linear probe of the LAM for the action: the contrastive form gains, the cosine hardly.** R2
        {ten.r2("contrastive")} against {ten.r2(CONTROL)} for as many steps without alignment,
        {ten.probe("contrastive")}; with 0.3 of the gradient {ten.r2("contrastive_0.3")}. **{STILL_PAIRS}** Cosine
        {ten.r2("cosine")}, {ten.probe("cosine")}, at a mean direction of
        {ten.summary["cosine"]["mean_direction"]:.2f}: its latent points the same way whatever happens. With 0.3 of
        its gradient {ten.probe("cosine_0.3")}, with none {mean_of(ten.probe("cosine_0"))}: its small gain is its
        gradient's. The fewer demonstrations, the more the contrastive form adds: {three.probe("contrastive")} with
        3 (cosine {mean_of(three.probe("cosine"))}), {thirty.probe("contrastive")} with 30 (cosine
        {mean_of(thirty.probe("cosine"))}).""",
        f"""**A frozen LAM does no more than one that never learnt**: {ten.success("frozen")} and
        {ten.success("frozen_random")} points with distractors.""",
        f"""**Without distractors** there is little for the probe to gain: it is {" or ".join(same)} in every arm
        but the LAM that never learnt ({clean.r2("frozen_random")}); with 3 demonstrations {few[0]} to {few[-1]}.""",
        f"""**Why not more.** Tested: a stronger alignment is not the answer (w1 = 1, below, on all seeds), nor is a
        policy of eleven times the size: its action error is lower without LARA too
        ({large.summary["dit_only"]["action_error"]:.4f}), its success no higher
        ({100 * large.summary["dit_only"]["success"]:.1f} %), and contrastive adds {large.success("contrastive")},
        cosine {large.success("cosine")}; five seeds, so a few points would not be seen. The probe gains under it as
        well, {large.probe("contrastive")}. Not tested, our reading: the demonstrations' chunks already say what the
        pair of frames says, and the policy sees a fixed camera. Pre-trained policies and longer horizons, where the
        paper reports its gains, are not tested by this.""",
    )


def ablation_reading() -> str:
    """What the ablations show."""
    ten = Group("distractors", 10)
    changes = {arm: row["change"] for arm, row in ten.summary.items() if (row.get("change") or {}).get("success")}
    odd = sum(low > 0 or high < 0 for low, high in (change["success"]["t"] for change in changes.values()))
    first = {key: row for key, row in ten.rows.items() if key[0] == 0}
    one_seed = compare(first, "w1=1.0", "contrastive", success_rate)
    return bullets(
        f"""**Success of few seeds says nothing here.** w1 = 1 gained {gain(one_seed, 100, 1)} points on the first
        seed; on all eight it is {gain(ten.change("w1=1.0", "success"), 100, 1)}, and its action error is worse,
        {gain(ten.change("w1=1.0", "action_error"), 1, 4)}. The others have three seeds; of {len(changes)} intervals
        the {odd} that leave out zero are read as chance.""",
        f"""**What the probe needs**: the LAM in training (frozen: {ten.probe_change("joint=no")}), and w1 of
        {DEFAULTS["w1"]} (0.01: {ten.probe_change("w1=0.01")}, 0.001: {ten.probe_change("w1=0.001")}); w2 = 1, where
        reconstruction outweighs it, takes {ten.probe_change("w2=1.0")}. Frames far apart give more (C = 32:
        {ten.probe_change("C=32")}) than near ones (C = 8: {ten.probe_change("C=8")}).""",
        f"""**What hardly matters for it**: the depth from block 2 of four on (the state before the first block:
        {ten.probe_change("layer=0")}), the projector, the amount of video. The token `last` is the same as
        `last_valid` here: with C = H a padded chunk has no future frame and is left out of the alignment.""",
        """The paper's figure has success rise with depth up to the last blocks but one; at four blocks of this size
        its cosine shows no effect of depth.""",
    )


def evidence() -> str:
    """The front page's lines, with what it costs."""
    ten = Group("distractors", 10)
    step = step_overhead.whole_policy()
    assert step is not None
    cost = step["ratio"]
    play = motion.recorded("distractors")
    moved = {arm: motion_report.over_control(play, arm, "beyond") for arm in ("contrastive", "cosine")}
    beyond, seen = (motion_report.average(play, CONTROL, key) for key in ("beyond", "ceiling_beyond"))
    twenty = libero_report.recorded()["libero_object, 10 tasks, 20 demonstrations each"][1]
    decoded, true = (video.gains(video.recorded(), "clean", arm) for arm in ("decoded", "true"))
    interval = t_interval(decoded)
    assert interval is not None
    trained = read_rows(training.ROWS)
    share, clean = (training.shares(trained, regime) for regime in ("distractors", "clean"))
    return bullets(
        f"""**Video without actions makes policies succeed more often**: beside three demonstrations a task, forty
        episodes of experts with actions that `lara label --actions` decodes [add {mean(decoded):.1f} points]({VIDEO})
        ({interval[0]:+.1f} to {interval[1]:+.1f}; {len(decoded)} seeds, clean pictures) of the {mean(true):.1f} that
        true ones do; with distractors {video.added(video.recorded(), "distractors", "decoded")}, and it refuses.""",
        f"""**No alignment did** that we tried, [in Meta-World](benchmarks/README.md#success) (contrastive
        {ten.success("contrastive")} points, cosine {ten.success("cosine")}) or [LIBERO]({LIBERO}) (contrastive
        {gain(twenty["contrastive"]["success_gain"], 100, 1)}). The paper's gains are on larger, pre-trained policies.""",
        f"""**Alignment and motion**: to R2 for the displacement of the hand beyond the present frame contrastive
        [adds]({MOTION}) {moved["contrastive"]}, cosine {moved["cosine"]} ({beyond:.2f} without, {seen:.2f} is there).""",
        f"""**How a LAM is trained on video decides more**: of what can be seen of that displacement the demo's says
        {share["short"]:.2f}, trained longer and [augmented]({TRAINING}) {share["augmented"]:.2f}, with a few labels
        and the still pair taken off {share["subtracted_labelled"]:.2f}; on clean
        pictures {clean["short"]:.2f}, trained so {clean["augmented"]:.2f}.""",
        f"""**A training step costs** [{cost["joint"]:.2f} times as
        much](benchmarks/README.md#what-lara-adds-to-a-training-step) with the paper's LAM on a policy of GR00T N1.6's cost,
        {cost["joint/4"]:.2f} with `reconstruct=0.25`, {cost["cached/4"]:.2f} with the feature cache too; acting costs
        nothing.""",
        """**It is the authors' method**: losses and gradients [equal those of both releases](docs/parity.md).""",
    )


SECTIONS = {
    "benchmarks/README.md": {"reading": reading, "ablation reading": ablation_reading},
    "README.md": {"evidence": evidence},
}
