"""The latent action model: what changed between two frames, learnt from video without actions (LARA, Eq. 1-3)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..errors import AdapterFormatError, FrameError, LaraArgumentError
from ..schedules import check_share
from ..storage.files import load_into, read_tensors
from ..storage.hub import check_target
from ..storage.origins import Origin
from ..storage.sharding import gathered
from . import checkpoint, foreign
from .config import LatentActionConfig
from .draws import draw_rows
from .feature_cache import FeatureCache, folder_of
from .feature_reader import FeatureReader
from .forward_dynamics import ForwardDynamics
from .image_encoder import FrozenImageEncoder, PatchEncoder, build_image_encoder, pinned
from .inverse_dynamics import InverseDynamics
from .measure import STILL, LatentHealth, measure_health
from .objective import reconstruct_pairs
from .perceptual import PerceptualDistance
from .pixels import no_difference, prepare_pair, with_difference
from .quantizer import QuantizerTerms, VectorQuantizer
from .transformer import TransformerLayer, float32_default

__all__ = ["LatentAction", "LatentActionModel", "LatentActionOutput", "count_parameters"]


class LatentAction(NamedTuple):
    """What changed from one frame to another.

    continuous: [B, N, D] float32, as it enters the quantiser: the target of the alignment.
    quantized: [B, N, D] float32, straight-through.
    indices: [B, N] int64.
    """

    continuous: Tensor
    quantized: Tensor
    indices: Tensor


class LatentActionOutput(NamedTuple):
    """One forward: float32 scalars, the latent and the predicted frame.

    loss: reconstruction (over copy, where set) + codebook + beta commitment + weight x perceptual.
    reconstruction_loss: mean squared pixel error, not divided by anything.
    copy_loss: that of the present frame taken as the prediction.
    codebook_loss: unweighted; a foreign quantiser's whole loss.
    commitment_loss: unweighted; 0 with a foreign quantiser.
    perceptual_loss: unweighted LPIPS; 0 where it is off.
    perplexity: exp of the entropy of the running usage of the codes; a foreign quantiser's of this batch.
    codes_used: codes in use, likewise.
    latent: the latent action, with graph.
    reconstruction: [K, 3, S, S] float32, not clamped; K is B unless a part is reconstructed.
    reconstructed: [K] int64, the pairs that were; None: all, in their order.
    """

    loss: Tensor
    reconstruction_loss: Tensor
    copy_loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    perceptual_loss: Tensor
    perplexity: Tensor
    codes_used: Tensor
    latent: LatentAction
    reconstruction: Tensor
    reconstructed: Tensor | None = None


class LatentActionModel(nn.Module):
    """Inverse dynamics, quantiser and forward dynamics over an image encoder.

    All parameters belong to the children `image_encoder` (none if it is a frozen one), `inverse_dynamics`, `quantizer`
    and `forward_dynamics`; each is called once per forward and none is read from outside, so that each can be a unit
    of FSDP or ZeRO-3. A forward draws no random numbers. Do not put it into a region that is recomputed (activation
    checkpointing): the quantiser would count twice. :meth:`checkpoint_layers` recomputes the layers alone.

    Its weights are float32 whatever torch's default dtype; they are on its default device.

    Args:
        config: the settings.
        quantizer: a module to use instead of :class:`VectorQuantizer`, for instance of vector-quantize-pytorch:
            `quantized, indices, loss = quantizer(z)` with z [B, N, D], and an integer `codebook_size`. `config.json`
            does not hold it: pass it to :meth:`from_pretrained` again.
        backbone: an already loaded frozen vision backbone to use instead of loading `config.image_encoder`.

    Raises:
        LaraArgumentError: the image encoder cannot be loaded or does not fit, or the quantiser is not usable.
        HubError: the image encoder cannot be fetched.
    """

    @float32_default()
    def __init__(
        self, config: LatentActionConfig, quantizer: nn.Module | None = None, backbone: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.image_encoder = build_image_encoder(config, backbone)
        # where the encoder came from the Hub, the commit that was loaded and no longer a branch, which moves
        self.config = config = pinned(config, self.image_encoder)
        self.origin: Origin | None = None  # repository and commit that the weights were loaded from
        self.inverse_dynamics = InverseDynamics(config)
        self.quantizer: nn.Module = VectorQuantizer.from_config(config) if quantizer is None else quantizer
        self._keywords = foreign.supported_keywords(self.quantizer)
        self.forward_dynamics = ForwardDynamics(config)
        self.perceptual = PerceptualDistance() if config.perceptual_weight > 0 else None

    # a forward draws nothing, so joint training needs no separate generator
    draws_random_numbers = False

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, D): latent tokens per pair of frames, and the width of each."""
        return self.config.queries, self.config.latent_dim

    @property
    def latent_width(self) -> int:
        """N * D: numbers per latent action, and so the output width of a projector that is aligned with it."""
        return self.config.queries * self.config.latent_dim

    def encode(self, frame_t: Tensor, frame_future: Tensor, *, features: Tensor | None = None) -> LatentAction:
        """Infer the latent action (LARA, Eq. 1); codebook and usage do not change, in training either.

        Args:
            frame_t: [B, 3, H, W], uint8 in [0, 255] or float in [0, 1]; resized to `image_size` if different.
            frame_future: the same, C frames later.
            features: [B, 2, P, E] what the frozen image encoder gives for the two, which then does not run; 3 with
                `difference_input`. See :meth:`prefetch_features`.

        Raises:
            FrameError: wrong dtype or shape.
            LaraArgumentError: features, and an image encoder that trains.
        """
        frames = prepare_pair(frame_t, frame_future, None, self.config.image_size)
        return self.assign_codes(self._infer(frames, features=features)[0])

    def forward(
        self,
        frame_t: Tensor,
        frame_future: Tensor,
        valid: Tensor | None = None,
        *,
        reconstruct: float = 1.0,
        draw: int | Tensor = 0,
        features: Tensor | None = None,
        seen: tuple[Tensor, Tensor] | None = None,
    ) -> LatentActionOutput:
        """Infer the latent action, predict the future frame from it, and compute L_LAM (LARA, Eq. 3).

        With `reconstruct` < 1 forward dynamics and LPIPS see a random part of the pairs; all are encoded and quantised. The
        loss and its gradient are then those of all pairs in expectation over draws: both are linear in the error of each
        pair, and the divisor of `reconstruction_over_copy` is that of all valid pairs.

        Args:
            frame_t: [B, 3, H, W], uint8 in [0, 255] or float in [0, 1]; resized to `image_size` if different.
            frame_future: the same, C frames later.
            valid: [B] bool; other samples count for nothing. With none valid the loss is 0 and every parameter still
                takes part, with gradient 0: DDP must not find one unused.
            reconstruct: part of the pairs that is reconstructed, in (0, 1]; 1: all, the paper's. At least one pair.
            draw: which pairs these are: a number that differs from step to step, an int or a 0-dim int64 tensor.
            features: as for :meth:`encode`; of samples that do not count, any finite number.
            seen: what the latent action is inferred from instead of (frame_t, frame_future), of their shape: augmented
                ones, so that z need not hold what changes in these alone. None: the frames themselves, the paper's.

        Raises:
            FrameError: wrong dtype or shape.
            LaraArgumentError: `reconstruct` is not a number in (0, 1]; or features, and an image encoder that trains.
        """
        config, share = self.config, check_share("LatentActionModel: reconstruct", reconstruct)
        frames = prepare_pair(frame_t, frame_future, valid, config.image_size)
        shown = frames if seen is None else prepare_pair(*seen, valid, config.image_size)
        if shown.shape != frames.shape:
            raise FrameError(f"seen is {list(shown.shape)}, but {list(frames.shape)}, like the frames, is expected")
        latent, quantizer_loss, terms = self._quantize(self._infer(shown, features=features)[0], valid)
        rows = None if share == 1 else draw_rows(len(latent.indices), share, draw, valid, frames.device)
        result = reconstruct_pairs(self.forward_dynamics, self.perceptual, frames, latent.quantized, valid, rows)
        loss = result.error
        if config.reconstruction_over_copy:
            loss = loss / result.copy_error.clamp(min=STILL)
        loss = loss + quantizer_loss
        distance = torch.zeros_like(loss) if result.distance is None else result.distance
        if result.distance is not None:
            loss = loss + config.perceptual_weight * distance
        return LatentActionOutput(
            loss=loss, reconstruction_loss=result.error, copy_loss=result.copy_error, codebook_loss=terms.codebook_loss,
            commitment_loss=terms.commitment_loss, perceptual_loss=distance, perplexity=terms.perplexity,
            codes_used=terms.codes_used, latent=latent, reconstruction=result.frames, reconstructed=rows,
        )  # fmt: skip

    def predict(self, frame_t: Tensor, latent: LatentAction | Tensor) -> Tensor:
        """Predict the future frame from the present one and a latent action (LARA, Eq. 2).

        Args:
            frame_t: [B, 3, H, W], uint8 in [0, 255] or float in [0, 1].
            latent: a LatentAction (its quantized tokens are used), tokens [B, N, D] float, or codes [B, N] int64.

        Returns:
            [B, 3, S, S] float32, [0, 1], at `image_size`.

        Raises:
            FrameError: wrong dtype or shape of the frame.
            LaraArgumentError: wrong shape of the latent.
        """
        present = prepare_pair(frame_t, frame_t, None, self.config.image_size)[0]
        tokens = latent.quantized if isinstance(latent, LatentAction) else latent
        if not tokens.is_floating_point():
            tokens = foreign.lookup_codes(self.quantizer, tokens)
        if tokens.shape != (present.shape[0], *self.latent_shape):
            raise LaraArgumentError(
                f"predict: latent is {list(latent.shape if isinstance(latent, Tensor) else tokens.shape)}, but "
                f"{[present.shape[0], *self.latent_shape]} (tokens) or {[present.shape[0], self.config.queries]} "
                "(codes) is expected"
            )
        frame: Tensor = self.forward_dynamics(present, tokens)
        return frame.clamp(0, 1)

    @torch.no_grad()
    def attention(self, frame_t: Tensor, frame_future: Tensor) -> Tensor:
        """What each query looks at in each layer of the inverse dynamics model.

        Args:
            frame_t: as for :meth:`encode`.
            frame_future: as for :meth:`encode`.

        Returns:
            [B, layers, heads, N, 2, h, w] float32 over the patches of (present, future) in reading order; a query's
            weights sum to 1 with what it gives to other tokens.
        """
        frames = prepare_pair(frame_t, frame_future, None, self.config.image_size)
        return self._infer(frames, want_attention=True)[1]

    def cache_features(
        self, folder: str | os.PathLike[str] | None, *, dtype: torch.dtype | None = None, max_gb: float | None = None
    ) -> FeatureCache | None:
        """Keep the frozen image encoder's features on disk, so that a frame that was seen before is not encoded again.

        For training on a bounded set of frames without augmentation (LARA on demonstrations), not for large-scale video.
        Processes may share a folder. Inside torch.compile it is passed over.

        Args:
            folder: created if needed; what an earlier run left there with the same encoder is used. None: stop.
            dtype: store in another precision, for instance torch.bfloat16 for half of float32's space; None: as the encoder
                gives them.
            max_gb: add at most so many 10^9 bytes; None: no bound.

        Returns:
            The cache, with its counts of hits and misses; None after `folder=None`.

        Raises:
            LaraArgumentError: the image encoder is the small one that trains.
        """
        encoder = self._frozen_encoder("cache_features")
        bound = None if max_gb is None else int(max_gb * 1e9)
        encoder.cache = None if folder is None else FeatureCache(folder, dtype, bound)
        return encoder.cache

    def prefetch_features(
        self,
        collate: Callable[[Any], Any] = default_collate,
        *,
        frames: str = "lara_frames",
        dtype: torch.dtype = torch.float32,
    ) -> FeatureReader:
        """A collate function by which a data loader's workers read the cached features, so that no step waits for them.

        Wrap what collates last: frames that change afterwards would come with the features of what they were. Frames have
        to travel at the model's image size. A batch of which a frame is not in the cache yet goes the ordinary way: its
        step encodes what is missing, and the workers find it from then on. Without workers nothing is gained.

        Args:
            collate: what it wraps: makes a mapping of samples, or a mapping that holds that one.
            frames: batch key of the frames, as in `attach_lara`; the features are under `<frames>_features`.
            dtype: precision that the encoder runs in: torch.bfloat16 under bfloat16 autocast, as `lara cache --dtype`.

        Raises:
            LaraArgumentError: no cache: call :meth:`cache_features` first; or an image encoder that trains.
        """
        encoder = self._frozen_encoder("prefetch_features")
        if encoder.cache is None:
            raise LaraArgumentError("prefetch_features: there is no cache yet; call cache_features(folder) first")
        fingerprint = encoder.cache.fingerprint(encoder)
        folder = folder_of(encoder.cache, fingerprint, str(dtype).removeprefix("torch."))
        config = self.config
        return FeatureReader(collate, frames, folder, fingerprint, config.image_size, config.difference_input)

    def narrow_encoder(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Hold the frozen image encoder's matrices in 16 bits, for good: about half of its memory.

        Under autocast of that dtype the results are bit-identical, and the matrices are not cast at each step.
        Elsewhere the encoder then runs in that precision, which rounds its features.

        Args:
            dtype: torch.bfloat16 or torch.float16.

        Raises:
            LaraArgumentError: another dtype, or the image encoder is the small one that trains.
        """
        encoder = self._frozen_encoder("narrow_encoder")
        if dtype not in (torch.bfloat16, torch.float16):
            raise LaraArgumentError(f"narrow_encoder: dtype={dtype}, but torch.bfloat16 or torch.float16 is expected")
        encoder.hold_in(dtype)

    def _frozen_encoder(self, asked: str) -> FrozenImageEncoder:
        if not isinstance(self.image_encoder, FrozenImageEncoder):
            raise LaraArgumentError(
                f"{asked}: this LAM has no frozen image encoder (image_encoder=None), and the features of one that trains "
                "change with every step"
            )
        return self.image_encoder

    def checkpoint_layers(self, enabled: bool = True) -> None:
        """Compute the activations of every transformer layer and of LPIPS again in the backward, instead of keeping them.

        Less memory for about a third more work. The quantiser is left out, so that it counts once. Not saved.
        """
        for part in self.modules():
            if isinstance(part, (TransformerLayer, PerceptualDistance)):
                part.checkpointing = enabled

    def health(self, pairs: Iterable[Sequence[Tensor]]) -> LatentHealth:
        """Reconstruction against the copy, use of the codes and signs of collapse; see :func:`measure_health`."""
        return measure_health(self, pairs)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write `config.json` and `model.safetensors`, whole or not at all, without frozen networks.

        Args:
            folder: created or replaced.
            state_dict: the gathered state where this process holds only a shard (FSDP1). FSDP2's and ZeRO-3's shards
                are gathered here: call it from every rank.
        """
        if state_dict is not None:  # whole already: nothing to gather, and perhaps no other rank to do it with
            checkpoint.write(folder, self.config, state_dict, self.origin)
            return
        with gathered(self):
            checkpoint.write(folder, self.config, self.state_dict(), self.origin)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload latent action model",
        token: str | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, in one commit, and a README.md where there is none.

        After a failure it is there whole or not at all; call it again, and files that were uploaded are not sent twice.
        Call it from one process.

        Args:
            repo_id: "user/name"; created if it does not exist.
            private: visibility of a repository that is created; None: what its owner's default is.
            revision: branch to commit to, created from main if it does not exist; None: the main branch.
            commit_message: of the one commit.
            token: access token; None: the one huggingface_hub finds.

        Returns:
            URL of the commit, which ends in its hash: what :meth:`from_pretrained` takes as `revision`.

        Raises:
            LaraArgumentError: `repo_id` is not an id, or `revision` is a commit.
            HubError: the Hub cannot be reached, or does not accept the upload; the message says why.
        """
        check_target(repo_id, revision)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "lam"
            self.save_pretrained(folder)
            return checkpoint.push(
                folder, repo_id, self.config, private=private, revision=revision, message=commit_message, token=token
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        revision: str | None = None,
        *,
        quantizer: nn.Module | None = None,
        backbone: nn.Module | None = None,
    ) -> LatentActionModel:
        """Load what :meth:`save_pretrained` wrote; the result is in eval mode, on the CPU.

        Args:
            source: local folder, or Hub id.
            revision: commit, tag or branch on the Hub.
            quantizer: as for the constructor; its weights are loaded too.
            backbone: as for the constructor.

        Raises:
            AdapterFormatError: missing, truncated, foreign or newer files, wrong names or shapes, NaN.
            HubError: the repository cannot be reached, found or read.
            LaraArgumentError: the image encoder cannot be loaded or does not fit.
        """
        folder = checkpoint.locate(source, revision)
        config = checkpoint.read_config(folder)
        tensors = read_tensors(folder / checkpoint.WEIGHTS)
        _check_size(config, tensors, folder)
        # the random start is overwritten, and the caller's random state must not change
        with torch.random.fork_rng(devices=[]), float32_default("cpu"):
            model = cls(config, quantizer=quantizer, backbone=backbone)
        load_into(model, tensors, folder / checkpoint.WEIGHTS)
        model.origin = checkpoint.read_origin(folder)
        return model.eval()

    def _infer(
        self, frames: Tensor, want_attention: bool = False, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Continuous latent [B, N, D] float32 of pairs [2, B, 3, S, S], and the attention maps if wanted."""
        config = self.config
        nothing = no_difference(frames[0]) if config.reads_nothing else None
        if features is not None:
            tokens = self._frozen_encoder("features").take(features, frames.shape[1])
            nothing = None if nothing is None else self.image_encoder(nothing)
        else:
            images = (with_difference(frames) if config.difference_input else frames).flatten(0, 1)
            encoded = self.image_encoder(images if nothing is None else torch.cat([images, nothing]))
            if nothing is not None:
                encoded, nothing = encoded.split((len(images), 1))
            tokens = encoded.chunk(3 if config.difference_input else 2)
        latent, attention = self.inverse_dynamics(*tokens, nothing=nothing, want_attention=want_attention)
        return latent, attention

    def assign_codes(self, z: Tensor) -> LatentAction:
        """The latent action of continuous latents [B, N, D] float32; codebook and usage do not change."""
        if isinstance(self.quantizer, VectorQuantizer):
            quantized, indices = self.quantizer(z, update=False, want_loss=False)
        else:
            quantized, indices, *_ = foreign.quantize(self.quantizer, self._keywords, z, None, False)
        return LatentAction(z, quantized, indices)

    def _quantize(self, z: Tensor, valid: Tensor | None) -> tuple[LatentAction, Tensor, QuantizerTerms]:
        """The latent action of continuous latents, and the quantiser's loss."""
        if isinstance(self.quantizer, VectorQuantizer):
            quantized, indices, loss, terms = self.quantizer(z, valid, want_terms=True)
        else:
            update = any(parameter.requires_grad for parameter in self.parameters())
            quantized, indices, loss, terms = foreign.quantize(self.quantizer, self._keywords, z, valid, update)
        return LatentAction(z, quantized, indices), loss, terms


def count_parameters(config: LatentActionConfig) -> int:
    """Parameters in the module tree of a :class:`LatentActionModel`, all trainable, without building it.

    Nothing is allocated or downloaded; a frozen image encoder and the perceptual network are outside the tree.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        parts = [InverseDynamics(config), VectorQuantizer.from_config(config), ForwardDynamics(config)]
        if config.image_encoder is None:
            parts.append(PatchEncoder(config))
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def _check_size(config: LatentActionConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a configuration of far more parameters than its file holds, before anything of that size is allocated."""
    held = sum(tensor.numel() for tensor in tensors.values())
    layers = config.idm_layers + config.fdm_layers + (config.encoder_layers if config.image_encoder is None else 0)
    # the slack is for a quantiser of the user's own; its codebook may be smaller than ours
    if layers > len(tensors) or count_parameters(config) > 2 * held + 2**22:
        raise AdapterFormatError(
            f"{folder / checkpoint.CONFIG} describes a model of another size: {checkpoint.WEIGHTS} holds {held} numbers in "
            f"{len(tensors)} tensors"
        )
