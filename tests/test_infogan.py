"""`python -m bvae.infogan` as a user runs it, the codes, and the commands that take its run folder."""

import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from hostile_checkpoints import mutations
from safetensors.torch import load_file
from test_hostile_runs import WRITTEN, check_line, in_a_fork, rewrite
from tiny import NETWORK

from bvae import compare, evaluate, explore, export, sample, train, traverse
from bvae.errors import UsageError
from bvae.evaluation import measure
from bvae.evaluation.comparison import categories_by_factor
from bvae.evaluation.options import Protocol
from bvae.infogan import main
from bvae.infogan_model import InfoGAN
from bvae.model import BetaVAE
from bvae.pipelines import faces
from bvae.training import checkpoint, infogan
from bvae.training.completion import is_marked
from bvae.training.infogan_cli import InfoGANConfig, checkpointed, parse
from bvae.training.step import NotFinite

TINY = [
    *("--codes", "3", "--categories", "4", "--noise", "5", "--width", "2", "--batch-size", "16"),
    *("--log-every", "2", "--checkpoint-every", "4", "--device", "cpu"),
]
FEW = ["--points", "40", "--factor-bins", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 drawn faces: 48 to train on, 3 steps an epoch."""
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=60, seed=0, progress=False)


@pytest.fixture(scope="module", autouse=True)
def fewer_measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infogan, "MEASURED", 500)
        yield


def run(data, out, *options):
    return main(["--data-root", str(data), "--out", str(out), *TINY, *map(str, options)])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of ten steps without a stop."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(data, out, "--max-steps", 10) == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(whole, tmp_path / "run")


def records(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


# --- The model --------------------------------------------------------------------------------------------
def test_codes_are_categories_on_a_vaes_scale():
    """Category k of K is at -3 + 6 k / (K - 1): the ends of a walk are the first and the last."""
    model = InfoGAN(latent_dim=2, categories=4, noise=3, width=2).eval()
    categories = torch.tensor([[0, 3], [1, 2]])
    expected = model.generate(categories, torch.zeros(2, 3)).tanh()
    assert torch.equal(model.decode(torch.tensor([[-3.0, 3.0], [-1.0, 1.0]])), expected)
    assert torch.equal(model.decode(torch.tensor([[-9.0, 2.1], [-1.9, 0.1]])), expected)


def test_what_q_reads_and_how_sure_it_is():
    """The code is the most probable category; KL(Q, prior) is log 4 - H(Q) in closed form."""
    model = InfoGAN(latent_dim=3, categories=4, width=2).eval()
    probabilities = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0], [0.1, 0.2, 0.1, 0.6]])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(probabilities.clamp(min=1e-12).log().flatten())
    codes, log_var = model.encode(torch.zeros(2, 3, 32, 32))
    assert codes[0, 2] == 3
    assert codes[0, 1] in (-1, 1)
    entropy = -0.2 * math.log(0.1) - 0.2 * math.log(0.2) - 0.6 * math.log(0.6)
    expected = [0, math.log(2), math.log(4) - entropy]
    assert model.information(log_var).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_order_of_categories_is_the_factors():
    code = np.array([3, 3, -3, -3, 1, 1], np.float32)
    factor = np.array([0, 1, 2, 4, 0, 0])
    assert categories_by_factor(code, factor, 3).tolist() == [1, 3, -3]
    assert categories_by_factor(code, factor, 6).tolist() == [1, 1, 3, 3, -3, -3]  # -1 is of no image


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 2}, r"in_channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"image_size": 48}, "image_size must be 32, 64, 128 or 256 pixels for an InfoGAN, got 48"),
        ({"categories": 1}, "categories must be at least 2, got 1"),
        ({"width": 4.5}, "width takes whole numbers, got 4.5"),
        ({"arch": "burgess"}, "arch must be infogan, got 'burgess'"),
    ],
)
def test_arguments_of_the_model(options, message):
    with pytest.raises(UsageError, match=message):
        InfoGAN(**options)


@pytest.mark.parametrize("size", [64, 256])
def test_larger_images(size):
    model = InfoGAN(1, size, 2, 3, width=1).eval()
    images = model.sample(2)
    assert images.shape == (2, 1, size, size)
    assert model.encode(images)[0].shape == (2, 2)


# --- Training ---------------------------------------------------------------------------------------------
def test_q_learns_to_read_the_codes(data, tmp_path, capsys):
    """One code of two categories, on few images: chance is a half."""
    options = ["--codes", 1, "--categories", 2, "--width", 4, "--max-steps", 80, "--code-lr", "5e-3"]
    assert run(data, tmp_path / "run", *options) == 0
    share = float(re.search(r"Q reads ([\d.]+)% of the codes", capsys.readouterr().out)[1])
    assert share > 90


@pytest.mark.parametrize(
    ("still", "changed"),
    [
        (("--discriminator-lr", "--code-lr"), {"generator"}),
        (("--lr", "--code-lr"), {"trunk", "discriminator"}),
        (("--lr", "--discriminator-lr"), {"reader", "head"}),
    ],
)
def test_each_learning_rate_is_of_its_own_networks(data, tmp_path, still, changed):
    options = [text for name in still for text in (name, "1e-30")]
    assert run(data, tmp_path / "run", *options, "--max-steps", 8) == 0
    paths = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    before, after = (torch.load(path, weights_only=True)["model"] for path in paths)
    parameters = dict(InfoGAN(latent_dim=3, categories=4, noise=5, width=2).named_parameters())
    moved = {name for name in parameters if not torch.allclose(before[name], after[name], atol=1e-9)}
    assert {name.split(".")[0] for name in moved} == changed


def test_the_run_folder(whole):
    result = set(os.listdir(whole))
    assert {"config.json", "config.yaml", "infogan.yaml", "model.safetensors", "samples.png"} <= result
    assert is_marked(whole)
    assert checkpointed(whole).codes == 3
    model = BetaVAE.from_pretrained(whole)
    assert isinstance(model, InfoGAN)
    assert not model.training
    last = records(whole)[-1]
    assert last["step"] == 10
    assert last["codes_read"] * 48 == pytest.approx(round(last["codes_read"] * 48))  # 16 images, 3 codes
    assert last["codes"] == pytest.approx(3 * math.log(4), rel=0.2)  # at the start Q knows nothing


def test_a_resumed_run_has_the_same_bits(data, whole, tmp_path, monkeypatch, capsys):
    """Stopped by SIGTERM after step 5, between two checkpoints and within an epoch."""
    out, advance = tmp_path / "run", infogan.InfoGANRun.advance

    def stop_at_5(self, images):
        advance(self, images)
        if self.done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(infogan.InfoGANRun, "advance", stop_at_5)
    assert run(data, out, "--max-steps", 10) == 0
    assert "stopped at step 5 of 10. The last good checkpoint is step-00000005.pt" in capsys.readouterr().out
    assert not is_marked(out)
    assert isinstance(BetaVAE.from_pretrained(out), InfoGAN)  # from the checkpoint
    monkeypatch.undo()
    assert main(["--resume", str(out)]) == 0
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [r for r in records(out) if r["step"] != 5] == records(whole)
    assert is_marked(out)


def test_ctrl_c_before_the_first_step(data, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(infogan.InfoGANRun, "advance", interrupt)
    assert run(data, tmp_path / "run") == 130
    assert "stopped. No checkpoint was written" in capsys.readouterr().out


def test_a_run_that_diverges_is_an_error(data, out, capsys):
    path = checkpoint.checkpoints(out / "checkpoints")[-1]
    assert main(["--resume", str(out), "--max-steps", "12"]) == 0
    assert run(data, out.parent / "other", "--lr", 1e38, "--max-steps", 9) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(r"the loss of \w+ is (nan|inf) at step \d+\. The GAN has diverged: a lower --lr", line)
    assert path.is_file()


# --- Bad input --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "48"], "image_size must be 32, 64, 128 or 256 pixels for an InfoGAN, got 48"),
        (["--categories", "1"], "categories must be 2 or more, got 1"),
        (["--codes", "0"], "codes must be positive, got 0"),
        (["--lr", "nan"], "lr must be positive, got nan"),
        (["--seed", "-1"], "seed must be 0 to 2^63 - 1, got -1"),
        (["--data", "sprites"], "sprites are grey, of 64 x 64 pixels"),
        (["--batch-size", "1"], "batch_size must be 2 or more, got 1"),
    ],
)
def test_options_that_cannot_be_used(data, tmp_path, options, message, capsys):
    assert run(data, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codes", "4"], "--resume cannot change codes from 3 to 4"),
        (["--image-size", "64"], "--resume cannot change image_size from 32 to 64"),
        (["--out", "elsewhere"], "--resume continues in the run's own folder: remove --out"),
        (["--max-steps", "5"], "is at step 10 already: raise --max-steps"),
    ],
)
def test_what_a_resumed_run_cannot_change(out, options, message, capsys):
    assert main(["--resume", str(out), *options]) == 2
    assert message in capsys.readouterr().err


def test_other_images_than_at_the_checkpoint(out, tmp_path, capsys):
    others = faces.write(tmp_path / "faces", n=60, seed=1, progress=False)
    assert main(["--resume", str(out), "--data-root", str(others), "--max-steps", "12"]) == 2
    assert "the images are not those of the checkpoint" in capsys.readouterr().err


def test_folders_of_another_kind(data, out, tmp_path, capsys):
    vae = tmp_path / "vae"
    options = ["--data-root", str(data), "--out", str(vae), *NETWORK, "--no-compile", "--max-steps", "2"]
    assert train.main(options) == 0
    assert main(["--resume", str(vae)]) == 2
    assert "is not a run folder of an InfoGAN: it holds no infogan.yaml" in capsys.readouterr().err
    (vae / "infogan.yaml").write_text("")
    assert main(["--resume", str(vae)]) == 2
    assert "its newest checkpoint is of another kind" in capsys.readouterr().err
    assert train.main(["--resume", str(out)]) == 2
    assert "its newest checkpoint is of another kind" in capsys.readouterr().err


def resume_each(out, number, seed):
    """How many of the changed checkpoints were refused, and how many resumed and took a step."""
    refused = resumed = 0
    with infogan.open_run(parse(["--resume", str(out), "--max-steps", "12"], "")) as opened:
        batch = opened.data.train.head(16)
        path = checkpoint.checkpoints(out / checkpoint.FOLDER)[-1]
        state = torch.load(path, weights_only=True)
        for what, changed in mutations(state, number, seed):
            torch.save(changed, path)
            try:
                checkpointed(out)
                opened.restore()
                opened.advance(batch)
                opened.receive()
                resumed += 1
            except (UsageError, NotFinite) as error:
                check_line(str(error), what)
                refused += 1
            except BaseException as error:
                raise AssertionError(what) from error
            path.with_suffix(".damaged").unlink(missing_ok=True)
    return refused, resumed


@pytest.mark.parametrize(
    ("changes", "seed", "least"), [(20, 1, 10), pytest.param(300, 0, 180, marks=pytest.mark.slow)]
)
def test_a_strangers_checkpoint(out, changes, seed, least):
    refused, resumed = in_a_fork(resume_each, out, changes, seed)
    assert refused + resumed == changes
    assert refused > least


def test_memory_is_not_taken_for_a_strangers_network(out, capsys):
    config = InfoGANConfig(codes=3, categories=4, noise=5, width=10**6).to_yaml()
    rewrite(out, lambda state: state.update(config=config))
    assert main(["--resume", str(out)]) == 2
    assert re.search(r"the model: \S+ is \[.*\] instead of \[", capsys.readouterr().err)
    described = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**described, "noise": 10**9}))
    with pytest.raises(UsageError, match="is not the model that its config.json describes"):
        BetaVAE.from_pretrained(out)
    (out / "config.json").write_text(json.dumps({**described, "width": 0}))
    with pytest.raises(UsageError, match="does not describe a InfoGAN: width must be at least 1, got 0"):
        BetaVAE.from_pretrained(out)


def test_links_in_the_place_of_results_are_replaced(out, tmp_path):
    names = {*WRITTEN, "infogan.yaml"} - {"checkpoints/best.json", "explorer.html"}  # only VAEs have these
    for name in names:
        target = tmp_path / name
        target.write_text("precious")
        (out / name).unlink()
        (out / name).symlink_to(target)
    assert main(["--resume", str(out), "--max-steps", "11"]) == 0
    assert {(tmp_path / name).read_text() for name in names} == {"precious"}
    assert not any((out / name).is_symlink() for name in names)


# --- The commands that take its folder --------------------------------------------------------------------
def test_commands_take_an_infogan(data, out, tmp_path, capsys):
    assert traverse.main([str(out), "--out", str(tmp_path / "walk.png")]) == 0
    assert sample.main([str(out), "--n", "4"]) == 0
    assert evaluate.main([str(out), *FEW, "--seeds", "1"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    kl = result["model"]["kl_per_latent"]
    assert len(kl) == 3
    assert all(-1e-6 <= nats <= math.log(4) for nats in kl)
    vae = BetaVAE(3, 4, (4, 8), 32)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "config.yaml").write_text((out / "config.yaml").read_text())
    capsys.readouterr()
    options = ["--factor", "azimuth", *FEW, "--out", str(tmp_path / "side")]
    assert compare.main([str(tmp_path / "vae"), str(out), *options]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["B, gamma 10, C 25", "InfoGAN"]


def test_its_kl_is_of_its_own_prior_and_no_gap_is_sampled(out):
    model, device = BetaVAE.from_pretrained(out), torch.device("cpu")
    truth = measure.open_truth(out, Protocol(factor_bins=2), model, device)
    numbers = measure.sample_numbers(truth, 20)
    statistics = measure.compute_statistics(model, truth, numbers, 1.0, device, with_mig=True)
    assert "mig_sampled" not in statistics
    log_var = model.encode(truth.images(numbers))[1]
    assert statistics["kl_per_latent"] == pytest.approx(model.information(log_var).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (explore, "error: run: an InfoGAN has categories where the page has sliders: use bvae.traverse"),
        (export, "error: an InfoGAN has no encoder and decoder of its own to export: use bvae.sample"),
    ],
)
def test_commands_that_take_vaes_alone(out, command, message, capsys):
    assert command.main([str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_it_is_not_uploaded(out):
    with pytest.raises(UsageError, match="an InfoGAN cannot be uploaded: the model card describes VAEs"):
        BetaVAE.from_pretrained(out).push_to_hub("user/repo", run=out)
