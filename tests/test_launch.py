"""Layouts, block sizes and counters: what the launcher decides before a kernel runs."""

import itertools

import pytest
import torch

from bvae import ops
from bvae.kernels import capacity_loss, reparam_kl
from bvae.kernels.completion_counters import CounterPool
from bvae.kernels.launch import collapse, is_dense

CPU = torch.device("cpu")

LAYOUTS = {
    "contiguous": (torch.zeros(2, 3, 4).stride(), (24,), (1,)),
    "first dimension sliced": (torch.zeros(2, 5, 4)[:, :3].stride(), (2, 12), (20, 1)),
    "last dimension sliced": (torch.zeros(2, 3, 9)[..., :4].stride(), (6, 4), (9, 1)),
    "transposed": (torch.zeros(4, 3, 2).permute(2, 1, 0).stride(), (2, 3, 4), (1, 2, 6)),
    "expanded": (torch.zeros(1).expand(2, 3, 4).stride(), (24,), (0,)),
}


@pytest.mark.parametrize(("strides", "sizes", "collapsed"), LAYOUTS.values(), ids=LAYOUTS)
def test_collapse_keeps_the_order_of_elements(strides, sizes, collapsed):
    assert collapse((2, 3, 4), strides) == (sizes, [collapsed])
    whole = [
        sum(i * s for i, s in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, (2, 3, 4)))
    ]
    fewer = [
        sum(i * s for i, s in zip(index, collapsed, strict=True))
        for index in itertools.product(*map(range, sizes))
    ]
    assert whole == fewer


def test_collapse_merges_only_what_is_contiguous_in_every_tensor():
    dense, sliced = torch.zeros(2, 3, 4).stride(), torch.zeros(2, 5, 4)[:, :3].stride()
    assert collapse((2, 3, 4), dense, sliced) == ((2, 12), [(12, 1), (20, 1)])
    assert collapse((1, 1, 1), dense) == ((1,), [(0,)])
    assert collapse((1, 3, 1), (7, 5, 3)) == ((3,), [(5,)])


@pytest.mark.parametrize(
    ("batch", "row_length"),
    [(1, 1), (144, 10), (144, 128), (64, 16384), (1, 65536), (100_000, 2), (3, 2**20)],
)
def test_a_tile_covers_and_fills(batch, row_length):
    rows, columns, warps = reparam_kl._tile_size(batch, row_length)
    assert columns % 4 == 0  # a Philox block does not straddle tiles
    assert rows * columns <= 8 * 32 * warps  # at most 8 elements a thread
    assert rows == 1 or columns >= row_length  # only whole rows share a tile


def test_a_tile_that_announces_a_block_has_one_warp():
    mu = torch.empty(144, 4, 64, 64, device="meta")
    for per_dim, warps in ((False, 4), (True, 1)):
        launch, _ = reparam_kl.plan_forward(mu, mu, torch.empty((), device="meta"), None, None, per_dim)
        assert launch.num_warps == warps


def test_counters_are_as_many_as_the_sums_need(monkeypatch):
    asked = []
    monkeypatch.setattr(reparam_kl, "completion_counters", lambda count, device: asked.append(count))
    short, long = torch.empty(8, 128, device="meta"), torch.empty(1, 65536, device="meta")
    for latents, per_dim in ((short, False), (short, True), (long, False), (long, True)):
        reparam_kl.plan_forward(latents, latents, None, None, None, per_dim)
    assert asked == [4 + 1, 1, 1 + 256]  # one per block of rows, and per dimension one per block of columns


def test_the_loss_walks_images_in_the_order_of_memory():
    nchw = torch.empty(4, 3, 8, 10)
    nhwc = nchw.to(memory_format=torch.channels_last)
    for same in (nchw, nhwc, nchw.permute(3, 1, 0, 2)):
        layout, strides = capacity_loss._layout(same, same)
        assert (layout["rows"], layout["row_length"], layout["DIMS"]) == (1, 960, 1)
        assert strides == [(0, (1,))] * 2
    layout, strides = capacity_loss._layout(nhwc, nchw)
    assert (layout["rows"], layout["sizes"]) == (4, (80, 3))
    assert strides == [(240, (3, 1)), (240, (1, 80))]


def test_short_rows_have_short_blocks():
    nchw = torch.empty(64, 3, 8, 8, device="meta")
    for target, block in ((nchw, 2048), (nchw.to(memory_format=torch.channels_last), 256)):
        options = capacity_loss.Options(1.0, 25.0, 1, "gaussian", None, "mean", 0.5, -1.0)
        launch, _ = capacity_loss.plan_forward(nchw, target, nchw[:, 0, 0, 0], None, None, True, options)
        assert (launch.args["BLOCK"], 8 * 32 * launch.num_warps) == (block, block)


DENSE = {
    "contiguous": (torch.zeros(2, 3, 4), True),
    "permuted": (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
    "one element of many": (torch.zeros(2, 3)[:1, :1], True),
    "empty": (torch.zeros(0), True),
    "sliced": (torch.zeros(2, 4)[:, ::2], False),
    "expanded": (torch.zeros(1).expand(3), False),
}


@pytest.mark.parametrize(("tensor", "dense"), DENSE.values(), ids=DENSE)
def test_dense_is_without_gaps(tensor, dense):
    assert is_dense(tensor) is dense


def counters(office: CounterPool, stream: str, count: int = 4, capturing: bool = False) -> torch.Tensor:
    return office.counters(count, CPU, stream, capturing)


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def test_a_stream_keeps_its_counters_and_shares_them_with_no_other():
    office = CounterPool()
    first = counters(office, "first")
    assert same_memory(counters(office, "first"), first)
    assert not same_memory(counters(office, "second"), first)
    assert same_memory(counters(office, "first", count=2), first)  # its launches follow each other
    assert len(counters(office, "first", count=2)) == 2


def test_every_slice_of_counters_is_aligned_as_its_warm_ups_was():
    office = CounterPool()
    requests = [(1, False), (1, True), (258, False), (3, True), (1, True), (5, False), (70, True), (1, True)]
    lent = [counters(office, "stream", count, capturing) for count, capturing in requests]
    assert office._block is not None
    assert {slice_.data_ptr() % 16 for slice_ in lent} == {office._block.data_ptr() % 16} == {0}
    assert [len(slice_) for slice_ in lent] == [count for count, _ in requests]


def test_counts_that_change_do_not_exhaust_the_counters():
    office = CounterPool()
    for count in range(1, 2000):
        counters(office, "stream", count)
    assert office._used <= 4096


def test_every_captured_launch_has_counters_of_its_own():
    office = CounterPool()
    kept = counters(office, "stream")
    captured = [counters(office, "stream", capturing=True) for _ in range(3)]
    pointers = {c.data_ptr() for c in (kept, *captured)}
    assert len(pointers) == 4
    assert same_memory(counters(office, "stream"), kept)


def test_where_no_counters_are_left_they_are_fresh_zeros():
    office = CounterPool()
    assert counters(office, "stream", capturing=True).tolist() == [0] * 4  # nothing is allocated in a capture
    assert office._block is None
    office.counters(office.SLOTS, CPU, "stream", False)
    spare = [counters(office, "stream", capturing=True) for _ in range(2)]
    assert all(s.tolist() == [0] * 4 for s in spare)
    assert not same_memory(*spare)


def test_a_launch_leaves_its_counters_at_zero(kernels, monkeypatch):
    lent = []

    def lend(count: int, device: torch.device) -> torch.Tensor:
        lent.append(torch.zeros(count, dtype=torch.int32, device=device))
        return lent[-1]

    for module in (reparam_kl, capacity_loss):
        monkeypatch.setattr(module, "completion_counters", lend)
    latents, images = torch.randn(1, 5000, device=kernels), torch.randn(2, 5000, device=kernels)
    ops.reparam_kl(latents, latents, seed=0, per_dim=True)
    ops.vae_loss(images, images, torch.ones(2, device=kernels))
    assert len(lent) == 2
    assert all((counters == 0).all() for counters in lent)
