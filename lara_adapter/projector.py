"""The projection head f_psi of LARA, Eq. 6: from the policy's hidden state to the latent action."""

from __future__ import annotations

from torch import nn

from .errors import LaraArgumentError

__all__ = ["build_projector"]


def build_projector(kind: str | nn.Module, hidden_width: int | None, latent_width: int) -> nn.Module:
    """The projection head f_psi: "linear" (official release), "mlp" (paper), or the user's own module.

    Raises:
        LaraArgumentError: unknown kind, or the width of the hidden state is unknown.
    """
    if isinstance(kind, nn.Module):
        return kind
    if kind not in ("mlp", "linear"):
        raise LaraArgumentError(
            f"attach_lara: projector={kind!r}, but 'mlp', 'linear' or a module from the hidden width to "
            f"{latent_width} is wanted"
        )
    if hidden_width is None:
        raise LaraArgumentError(
            "attach_lara: the blocks do not tell the width of their hidden state; "
            f"pass projector=nn.Linear(width, {latent_width}) or another module"
        )
    if kind == "linear":
        return nn.Linear(hidden_width, latent_width)
    inner = 2 * hidden_width
    return nn.Sequential(nn.Linear(hidden_width, inner), nn.SiLU(), nn.Linear(inner, latent_width))
