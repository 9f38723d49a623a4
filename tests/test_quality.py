"""The time to quality that bench/ measures: what its clocks count, its recipes' paths and its report."""

import copy
import dataclasses
import time

import pytest
import torch
from test_bench import made, timing

from bench import quality, report
from bench import race as racing
from bench.quality import train_baseline, train_ours
from bvae import config
from bvae.datasets import open_images
from bvae.training.validation import Validation

CPU = torch.device("cpu")


def good(value=0.9, kld=28.0):
    return Validation(0.1, 0.01, kld, -100.0, value, [kld])


def test_clocks_stand_still_in_validations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])

    def steps():
        while True:
            now[0] += 1.0
            yield

    def validated():
        now[0] += 100.0
        return good()

    points = quality._timed(steps(), 20, validated, CPU)
    assert [point.step for point in points] == [2, 5, 8, 10, 12, 15, 18, 20]  # a part of 8 each
    assert [point.seconds for point in points] == [point.step for point in points]
    assert [point.cpu_seconds for point in points] == [2 * point.step for point in points]


@pytest.fixture
def tiny():
    """A configuration of ten steps on 40 images, and the function that opens them."""
    images = torch.randint(
        256, (50, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    base = config.override(
        config.Config(),
        {"image_size": 32, "hidden_dims": [4, 8], "latent_dim": 3, "batch_size": 8, "max_steps": 10}
        | {"compile": False, "gamma": 10.0},
    )

    def open_data(settings, batch_size, device, *_):
        return open_images(images[10:], images[:10], settings.data, batch_size, 1, device)

    return base, open_data


@pytest.mark.parametrize("train", [train_ours, train_baseline])
def test_a_recipe_follows_its_rates(tiny, train):
    """At a rate of almost zero nothing is learned; at the real one the loss falls."""
    base, open_data = tiny
    ends = {}
    for lr in (1e-12, 1e-2):
        training = dataclasses.replace(base.training, lr=lr, schedule="linear")
        points = train(dataclasses.replace(base, training=training), open_data, CPU)
        assert points[-1].step == 10
        ends[lr] = points[0].validation.kld, points[-1].validation.kld
    assert abs(ends[1e-12][1] - ends[1e-12][0]) < 0.2 * abs(ends[1e-2][1] - ends[1e-2][0])


def test_the_baseline_is_measured_as_ours_are(tiny):
    """The same weights give the same validation, whoever trained them."""
    base, open_data = tiny
    data = open_data(base, 8, CPU)
    settings = base.resolve(len(data.train))
    model = quality.PyTorchVAE(3, (4, 8), 32)
    first = quality._validate_baseline(model, settings, data)
    assert first == quality._validate_baseline(model, settings, data)
    with torch.no_grad():
        x = data.valid.images.permute(0, 3, 1, 2).float() / 127.5 - 1
        mu, _ = model.eval().encode(x)
        error = (model.decode(mu) - x).square().sum()
        explained = 1 - error / (x - x.mean(0)).square().sum()
    assert first.explained_variance == pytest.approx(explained.item(), abs=1e-4)


@pytest.fixture
def record():
    """A record with a race to a target."""
    curve = [[[1.0, 0.5], [2.0, 0.9]], [[1.0, 0.55], [2.0, 0.91]]]
    even = (1.0, 1.0, 1.0)
    times = {
        "PyTorch-VAE": timing(90.0, (9.0, 8.9, 9.1)),
        "PyTorch-VAE, tuned": timing(40.0, (4.0, 3.9, 4.2)),
        "ours": timing(10.0, even),
    }
    result = racing.Result(
        "quality",
        "drawn faces",
        times,
        "ours",
        None,
        2,
        {
            "cpu_seconds": dict.fromkeys(times, 7.0),
            "quality": dict.fromkeys(times, (0.9, 0.91)),
            "kl": dict.fromkeys(times, (28.0, 28.1)),
            "curves": dict.fromkeys(times, curve),
            "unit": "explained variance",
            "target": 0.88,
            "missed": {"PyTorch-VAE": 1, "PyTorch-VAE, tuned": 0, "ours": 0},
            "headline": "Drawn faces",
        },
    )
    whole = copy.deepcopy(made())
    whole["results"].append({**result.as_json(), "date": whole["date"]})
    return whole


def test_the_report_shows_both_recipes_of_others_first(record):
    brief = report.headline_table([record], brief=True).splitlines()[2]
    assert "| Drawn faces | 10 s<br>at least 9.00 x (8.90 to 9.10) as fast as PyTorch-VAE" in brief
    assert "as fast as PyTorch-VAE, which missed the target in 1 of 2 runs<br>4.00 x" in brief
    assert "4.00 x (3.90 to 4.20) as fast as PyTorch-VAE, tuned |" in brief


def test_the_report_has_quality_kl_and_cpu_time_of_every_run(record):
    said = report.markdown(record)
    assert "explained variance (KL, nats) | 0.900 (28.0), 0.910 (28.1) |" in said
    assert "drawn faces: CPU time | 7 s | 7 s | 7 s |" in said


def test_the_curves_are_drawn(record, tmp_path):
    drawn = report.draw(record, tmp_path)
    assert drawn[0] == tmp_path / "quality.png"
    assert drawn[0].stat().st_size > 5000
