"""Images of one bit a pixel, against NumPy's packing and against images that are not packed."""

import numpy as np
import pytest
import torch

from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.pipelines.packed_loader import PackedLoader, pack, unpack

IMAGES = torch.randint(2, (50, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_packing_is_numpys_and_unpacking_its_inverse():
    packed = pack(IMAGES)
    assert np.array_equal(packed.numpy(), np.packbits(IMAGES.flatten(1).numpy(), axis=1))
    assert torch.equal(unpack(packed, 8)[..., 0], 255 * IMAGES)
    assert torch.equal(pack(torch.ones(1, 64, dtype=torch.uint8)), torch.full((1, 8), 255, dtype=torch.uint8))
    assert torch.equal(pack(IMAGES.mT), pack(IMAGES.mT.contiguous()))


@pytest.mark.parametrize("train", [True, False])
def test_batches_are_those_of_the_images_themselves(train):
    options = {"train": train, "rank": 1, "world_size": 2}
    bits = PackedLoader(pack(IMAGES), 8, 7, 3, **options)
    plain = DeviceLoader(255 * IMAGES[..., None], 7, 3, flip=False, **options)
    assert len(bits) == len(plain)
    for (a, i), (b, j) in zip(bits.epoch(2), plain.epoch(2), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(i, j)
    assert torch.equal(bits.head(3), plain.head(3))
    if train:
        bits.begin(2), plain.begin(2)
        for position in torch.arange(len(bits)):
            assert torch.equal(bits.batch(position), plain.batch(position))


def test_a_compiled_gather_builds_no_table_on_the_host():
    """To copy one to the GPU at each step would make the host wait, and cannot be captured."""
    bits = PackedLoader(pack(IMAGES), 8, 7, 3, train=True)
    bits.begin(2)
    traced = []

    def trace(graph, _):
        traced.extend(node.target for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    compiled = torch.compile(bits.batch, backend=trace)
    assert torch.equal(compiled(torch.tensor(1)), bits.batch(torch.tensor(1)))
    assert "index_select" in traced
    assert "to" not in traced


@pytest.mark.gpu
def test_a_cuda_graph_unpacks_its_own_batches():
    bits = PackedLoader(pack(IMAGES).cuda(), 8, 7, 3, train=True)
    bits.begin(0)
    position = torch.zeros((), dtype=torch.int64, device="cuda")
    bits.batch(position)  # makes the table that the graph reads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images = bits.batch(position)
    for epoch in range(2):
        bits.begin(epoch)
        for number, (expected, _) in enumerate(bits.epoch(epoch)):
            position.fill_(number)
            graph.replay()
            assert torch.equal(images, expected)
