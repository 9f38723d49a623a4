"""`bench.lowered`: what the step costs on a GPU, as inductor lowers it here, and the names of its kernels."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import lowered
from bvae.training.profiler import OTHER, part


def lines(folder: Path, *options: str) -> list[str]:
    """The lines of `python -m bench.lowered`."""
    try:
        lowered.stand_ins(folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "bench.lowered", "--batch", "144", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[str]:
    """The lines with all kernels."""
    return lines(tmp_path_factory.mktemp("libraries"), "--top", "999")


@pytest.mark.slow
def test_the_step_keeps_to_its_budget(said):
    """LeakyReLU in place cost 8.87 MB; casts, counters and the history's row in eager mode 149 launches."""
    total = re.fullmatch(r"TOTAL (\d+\.\d\d) MB per image, (\d+) launches", said[-1])
    assert total
    assert 5 < float(total[1]) <= 7.95
    assert 80 < int(total[2]) <= 130
    outside = re.search(r"(\d+) outside", said[-2])
    assert outside
    assert int(outside[1]) <= 5


@pytest.mark.slow
def test_the_networks_kernels_need_fewer_launches_and_bytes(tmp_path):
    """6 layers of 2 + 2 launches and 3 of 1 + 1, the last block, one launch for all running statistics."""
    _, forward, backward, *_, last = lines(tmp_path, "--top", "0", "--network")
    assert "15 batch_norm_leaky_relu, " in forward
    assert "2 last_block" in forward
    assert "3 last_block_backward, " in backward
    assert "15 batch_norm_leaky_relu_backward, " in backward
    total = last.split()
    assert 5 < float(total[1]) <= 6.1
    assert 60 < int(total[-2]) <= 96


@pytest.mark.slow
def test_muon_needs_three_products_per_round_and_shape(tmp_path):
    """Six lengths of matrices: 3 x 5 x 6 products. All else that is not Adam's is 55 launches."""
    *_, eager, _, total = lines(tmp_path, "--top", "0", "--optimizer", "muon")
    assert "30 bmm, 60 baddbmm" in eager
    assert int(total.split()[-2]) <= 270


@pytest.mark.slow
def test_every_kernel_of_the_step_has_a_part_in_the_profile(said):
    names = [line.split()[-1] for line in said if " MB  " in line]
    assert len(names) > 60
    assert [name for name in names if part(name) == OTHER] == []
    assert {"BatchNorm, LeakyReLU", "convolution", "linear layers"} <= {part(name) for name in names}


@pytest.mark.parametrize(
    ("compiler", "text"),
    [("no-such-compiler", "needs a C compiler: install gcc"), ("false", "does not compile fake_cudart.c")],
)
def test_without_a_compiler_it_says_what_to_do(monkeypatch, capsys, compiler, text):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(lowered.launch, "AVAILABLE", True)
    monkeypatch.setattr(sys, "platform", "linux")
    assert lowered.main([]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_without_cuda_in_torch_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("torch.version.cuda", None)
    assert lowered.main([]) == 2
    assert "needs Linux, torch's build for CUDA, and triton" in capsys.readouterr().err


def test_launches_are_read_from_the_code():
    code = """
    triton_poi_fused_1 = async_compile.triton('triton_poi_fused_1', '''
    inductor_meta={'kernel_name': 'triton_poi_fused_1', 'x': 1, 'kernel_num_gb': 0.5, 'kernel_flop': 0},
    def call(args):
        triton_poi_fused_1.run(*args, stream=raw_stream0)
    ''')
        def call(self, args):
            triton_poi_fused_1.run(buf0, buf1, stream=raw_stream0)
            triton_red_fused_2.run(buf0, buf1, stream=raw_stream0)
            extern_kernels.addmm(buf58, buf56, alpha=1, beta=1, out=buf59)
            buf2 = extern_kernels.convolution(buf1, buf0, stride=(2, 2), bias=None)
            assert_tensor_metadata(buf2, (1, 2), (2, 1), torch.bfloat16, 'torch.ops.aten.convolution.default')
            buf6 = torch.ops.bvae.reparam_kl.default(buf59, primals_29, None, True, first_sample=0)
            buf7 = torch.ops.aten.convolution_backward.default(a, b, c, [0], (2, 2), 1, [True, True, False])
            buf8 = torch.ops.aten.convolution_backward.default(a, b, c, [0], (2, 2), 1, [False, True, False])
    """
    count = lowered.Count()
    lowered._read(count, "backward", code)
    assert count.kernels == [
        ("backward", "triton_poi_fused_1", 5e8),
        ("backward", "triton_red_fused_2", 0.0),
    ]
    assert {name: n for (_, name), n in count.library.items()} == {
        "addmm": 1,
        "convolution": 1,
        "reparam_kl": 1,
        "convolution_backward": 3,
    }
