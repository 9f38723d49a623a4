"""The picture of the KL per latent."""

import json

import numpy as np
import pytest
from PIL import Image

from bvae.training import kl_plot

RECORDS = [
    {"split": "train", "step": step, "kld": 3.0 * step, "capacity": c, "kl_per_dim": [1.0 * step, 2.0 * step]}
    for step, c in ((10, 0.0), (20, 1.0), (30, 2.0))
]


def write(folder, records) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_latents_in_the_order_of_their_kl(tmp_path, monkeypatch):
    """Two axes of nats; the legend names the latents with their nats at the end."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    write(tmp_path, RECORDS)
    kl_plot.save(tmp_path, 2)
    above, below = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in (*above.lines, *below.lines)}
    assert lines["KL"] == [[10, 30], [20, 60], [30, 90]]
    assert lines["C"] == [[10, 0], [20, 1], [30, 2]]
    assert lines["latent 0: 30.00"] == [[10, 10], [20, 20], [30, 30]]
    assert [line.get_label() for line in below.lines] == ["latent 1: 60.00", "latent 0: 30.00"]
    with Image.open(tmp_path / kl_plot.NAME) as picture:
        assert np.array(picture.convert("L")).min() < 50


def test_without_c_no_line_for_it(tmp_path, monkeypatch):
    write(tmp_path, [{**record, "capacity": 0.0} for record in RECORDS])
    kl_plot.save(tmp_path, 2)
    assert (tmp_path / kl_plot.NAME).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"kl_per_dim": None},
        {"kl_per_dim": [1.0]},
        {"kl_per_dim": [[1.0], 2.0]},
        {"kl_per_dim": ["x", 2.0]},
        {"kl_per_dim": 7},
        {"kld": {}},
        {"step": "1"},
        {"kld": 10**400},
    ],
    ids=str,
)
def test_a_record_of_another_kind_is_left_out(tmp_path, change):
    """A resumed run may continue a log that another version wrote, or a person."""
    write(tmp_path, [{**RECORDS[0], **change}, RECORDS[1]])
    kl_plot.save(tmp_path, 2)
    assert not (tmp_path / kl_plot.NAME).exists()  # one record is left, which is no curve
    write(tmp_path, [{**RECORDS[0], **change}, *RECORDS[1:]])
    kl_plot.save(tmp_path, 2)
    assert (tmp_path / kl_plot.NAME).exists()


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    write(tmp_path, [*RECORDS, {**RECORDS[0], "step": 40, "kld": None, "kl_per_dim": [None, float("inf")]}])
    kl_plot.save(tmp_path, 2)
    assert (tmp_path / kl_plot.NAME).exists()
