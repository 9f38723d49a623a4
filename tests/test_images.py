"""Images into a model and out of it: preprocess, encode's checks, to_images; and `python -m bvae.sample`."""

import numpy as np
import pytest
import torch
from pictures import smooth
from PIL import Image

from bvae import BetaVAE
from bvae.errors import UsageError
from bvae.images import read_image
from bvae.sample import main

SIDE = 32


@pytest.fixture(params=["tanh", "sigmoid"])
def model(request):
    torch.manual_seed(0)
    return BetaVAE(3, 4, (4, 8), SIDE, request.param).eval()


# ---- encode ------------------------------------------------------------------------------------------------
def test_uint8_is_scaled(model):
    low, high = model.pixel_range
    pixels = torch.randint(256, (5, 3, SIDE, SIDE), dtype=torch.uint8)
    x = low + (high - low) * pixels / 255
    for ours, expected in zip(model.encode(pixels), model.encode(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_pixels_out_of_range_are_refused(model):
    low, high = model.pixel_range
    x = torch.rand(2, 3, SIDE, SIDE)
    with pytest.raises(UsageError, match=rf"x must lie in \[{low:g}, {high:g}\].*give uint8 pixels"):
        model.encode(255 * x)
    with pytest.raises(UsageError, match="model.preprocess"):
        model.encode(x - 3)
    model.encode(low + (high - low) * (1.04 * x - 0.02))  # what resizing overshoots
    with pytest.raises(UsageError, match="got nan to nan"):
        model.encode(torch.full_like(x, torch.nan))
    with pytest.raises(UsageError, match="x must be a tensor, got ndarray: model.preprocess"):
        model.encode(x.numpy())
    assert model.encode(x.double())[0].dtype == torch.float32


def test_another_shape_is_refused(model):
    with pytest.raises(UsageError, match=r"x must be \[N, 3, 32, 32\], got \[1, 3, 64, 64\]"):
        model.encode(torch.zeros(1, 3, 64, 64))


def test_a_compiled_encoder_does_not_look(model):
    encode = torch.compile(model.encode, backend="eager", fullgraph=True)
    x = torch.rand(2, 3, SIDE, SIDE)
    assert torch.equal(encode(x)[0], model.encode(x)[0])


# ---- preprocess and back -----------------------------------------------------------------------------------
def test_any_form_of_a_picture_gives_the_same(model):
    image = smooth((48, 40))
    pixels = np.array(image)
    expected = model.preprocess(image)
    assert expected.shape == (1, 3, SIDE, SIDE)
    forms = [
        pixels,
        pixels[None],
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        [image],
    ]
    forms += [torch.from_numpy(pixels) / 255, [pixels]]
    for form in forms:
        assert torch.equal(model.preprocess(form), expected)
    assert model.preprocess([image, image]).shape == (2, 3, SIDE, SIDE)
    low, high = model.pixel_range
    assert low <= expected.min() < expected.max() <= high


def test_grey_and_colour_are_what_the_model_sees(model):
    grey = smooth((SIDE, SIDE)).convert("L")
    x = model.preprocess(grey)
    assert torch.equal(x[:, 0], x[:, 1])
    alone = BetaVAE(1, 2, (4,), SIDE).eval()
    assert alone.preprocess(smooth((SIDE, SIDE))).shape == (1, 1, SIDE, SIDE)
    assert alone.preprocess(np.zeros((40, SIDE, SIDE), np.uint8)).shape == (40, 1, SIDE, SIDE)
    assert alone.preprocess(np.zeros((SIDE, SIDE), np.uint8)).shape == (1, 1, SIDE, SIDE)


def test_a_round_trip_keeps_every_pixel(model):
    image = smooth((SIDE, SIDE))
    (back,) = model.to_images(model.preprocess(image))
    assert back.mode == "RGB"
    assert np.array_equal(np.array(back), np.array(image))


def test_a_file_is_read_as_preprocess_has_it(model, tmp_path):
    smooth((50, 60)).save(tmp_path / "a.png")
    x = read_image(tmp_path / "a.png", None, model.input_shape, model.pixel_range)
    assert torch.equal(x, model.preprocess(Image.open(tmp_path / "a.png")))


# ---- python -m bvae.sample ---------------------------------------------------------------------------------
@pytest.fixture
def run(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_samples_are_the_seeds(run, model, capsys):
    assert main([str(run), "--n", "6", "--seed", "3"]) == 0
    path = run / "samples-6.png"
    assert capsys.readouterr().out == f"{path}\n"
    first = path.read_bytes()
    assert main([str(run), "--n", "6", "--seed", "3"]) == 0
    assert path.read_bytes() == first
    assert main([str(run), "--n", "6", "--seed", "4"]) == 0
    assert path.read_bytes() != first


def test_a_folder_gets_a_file_each(run, model, tmp_path):
    assert main([str(run), "--n", "3", "--seed", "3", "--out", str(tmp_path / "new" / "drawn")]) == 0
    names = sorted(path.name for path in (tmp_path / "new" / "drawn").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png"]
    expected = model.to_images(model.sample(3, torch.Generator().manual_seed(3)))
    found = Image.open(tmp_path / "new" / "drawn" / "00001.png")
    assert np.array_equal(np.array(found), np.array(expected[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "0"], "--n must be positive, got 0"),
        (["--which", "best"], "no best checkpoint"),
    ],
)
def test_refused(run, options, message, capsys):
    assert main([str(run), *options]) == 2
    assert message in capsys.readouterr().err
