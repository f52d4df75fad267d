"""What becomes of pixels: whole images, crops, flips, grey and colour, mean and std."""

import numpy as np
import pytest
import torch
from PIL import Image

from rlrr_kernels.finetune.data import make_transform

HALF = ((0.5,) * 3, (0.5,) * 3)


def ramp(width, height):
    """Red grows to the right, green downwards, over the whole range."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def span(channel):
    """How much of the original range is seen, from 0 to 1."""
    return (channel.max() - channel.min()).item() / 2


def test_squash_shows_the_whole_image_normalised():
    grey = make_transform((1, 28, 28), (0.5,), (0.25,), "bilinear", train=True)
    out = grey(Image.new("RGB", (8, 8), (255, 255, 255)))
    assert out.dtype is torch.float32
    assert torch.equal(out, torch.full((1, 28, 28), 2.0))
    rgb = make_transform((3, 16, 24), *HALF, "bicubic", train=False)
    assert torch.equal(rgb(Image.new("L", (8, 8), 0)), torch.full((3, 16, 24), -1.0))
    out = rgb(ramp(300, 150))
    assert out.shape == (3, 16, 24)
    assert span(out[0]) > 0.93
    assert span(out[1]) > 0.9


def test_bicubic_is_pillows():
    image = ramp(50, 40)
    image.putpixel((20, 20), (255, 255, 255))
    out = make_transform((3, 16, 24), (0.0,) * 3, (1.0,) * 3, "bicubic", train=False)(image)
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal((out * 255).round().numpy(), expected)


def test_crop_trains_on_224_of_256_of_the_whole_image_and_tests_on_the_centre():
    options = {"interpolation": "bilinear", "resize": "crop"}
    train = make_transform((3, 224, 224), *HALF, train=True, **options)
    test = make_transform((3, 224, 224), *HALF, train=False, **options)
    image = ramp(1000, 500)
    expected = (np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR)) / 127.5 - 1).transpose(2, 0, 1)
    assert np.allclose(test(image).numpy(), expected[:, 16:240, 16:240], atol=1e-5)
    corners = set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = train(image).numpy()
        found = [
            (top, left)
            for top in range(33)
            for left in range(33)
            if np.allclose(out[:, ::223, ::223], expected[:, top : top + 224 : 223, left : left + 224 : 223], atol=1e-5)
        ]
        assert found
        corners.add(found[0])
    assert len(corners) > 8
    assert min(corners)[0] < 10
    assert max(corners)[0] > 22


def test_the_margin_grows_with_the_input_and_neither_side_keeps_the_other():
    test = make_transform((3, 112, 56), *HALF, "bilinear", train=False, resize="crop")
    out = test(ramp(256, 256))
    assert out.shape == (3, 112, 56)
    assert abs(span(out[0]) - 224 / 256) < 0.02
    assert abs(span(out[1]) - 224 / 256) < 0.02


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_flip_mirrors_half_of_the_training_images_and_no_other(resize):
    def mirrored(train, flip):
        seen = make_transform((1, 8, 8), (0.5,), (0.5,), "bilinear", train=train, resize=resize, flip=flip)
        torch.manual_seed(0)
        return sum(bool(out[0, 4, 0] > out[0, 4, -1]) for out in (seen(ramp(16, 16)) for _ in range(200)))

    assert 70 < mirrored(train=True, flip=True) < 130
    assert mirrored(train=True, flip=False) == mirrored(train=False, flip=True) == 0


@pytest.mark.gpu
def test_a_gpu_normalises_to_the_same_bits(gpu):
    finished = make_transform((3, 8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", train=False).finished
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    assert torch.equal(finished(pixels.to(gpu)).cpu(), finished(pixels))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"resize": "crops"}, "resize: expected squash or crop, got 'crops'"),
        ({"interpolation": "cubic"}, "interpolation: expected bicubic, .* got 'cubic'"),
    ],
)
def test_unknown_words_are_refused(change, error):
    options = {"interpolation": "bicubic", "resize": "squash", "train": True} | change
    with pytest.raises(ValueError, match=error):
        make_transform((3, 8, 8), *HALF, **options)
