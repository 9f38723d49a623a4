"""Layouts, block sizes and tickets: what the launcher decides before a kernel runs."""

import itertools

import pytest
import torch

from bvae import ops
from bvae.kernels import capacity_loss, reparam_kl
from bvae.kernels.launch import collapse
from bvae.kernels.tickets import TicketOffice

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


def counters(office: TicketOffice, stream: str, count: int = 4, capturing: bool = False) -> torch.Tensor:
    return office.counters(count, CPU, stream, capturing)


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def test_a_stream_keeps_its_counters_and_shares_them_with_no_other():
    office = TicketOffice()
    first = counters(office, "first")
    assert same_memory(counters(office, "first"), first)
    assert not same_memory(counters(office, "second"), first)
    assert same_memory(counters(office, "first", count=2), first)  # its launches follow each other
    assert len(counters(office, "first", count=2)) == 2


def test_every_slice_of_counters_is_aligned_as_its_warm_ups_was():
    office = TicketOffice()
    requests = [(1, False), (1, True), (258, False), (3, True), (1, True), (5, False), (70, True), (1, True)]
    lent = [counters(office, "stream", count, capturing) for count, capturing in requests]
    assert office._block is not None
    assert {slice_.data_ptr() % 16 for slice_ in lent} == {office._block.data_ptr() % 16} == {0}
    assert [len(slice_) for slice_ in lent] == [count for count, _ in requests]


def test_counts_that_change_do_not_exhaust_the_counters():
    office = TicketOffice()
    for count in range(1, 2000):
        counters(office, "stream", count)
    assert office._used <= 4096


def test_every_captured_launch_has_counters_of_its_own():
    office = TicketOffice()
    kept = counters(office, "stream")
    captured = [counters(office, "stream", capturing=True) for _ in range(3)]
    pointers = {c.data_ptr() for c in (kept, *captured)}
    assert len(pointers) == 4
    assert same_memory(counters(office, "stream"), kept)


def test_where_no_counters_are_left_they_are_fresh_zeros():
    office = TicketOffice()
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
        monkeypatch.setattr(module, "tickets", lend)
    latents, images = torch.randn(1, 5000, device=kernels), torch.randn(2, 5000, device=kernels)
    ops.reparam_kl(latents, latents, seed=0, per_dim=True)
    ops.vae_loss(images, images, torch.ones(2, device=kernels))
    assert len(lent) == 2
    assert all((counters == 0).all() for counters in lent)
