"""The noise: Philox against its published vectors, Triton against torch, normality, independence."""

import noise_kernels
import pytest
import torch
from scipy import stats

from bvae import ops
from bvae.kernels import noise
from bvae.kernels.launch import Launch

# Salmon et al. (2011), Random123's known-answer vectors for philox4x32-10: counter, key, result
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}

OPTIONS = Launch(None, 1, {}, num_warps=4).options  # the product's: a product and a sum round twice


def int64(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance of two float32 tensors, counted in representable numbers."""
    ordered = [torch.where(i < 0, -(i & 0x7FFFFFFF), i) for i in (x.view(torch.int32).long() for x in (a, b))]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN.values(), ids=KNOWN)
def test_philox_gives_the_published_words(counter, key, expected):
    words = noise.philox(tuple(int64(c) for c in counter), tuple(int64(k) for k in key))
    assert tuple(int(w) for w in words) == expected


def test_philox_on_the_device_gives_equal_integers(kernels):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2**32, (6, 100), generator=generator)
    words[:, :3] = torch.tensor([[*counter, *key] for counter, key, _ in KNOWN.values()]).T
    expected = torch.stack(noise.philox(tuple(words[:4]), tuple(words[4:])))
    counter, key = words[:4].to(kernels, torch.uint32), words[4:].to(kernels, torch.uint32)
    noise_kernels.philox_kernel[(1,)](counter, key, 100, BLOCK=128, **OPTIONS)
    assert torch.equal(counter.cpu().long(), expected)


def test_normals_on_the_device_are_equal_to_2_ulp(kernels):
    n = 2**16
    words = torch.randint(2**32, (2, n), generator=torch.Generator().manual_seed(0))
    corners = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**32 - 2**29, 2**32 - 1])
    words[0, :81], words[1, :81] = corners.repeat_interleave(9), corners.repeat(9)
    normals = torch.empty(2, n, device=kernels)
    words_on_device = words.to(kernels, torch.uint32)
    noise_kernels.normal_kernel[(n // 2048,)](words_on_device, normals, n, BLOCK=2048, **OPTIONS)
    assert ulps(normals.cpu(), torch.stack(noise.normal_pair(*words))) <= 2


def test_normals_are_box_and_mullers():
    words = torch.randint(2**32, (2, 100_000), generator=torch.Generator().manual_seed(1))
    uniform = (words[0].float() * 2.0**-32 + 2.0**-33).double()  # rounded to float32, as documented
    radius, angle = torch.sqrt(-2 * torch.log(uniform)), 2 * torch.pi * words[1].double() / 2**32
    for ours, exact in zip(noise.normal_pair(*words), (torch.cos(angle), torch.sin(angle)), strict=True):
        torch.testing.assert_close(ours.double(), radius * exact, rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 41), (2, 1271), (3, 2, 9, 5)], ids=str)
def test_the_kernel_draws_the_noise_of_the_reference(kernels, shape):
    zeros = torch.zeros(shape, device=kernels)
    z, _ = ops.reparam_kl(zeros, zeros, seed=2**62 + 12345, step=2**33 + 7)
    assert ulps(z.cpu(), noise.normal(shape, int64(2**62 + 12345), int64(2**33 + 7))) <= 2


def test_negative_seeds_and_steps_are_seeds(kernels):
    zeros = torch.zeros(4, 8, device=kernels)
    z, _ = ops.reparam_kl(zeros, zeros, seed=-1, step=-5)
    assert ulps(z.cpu(), noise.normal((4, 8), int64(-1), int64(-5))) <= 2


def test_torchs_initial_seed_is_a_seed(backend):
    zeros = torch.zeros(4, 8, device=backend)
    z, _ = ops.reparam_kl(zeros, zeros, seed=2**64 - 1)  # as torch.initial_seed() after manual_seed(-1)
    assert torch.equal(z, ops.reparam_kl(zeros, zeros, seed=-1)[0])


def test_a_sample_does_not_depend_on_its_neighbours():
    whole = noise.normal((10, 4, 7), int64(3), int64(4))
    assert torch.equal(noise.normal((6, 4, 7), int64(3), int64(4)), whole[:6])
    assert torch.equal(noise.normal((10, 17), int64(3), int64(4)), whole.flatten(1)[:, :17])


def test_a_sample_does_not_depend_on_strides_or_dtype(backend):
    shape = (3, 4, 6, 5)
    expected = noise.normal(shape, int64(9))
    zeros = torch.zeros(3, 8, 6, 5, device=backend)
    layouts = {
        "chunk": zeros.chunk(2, 1)[0],
        "channels last": zeros.to(memory_format=torch.channels_last).chunk(2, 1)[1],
        "transposed": torch.zeros(5, 6, 4, 3, device=backend).permute(3, 2, 1, 0),
        "expanded": torch.zeros(1, device=backend).expand(shape),
    }
    for name, view in layouts.items():
        assert ulps(ops.reparam_kl(view, view, seed=9)[0].cpu(), expected) <= 2, name
    half = layouts["chunk"].bfloat16()
    torch.testing.assert_close(ops.reparam_kl(half, half, seed=9)[0].cpu(), expected.bfloat16())


def test_a_million_normals_are_normal():
    x = noise.normal((1000, 1000), int64(2024), int64(1)).flatten().double().numpy()
    n = x.size
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(stats.skew(x)) < 4 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(x)) < 4 * (24 / n) ** 0.5
    assert stats.kstest(x, "norm").pvalue > 0.001
    assert abs(x).max() > 4.5  # the tails are there


def test_neighbours_are_uncorrelated():
    n = 1_000_000
    base = noise.normal((1000, 1000), int64(11), int64(5))
    flat = base.flatten().double()
    others = {f"index + {lag}": flat.roll(lag) for lag in (1, 2, 3, 4, 5, 1000)}
    others["step + 1"] = noise.normal((1000, 1000), int64(11), int64(6)).flatten().double()
    others["seed + 1"] = noise.normal((1000, 1000), int64(12), int64(5)).flatten().double()
    others["seed and step swapped"] = noise.normal((1000, 1000), int64(5), int64(11)).flatten().double()
    others["step + 2**32"] = noise.normal((1000, 1000), int64(11), int64(5 + 2**32)).flatten().double()
    for name, other in others.items():
        for power in (1, 2):  # the squares too: Box and Muller's two share a radius
            a, b = flat**power, other**power
            correlation = float(torch.corrcoef(torch.stack((a, b)))[0, 1])
            assert abs(correlation) < 4.5 / n**0.5, f"{name}, power {power}: {correlation}"


def test_without_a_seed_torchs_generator_decides(backend):
    zeros = torch.zeros(4, 10, device=backend)
    torch.manual_seed(7)
    first, second = ops.reparam_kl(zeros, zeros)[0], ops.reparam_kl(zeros, zeros)[0]
    torch.manual_seed(7)
    assert torch.equal(ops.reparam_kl(zeros, zeros)[0], first)
    assert torch.equal(ops.reparam_kl(zeros, zeros)[0], second)
    assert not torch.equal(first, second)


def test_compiled_noise_is_the_eager_noise():
    compiled = torch.compile(noise.normal, fullgraph=True)
    for step in (0, 1):
        expected = noise.normal((4, 10), int64(3), int64(step))
        assert ulps(compiled((4, 10), int64(3), int64(step)), expected) <= 2
