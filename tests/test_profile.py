"""`--profile`: whose time a kernel's is, the table, and the trace."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bvae.pipelines import faces
from bvae.train import main
from bvae.training.profiler import Profile, part, table

TINY = [
    *("--image-size", "32", "--hidden-dims", "4", "8", "--latent-dim", "3", "--batch-size", "8"),
    *("--no-compile",),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=40, seed=0, progress=False)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("triton_red_fused__native_batch_norm_legit_functional_leaky_relu_5", "BatchNorm, LeakyReLU"),
        (
            "triton_red_fused_convolution_backward_native_batch_norm_backward_14",
            "BatchNorm, LeakyReLU",
        ),
        ("cudnn::bn_bw_1C11_kernel_new", "BatchNorm, LeakyReLU"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize64x64x64", "convolution"),
        ("cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x128", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("nvjet_hsh_64x32_64x16_4x2_h_bz_TNN", "linear layers"),
        ("aten::addmm", "linear layers"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("_forward_kernel", "sample, KL, loss"),
        ("Memcpy DtoH (Device -> Pinned)", "other"),
        # what inductor made of the step for an H100, torch 2.14; the numbered ones are several kernels in one
        ("triton_red_fused_3", "BatchNorm, LeakyReLU"),
        ("triton_per_fused_24", "BatchNorm, LeakyReLU"),
        ("triton_per_fused__native_batch_norm_legit_functional_copy__17", "BatchNorm, LeakyReLU"),
        ("triton_red_fused_convolution_backward_0", "convolution"),
        ("triton_poi_fused__to_copy_add_convolution_permute_vae_loss_26", "convolution"),
        ("triton_red_fused_sum_22", "linear layers"),
        ("triton_per_fused__to_copy_sum_view_20", "linear layers"),
        ("triton_poi_fused_cat_21", "linear layers"),
        ("triton_poi_fused__unsafe_view_clone_18", "linear layers"),
        ("triton_poi_fused_cat_constant_pad_nd_mul_stack_27", "sample, KL, loss"),
        ("triton_poi_fused_0", "gather, scale, cast"),
        ("triton_for_fused_26", "gather, scale, cast"),
        ("triton_poi_fused_add_arange_index_mul_rsub_unsqueeze_where_0", "gather, scale, cast"),
    ],
)
def test_whose_time_a_kernel_is(name, label):
    assert part(name) == label


def test_the_table_adds_up_to_a_step():
    lines = table({"convolution": 0.004, "optimizer": 0.001}, wall=0.01).splitlines()
    assert lines[1].split() == ["convolution", "4.000", "ms", "40.0%"]
    assert lines[-2].split() == ["idle", "5.000", "ms", "50.0%"]
    assert lines[-1].split() == ["a", "step", "10.000", "ms"]


class Record:
    """What torch's profiler would know of 20 steps on a GPU, and of the host that launched them."""

    def key_averages(self):
        rows = [
            ("sm90_xmma_fprop_implicit_gemm", DeviceType.CUDA, False, 8000),
            ("void multi_tensor_apply_kernel<FusedAdamMathFunctor>", DeviceType.CUDA, False, 2000),
            ("Optimizer.step#Adam.step", DeviceType.CUDA, True, 2100),
            ("ProfilerStep*", DeviceType.CUDA, True, 10_000),
            ("ProfilerStep*", DeviceType.CPU, True, 600),
            ("cudaGraphLaunch", DeviceType.CPU, False, 500),
        ]
        for key, device, span, microseconds in rows:
            yield SimpleNamespace(
                key=key,
                device_type=device,
                is_user_annotation=span,
                self_device_time_total=microseconds,
                self_cpu_time_total=microseconds,
            )


def test_a_gpus_time_is_its_kernels(tmp_path):
    profile = Profile(tmp_path, torch.device("cpu"))
    profile.close()
    profile._cuda = True
    seconds = profile._seconds(Record())
    assert seconds == {"convolution": pytest.approx(400e-6), "optimizer": pytest.approx(100e-6)}


def test_a_step_is_timed_until_the_gpu_is_done(tmp_path, monkeypatch):
    """Launching takes the host no time; the steps of a millisecond are still to come when it is done."""
    profile = Profile(tmp_path, torch.device("cpu"))
    profile._cuda, clock, queued = True, [0.0], [0.0]

    def synchronize():
        clock[0], queued[0] = clock[0] + queued[0], 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("bvae.training.profiler.time.perf_counter", lambda: clock[0])
    for _ in range(40):
        queued[0] += 1e-3
        profile.step()
    profile.close()
    assert profile._wall == pytest.approx(1e-3)


def test_a_profiled_run_leaves_a_trace(data, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--data-root", data, "--out", out, "--epochs", 99, "--max-steps", 30, *TINY, "--profile")
    assert main(list(map(str, options))) == 0
    said = capsys.readouterr().out
    shares = {line[:22].strip(): float(line.split()[-1][:-1]) for line in said.splitlines() if "%" in line}
    assert shares["convolution"] > 5
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    names = {event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert "aten::convolution" in names


def test_too_short_a_run_says_so(data, tmp_path, capsys):
    options = ("--data-root", data, "--out", tmp_path / "run", "--max-steps", 3, *TINY, "--profile")
    assert main(list(map(str, options))) == 0
    assert "--profile needs 27 steps" in capsys.readouterr().out
