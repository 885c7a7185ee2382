"""What LeRobot's preprocessors would download, made here: a word-level tokenizer and a Qwen3-VL processor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from .lerobot_tiny import clip_folder

# their positions are the ids that the tiny GR00T's configuration names
_QWEN_WORDS = ["<pad>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<unk>", "push", "the"]
_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


class _Tokenizer:
    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(clip_folder())


def _qwen3_vl(*args: Any, **kwargs: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_QWEN_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=_QWEN_WORDS[1:5],
        padding_side="left",
    )  # fmt: skip
    one_token = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}  # the image is resized to 2 x 2 patches, merged
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, size=one_token)
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(patch_size=16), chat_template=_TEMPLATE)


@contextlib.contextmanager
def tiny_processors() -> Iterator[None]:
    """Within it LeRobot's real preprocessors run without a download."""
    import lerobot.policies.groot.processor_groot as groot
    import lerobot.processor.tokenizer_processor as tokens

    with (
        mock.patch.object(tokens, "AutoTokenizer", _Tokenizer),
        mock.patch.object(groot, "_build_n1_7_processor", _qwen3_vl),
    ):
        yield
