import pytest
import torch

from lara_adapter import FrameError, FramePair

GOOD = torch.randint(0, 256, (4, 2, 3, 8, 8), dtype=torch.uint8)


def test_splits_present_and_future():
    pair = FramePair.from_tensor(GOOD)
    assert torch.equal(pair.present[:, 0], GOOD[:, 0])
    assert torch.equal(pair.future[:, 0], GOOD[:, 1])
    assert pair.present.shape == (4, 1, 3, 8, 8)
    assert pair.valid.tolist() == [True] * 4


def test_views():
    views = GOOD[:, None].repeat(1, 2, 1, 1, 1, 1)
    assert FramePair.from_tensor(views).future.shape == (4, 2, 3, 8, 8)


def test_floats_in_range_with_the_slack_of_resampling():
    frames = GOOD.float() / 255
    frames[0, 0, 0, 0, 0] = 1.0005
    assert FramePair.from_tensor(frames).present.dtype == torch.float32


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (None, "is a NoneType, but a tensor"),
        (GOOD[0], r"has shape \[2, 3, 8, 8\].*one frame is missing"),
        (GOOD[:, 0], r"has shape \[4, 3, 8, 8\].*stack the present and the future"),
        (GOOD.movedim(2, -1), r"channels-last: frames\.movedim\(-1, -3\)"),
        (GOOD[:, :1], r"has shape \[4, 1, 3, 8, 8\]"),
        (GOOD[:, :, :1], r"has shape \[4, 2, 1, 8, 8\]"),
        (GOOD[:0], "is empty"),
        (GOOD.long(), "is torch.int64, but uint8"),
        (GOOD > 3, "is torch.bool, but uint8"),
        (GOOD.float() / 60 - 2, "undo their normalisation"),
        (GOOD.float(), r"in \[0, 25\d\], but float frames must lie in \[0, 1\]: frames / 255"),
        (GOOD.float() / 127.5 - 1, r"must lie in \[0, 1\]: \(frames \+ 1\) / 2"),
        ((GOOD.float() / 255).index_put((torch.tensor(0),), torch.tensor(float("nan"))), "holds NaN"),
    ],
)
def test_bad_frames_say_what_and_how_to_fix_it(frames, message):
    with pytest.raises(FrameError, match=message):
        FramePair.from_tensor(frames)


@pytest.mark.parametrize("valid", [[True] * 4, torch.ones(4), torch.ones(3, dtype=torch.bool), torch.ones(4, 1) > 0])
def test_bad_flags(valid):
    with pytest.raises(FrameError, match=r"lara_frames_valid is .* bool \[4\] is expected"):
        FramePair.from_tensor(GOOD, valid)


def test_a_pair_from_a_callable_is_checked_too():
    pair = FramePair.from_tensor(GOOD)
    assert torch.equal(pair.checked("frames").present, pair.present)
    with pytest.raises(FrameError, match="they must agree"):
        FramePair(pair.present, pair.future.float(), pair.valid).checked("frames")
    with pytest.raises(FrameError, match="FramePair of Tensor and NoneType"):
        FramePair(pair.present, None, pair.valid).checked("frames")
