"""The explorer: the decoder's layers against the model, the command, and the page in a real Chromium."""

import json
import re
from importlib import resources

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser
from documents import ROOT
from pictures import write_folder
from torch import nn

from bvae import BetaVAE, fit
from bvae.architectures import ARCHITECTURES, Network
from bvae.config import Config, DataConfig
from bvae.datasets import held_out, open_data
from bvae.errors import UsageError
from bvae.explore import main
from bvae.explorer.layers import decode, export
from bvae.explorer.page import FILES, Shown, join, write
from bvae.images import to_uint8
from bvae.metrics import kl_per_latent
from bvae.training import completion

SIDE = 32
IMAGE = (3, SIDE, SIDE)
TOLERANCE = 1e-3  # of the range, for float16 weights


def trained(**options) -> BetaVAE:
    """A model whose BatchNorm has seen data."""
    torch.manual_seed(0)
    model = BetaVAE(**options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


MODELS = {
    "pytorch-vae": {"latent_dim": 6, "hidden_dims": (6, 9, 12), "image_size": 64},
    "odd sizes": {"latent_dim": 3, "hidden_dims": (5, 6, 7), "image_size": 41, "in_channels": 1},
    "burgess": {"arch": "burgess", "latent_dim": 10, "in_channels": 1, "activation": "sigmoid"},
    "higgins-fc": {"arch": "higgins-fc", "latent_dim": 10, "in_channels": 1, "image_size": SIDE},
    "locatello": {"arch": "locatello", "latent_dim": 5, "image_size": 48, "activation": "sigmoid"},
}


# --- Layers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_layers_decode_as_the_model_does(name):
    model = trained(**MODELS[name])
    exported = export(model)
    z = torch.randn(5, model.latent_dim)
    expected = model.decode(z)
    low, high = model.pixel_range
    assert (decode(exported, z) - expected).abs().max() < TOLERANCE * (high - low)
    assert expected.std() > 10 * TOLERANCE / 5  # not one colour
    assert exported.weights.dtype == torch.float16


class Doubled(nn.Sequential):
    """Not what its layers are."""

    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Linear):
    """Not what its class is."""

    def forward(self, x):
        return super().forward(x) / 2


def network_with(decoder):
    """The builder of a network whose decoder has this module between a linear layer and the image."""

    def build(channels, size, latent_dim, widths):
        pixels = channels * size * size
        parts = nn.Sequential(decoder(pixels), nn.Unflatten(1, (channels, size, size)))
        encoder, head = nn.Flatten(), nn.Linear(pixels, 2 * latent_dim)
        return Network(encoder, head, nn.Linear(latent_dim, pixels), (pixels,), parts)

    return build


OWN = {
    "LeakyReLU": (lambda pixels: nn.LeakyReLU(0.2), None),
    "softplus": (lambda pixels: nn.Softplus(), "has a Softplus, which is none of the layers known here"),
    "own Sequential": (lambda pixels: Doubled(nn.ReLU()), "has a Doubled, which is none"),
    "own Linear": (lambda pixels: Halved(pixels, pixels), "give pixels that differ by"),
    "lonely norm": (
        lambda pixels: nn.Sequential(nn.Unflatten(1, IMAGE), nn.BatchNorm2d(3)),
        "BatchNorm2d that does not follow a convolution",
    ),
    "view": (lambda pixels: nn.Unflatten(1, (3, SIDE * SIDE)), "no image and no vector"),
    "dilated": (
        lambda pixels: nn.Sequential(nn.Unflatten(1, IMAGE), nn.Conv2d(3, 3, 3, padding=2, dilation=2)),
        "not a plain square one",
    ),
    "linear rows": (
        lambda pixels: nn.Sequential(nn.Unflatten(1, IMAGE), nn.Linear(SIDE, SIDE)),
        "is not a row of layers",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_networks_of_ones_own(name, monkeypatch):
    build, message = OWN[name]
    monkeypatch.setitem(ARCHITECTURES, name, network_with(build))
    model = BetaVAE(3, 2, image_size=SIDE, arch=name)
    if message is None:
        kinds = [layer["kind"] for layer in export(model).layers]
        assert kinds == ["convolution", "view", "leaky_relu", "view", "tanh"]
        return
    with pytest.raises(UsageError, match=message):
        export(model)


def test_weights_beyond_float16():
    model = trained(**MODELS["burgess"])
    with torch.no_grad():
        model.decoder[-1].bias.fill_(1e5)
    with pytest.raises(UsageError, match="weights beyond float16's 65504"):
        export(model.eval())


# --- Runs -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("own", [False, True])
def test_every_run_writes_its_page_at_its_end(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ARCHITECTURES, "own", network_with(OWN["softplus"][0]))
    images = torch.randint(256, (20, SIDE, SIDE, 3), dtype=torch.uint8)
    arch = {"arch": "own"} if own else {}
    tiny = {"hidden_dims": (4, 8), "latent_dim": 2, "batch_size": 8, "max_steps": 2, "device": "cpu"}
    fitted = fit(images, out=tmp_path / "run", **tiny, **arch)
    assert completion.is_marked(tmp_path / "run")
    path = tmp_path / "run" / "explorer.html"
    said = [line for line in capsys.readouterr().out.splitlines() if "explorer.html" in line]
    if own:
        assert not path.exists()
        assert said == [f"no explorer.html: run: the decoder {OWN['softplus'][1]}"]
        return
    assert said == []
    data = contents(path)
    assert data["models"][0]["name"] == "run"
    assert len(data["images"]) == 2  # every tenth is held out
    shown = {each["index"]: each["kl"] for each in data["models"][0]["latents"]}
    known = dict(enumerate(fitted.validation.kl_per_dim))
    active = {latent: kl for latent, kl in known.items() if kl > 0.01} or known
    assert shown == pytest.approx(active, abs=1e-4)
    with torch.no_grad():
        codes = fitted.model.encode(images[::10].permute(0, 3, 1, 2))[0]
    np.testing.assert_allclose(data["models"][0]["codes"], codes, atol=1e-5)


def contents(path):
    """What a page holds of its models."""
    return json.loads(
        re.search('<script type="application/json" id="data">(.*?)</script>', path.read_text())[1]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders, on the same folder of images."""
    root = tmp_path_factory.mktemp("explored")
    images = write_folder(root / "images", 40)
    for name, latents in (("one", 6), ("two", 3)):
        model = trained(**{**MODELS["pytorch-vae"], "image_size": SIDE, "latent_dim": latents})
        with torch.no_grad():
            model.decoder_input.weight *= 4
            model.head.weight[:latents] *= 10
            model.head.weight[0] = 0  # the latent with the least KL, none
            model.head.bias[[0, latents]] = 0
            model.head.weight[latents] = 0
        model.save_pretrained(root / name)
        config = Config(data=DataConfig(name="folder", root=images, image_size=SIDE))
        (root / name / "config.yaml").write_text(config.to_yaml())
    return root


def test_the_command_writes_the_page(runs, capsys):
    assert main([str(runs / "one")]) == 0
    path = runs / "one" / "explorer.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    data = contents(path)
    (shown,) = data["models"]
    config = Config(data=DataConfig(name="folder", root=runs / "images", image_size=SIDE)).data
    images = held_out(config, 512)
    valid = open_data(config, 4, 0, torch.device("cpu")).valid
    assert torch.equal(images, valid.head(99))
    model = BetaVAE.from_pretrained(runs / "one")
    with torch.no_grad():
        kl = kl_per_latent(*model.encode(images.permute(0, 3, 1, 2)))
    order = kl.argsort(descending=True).tolist()
    assert order[-1] == 0 == kl[0]
    assert [each["index"] for each in shown["latents"]] == order[:-1]  # latent 0 is not active
    assert [each["kl"] for each in shown["latents"]] == pytest.approx(kl[order[:-1]].tolist(), abs=1e-4)
    assert data["start"] == np.linalg.norm(shown["codes"], axis=1).argmin()


def test_two_runs_side_by_side(runs, tmp_path, capsys):
    assert main([str(runs / "one"), str(runs / "two")]) == 0
    path = runs / "one" / "explorer-two.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    assert [model["latent_dim"] for model in contents(path)["models"]] == [6, 3]
    assert main([str(runs / "one"), str(runs / "two"), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_bytes() == path.read_bytes()


def test_a_model_whose_images_are_not_known(runs, tmp_path, capsys):
    model = BetaVAE.from_pretrained(runs / "one")
    with torch.no_grad():
        model.decoder_input.weight[:, 4] *= 9
    model.save_pretrained(tmp_path / "<script>")
    assert main([str(tmp_path / "<script>")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "latents are ordered by what is seen, not by KL: no config.yaml says" in said[0]
    data = contents(tmp_path / "<script>" / "explorer.html")
    assert data["models"][0]["name"] == "<script>"
    assert data["images"] == []
    assert data["models"][0]["latents"][0] == {"index": 4, "kl": None}
    assert len(data["models"][0]["latents"]) == 6


def test_bad_input_is_one_line(runs, tmp_path, monkeypatch, capsys):
    one = str(runs / "one")
    trained(**MODELS["odd sizes"]).save_pretrained(tmp_path / "small")
    monkeypatch.setitem(ARCHITECTURES, "own", network_with(OWN["softplus"][0]))
    BetaVAE(3, 2, image_size=SIDE, arch="own").save_pretrained(tmp_path / "own")
    (tmp_path / "bare").mkdir()
    trained(**MODELS["odd sizes"]).save_config(tmp_path / "bare")
    for arguments, message in [
        ([str(tmp_path)], "holds no config.json"),
        ([str(tmp_path / "bare")], "holds no model.safetensors and no checkpoint"),
        ([str(tmp_path / "own")], "own: the decoder has a Softplus, which is none of the layers known here"),
        ([one, str(tmp_path / "small")], "small has images of [1, 41, 41] and one of [3, 32, 32]"),
        ([one, one, one], "name a run folder, or two to see them side by side, got 3"),
        ([], "name a run folder, or two"),
        ([one, "--out", "page.pdf"], "--out must end in .html, got page.pdf"),
    ]:
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_the_page_in_docs_is_of_today_and_small():
    path = ROOT / "docs" / "explorer.html"
    assert path.read_text() == join(contents(path)), (
        "bvae/explorer has changed: rewrite docs/explorer.html as join(contents(path))"
    )
    assert path.stat().st_size < 1_500_000
    assert len(contents(path)["images"]) == 8


# --- In Chromium ------------------------------------------------------------------------------------------
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@needs_chromium
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_page_decodes_as_the_model_does(tab, name, tmp_path):
    """In its own script, with all digits."""
    model = trained(**MODELS[name])
    write(tmp_path / "page.html", [Shown(name, model, None)], None)
    (described,) = contents(tmp_path / "page.html")["models"]
    z = torch.randn(3, model.latent_dim)
    script = (resources.files("bvae.explorer") / FILES["decoder"]).read_text()
    decoded = tab.evaluate(
        f"{{{script}; const decoder = new Decoder({json.dumps(described)});"
        f"{json.dumps(z.tolist())}.map(z => Array.from(decoder.decode(z)))}}"
    )
    low, high = model.pixel_range
    expected = model.decode(z).permute(0, 2, 3, 1).flatten(1)
    assert (torch.tensor(decoded) - expected).abs().max() < TOLERANCE * (high - low)


SETTLED = """new Promise(done => {
  const look = () => views.some(view => view.pending) ? setTimeout(look, 5) : done();
  look();
})"""


def pixels(tab, canvas):
    """The RGB of a canvas, when all is decoded: uint8 [H, W, 3]."""
    tab.evaluate(SETTLED)
    read = "c => [c.width, Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
    width, data = tab.evaluate(f"({read})({canvas})")
    return np.array(data, np.int64).reshape(-1, width, 4)[..., :3]


@torch.no_grad()
def check_picture(tab, model, z, canvas="views[0].canvas", left=0):
    """A canvas shows what torch decodes from z, but for rounding."""
    expected = to_uint8(model.decode(torch.tensor(z)[None].float()), model.pixel_range)[0].numpy()
    found = pixels(tab, canvas)[:, left : left + SIDE]
    assert np.abs(found - expected.astype(int)).max() <= 1
    assert expected.std() > 2


def click(tab, selector, place=0):
    tab.evaluate(f"document.querySelectorAll('{selector}')[{place}].click()")


@needs_chromium
def test_sliders_and_buttons(tab, runs):
    model = BetaVAE.from_pretrained(runs / "one")
    assert main([str(runs / "one")]) == 0
    path = runs / "one" / "explorer.html"
    data = contents(path)
    codes, order = data["models"][0]["codes"], [each["index"] for each in data["models"][0]["latents"]]
    tab.open(path)
    z = list(codes[data["start"]])
    check_picture(tab, model, z)
    check_picture(tab, model, codes[2], "views[0].tiles[2]")

    click(tab, ".tiles button", 1)
    z = list(codes[1])
    check_picture(tab, model, z)
    pressed = "[...document.querySelectorAll('.tiles button')].map(tile => tile.ariaPressed)"
    assert tab.evaluate(pressed) == ["false", "true", "false", "false"]

    # A real key moves the second slider, whose strip then shows nine values of this latent.
    tab.evaluate("document.querySelectorAll('input')[1].focus()")
    tab.press("ArrowRight", 39)
    z[order[1]] = float(tab.evaluate("document.querySelectorAll('input')[1].value"))
    assert 0 < z[order[1]] - codes[1][order[1]] <= 0.1
    check_picture(tab, model, z)
    for place in (0, 4, 8):
        there = [*z]
        there[order[1]] = 0.75 * place - 3
        check_picture(tab, model, there, "document.querySelector('.held canvas')", place * (SIDE + 2))
    value = f"{z[order[1]]:.2f}".replace("-", "\u2212")
    assert tab.evaluate("document.querySelectorAll('output')[1].textContent") == value

    click(tab, "#reset")
    check_picture(tab, model, codes[1])

    click(tab, "#sample")
    z = tab.evaluate("Array.from(views[0].z)")
    assert len({*map(str, z)}) == 6
    check_picture(tab, model, z)
    assert tab.evaluate("document.querySelector('#status').textContent") == "Sampled from the prior"

    click(tab, "#play")
    tab.evaluate("new Promise(done => setTimeout(done, 200))")
    click(tab, "#play")
    moved = tab.evaluate("Array.from(views[0].z)")
    assert [i for i in range(6) if moved[i] != z[i]] == [order[1]]
    check_picture(tab, model, moved)
    assert tab.errors == []


@needs_chromium
def test_the_newest_z_wins(tab, runs):
    """Fifty moves while one picture is decoded: two pictures, of the first and of the last."""
    main([str(runs / "one")])
    tab.open(runs / "one" / "explorer.html")
    tab.evaluate(SETTLED)
    tab.evaluate("""
      decoded = [];
      const post = views[0].worker.postMessage.bind(views[0].worker);
      views[0].worker.postMessage = message => { decoded.push(Array.from(message.z)); post(message); };
      const slider = document.querySelector('input');
      for (let k = 0; k < 50; k++) { slider.value = k / 20; slider.dispatchEvent(new Event('input')); }
    """)
    tab.evaluate(SETTLED)
    first = contents(runs / "one" / "explorer.html")["models"][0]["latents"][0]["index"]
    assert [z[first] for z in tab.evaluate("decoded")] == pytest.approx([0, 2.45])


@needs_chromium
def test_two_models_in_one_page(tab, runs):
    main([str(runs / "one"), str(runs / "two")])
    path = runs / "one" / "explorer-two.html"
    data = contents(path)
    tab.open(path)
    click(tab, ".tiles button", 3)
    for place, name in enumerate(("one", "two")):
        model = BetaVAE.from_pretrained(runs / name)
        code = data["models"][place]["codes"][3]
        check_picture(tab, model, code, f"views[{place}].canvas")
        check_picture(tab, model, code, f"views[{place}].tiles[3]")
    sliders = [len(model["latents"]) for model in data["models"]]
    assert tab.evaluate("document.querySelectorAll('input').length") == sum(sliders)
    tab.evaluate(f"document.querySelectorAll('input')[{sliders[0]}].focus()")
    assert tab.evaluate("document.querySelectorAll('.held').length") == 1
    saved = """new Promise(done => {
      HTMLAnchorElement.prototype.click = function () {
        const picture = Object.assign(new Image(), { src: this.href });
        picture.onload = () => done([this.download, picture.width, picture.height]);
      };
      document.querySelector('#save').click();
    })"""
    assert tab.evaluate(saved) == ["one-two.png", 2 * SIDE, SIDE]
    assert tab.errors == []


@needs_chromium
def test_a_screen_reader_gets_names_and_values(tab, runs):
    main([str(runs / "one")])
    tab.open(runs / "one" / "explorer.html")
    tab.evaluate(SETTLED)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node["name"]["value"]) for node in nodes if "name" in node]
    latents = contents(runs / "one" / "explorer.html")["models"][0]["latents"]
    assert [name for role, name in named if role == "slider"] == [
        f"Latent {each['index']} {each['kl']:.2f} nats" for each in latents
    ]
    assert [name for role, name in named if role == "button"] == [
        *("Play", "Reset", "Sample", "Save PNG"),
        *(f"Held-out image {place + 1} of 4" for place in range(4)),
    ]
    assert ("image", "Picture decoded by one") in named
    assert ("heading", "one") in named


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk_and_loads_nothing(tab, runs, width):
    main([str(runs / "one"), str(runs / "two")])
    path = runs / "one" / "explorer-two.html"
    tab.resize(width, 844)
    tab.open(path)
    tab.evaluate(SETTLED)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    loaded = tab.evaluate("performance.getEntriesByType('resource').map(each => each.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []
    assert tab.errors == []
