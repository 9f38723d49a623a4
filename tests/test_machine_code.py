"""What the compiler makes of the kernels: no spills, wide loads and stores, the bytes that the model says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
SURVEY = """
import dataclasses, json, sys
import machine_code
codes = {case: dataclasses.asdict(machine_code.inspect(case, sys.argv[1])) for case in machine_code.CASES}
json.dump(codes, sys.stdout)
"""
COMPARISON = """
import json, sys
import machine_code
whole, *others = ({case: [machine_code.specialisation(launch), launch.options]
    for case, launch in machine_code.batch_variants(batch).items()} for batch in (144, 143, 58, 97, 11))
assert whole
json.dump([case for case in whole if any(other[case] != whole[case] for other in others)], sys.stdout)
"""


def survey(target: str, code: str = SURVEY) -> Any:
    """Every case's MachineCode on `target`, from a process where kernels are compiled and not interpreted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(BENCH), str(BENCH.parent)))}
    command = [sys.executable, "-c", code, target]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=BENCH.parent, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def sm_90() -> dict[str, dict]:
    return survey("sm_90")


def test_nothing_spills_on_sm_90(sm_90):
    assert {case: code["spilled"] for case, code in sm_90.items()} == dict.fromkeys(sm_90, 0)


def test_a_kld_of_c_is_c(sm_90):
    """`/` is off by a bit on NVIDIA: 25 * B / B is not 25 for B = 7. The interpreter's division is exact."""
    assert all(sm_90[case]["exact_divisions"] for case in sm_90 if case.startswith("loss"))


def test_the_last_batch_of_an_epoch_compiles_nothing():
    assert survey("sm_90", COMPARISON) == []


# bfloat16 latents and images whose rows are contiguous; uint8 pixels come eight to a load
@pytest.mark.parametrize(
    ("case", "loads", "stores", "bytes_per_element"),
    [
        ("sample, [144, 128]", {"16": 2}, {"16": 1}, 6),
        ("sample, [64, 4, 64, 64]", {"16": 2}, {"16": 1}, 6),
        ("loss, tanh", {"16": 1, "8": 1}, {"16": 1}, 5),
        ("loss, bernoulli", {"16": 1, "8": 1}, {"16": 1}, 5),
        ("loss, laplace", {"16": 1, "8": 1}, {"16": 1}, 5),
        ("loss, logistic", {"16": 1, "8": 1}, {"16": 1}, 5),
        ("loss, probabilities", {"16": 1, "8": 1}, {"16": 1}, 5),
        ("loss, tanh, evaluation", {"16": 1, "8": 1}, {}, 3),
        ("total correlation, [144, 128]", {"8": 2}, {}, 4),  # mu and log_var: no densities
        ("BatchNorm, 32 at 64 x 64, statistics", {"16": 2}, {}, 2),
        ("BatchNorm, 32 at 64 x 64, statistics, float32", {"16": 4}, {}, 4),
        ("BatchNorm, 32 at 64 x 64, reduce", {"16": 4}, {}, 4),
        ("BatchNorm, 256 at 4 x 4", {"16": 2}, {}, 2),
        ("BatchNorm, 256 at 4 x 4, backward", {"16": 4}, {}, 4),
    ],
)
def test_the_main_loop_moves_what_the_model_says(sm_90, case, loads, stores, bytes_per_element):
    code = sm_90[case]
    assert (code["loads"], code["stores"]) == (loads, stores)
    assert code["bytes_per_element"] == bytes_per_element


def test_the_last_blocks_reduction_reads_its_input_16_bytes_wide(sm_90):
    code = sm_90["last block, reduce"]
    loads = code["loads"]
    assert (loads["16"], loads["4"], code["stores"]) == (2, 1, {})  # x; the image's factor
    assert loads["2"] <= 16  # 3 x 3 x 3 gradients around each place, from the cache; 14 with Triton 3.6
    assert code["bytes_per_element"] == 4.25


@pytest.mark.parametrize(
    ("case", "loads", "stores"),
    [
        ("sample, [144, 128], backward", 3, 2),
        ("sample, [64, 4, 64, 64], backward", 3, 2),
        ("loss, backward", 1, 1),
        ("errors per image, backward", 1, 1),
    ],
)
def test_the_backward_passes_are_16_bytes_wide(sm_90, case, loads, stores):
    assert sm_90[case]["loads"]["16"] == loads
    assert sm_90[case]["stores"]["16"] >= stores


@pytest.mark.parametrize(("case", "vectors", "tiles"), [("apply", 4, 1), ("gradient", 6, 2)])
def test_what_applies_batch_norm_is_16_bytes_wide(sm_90, case, vectors, tiles):
    """Two loads for each tile in bfloat16, and for each vector of 8 channels in float32."""
    code = sm_90[f"BatchNorm, 32 at 64 x 64, {case}"]
    assert (code["loads"], code["stores"]) == ({"16": 2 * (vectors + tiles)}, {"16": 2})


@pytest.mark.parametrize("case", ["", ", logistic", ", bernoulli", ", reduce", ", gradient"])
def test_the_last_block_multiplies_on_tensor_cores(sm_90, case):
    """HGMMA is wgmma: the four warps of a group multiply together, from shared memory."""
    assert sm_90[f"last block{case}"]["products"] == ["HGMMA"]


def test_the_last_block_is_read_and_written_in_16_bytes(sm_90):
    """32 channels of 512 pixels are 4 loads for each of 512 threads; the rest are vectors of 8 channels."""
    forward, gradient = sm_90["last block"], sm_90["last block, gradient"]
    assert forward["loads"]["16"] == 4 + 4 * 2
    assert gradient["loads"]["16"] >= 2
    assert gradient["stores"] == {"16": 2}
    assert {int(width) for width in forward["stores"]} == {2, 4}  # three gradients per pixel, and sums


@pytest.mark.parametrize("likelihood", ["tanh", "laplace", "logistic", "bernoulli", "probabilities"])
def test_the_errors_per_image_are_read_and_written_once(sm_90, likelihood):
    code = sm_90[f"errors per image, {likelihood}"]
    assert code["loads"] == {"16": 1, "8": 1}
    assert code["stores"]["16"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spills(target):
    codes = survey(target)
    assert {case: code["spilled"] for case, code in codes.items()} == dict.fromkeys(codes, 0)


@pytest.mark.slow
def test_the_table_has_a_row_for_every_case():
    command = [sys.executable, str(BENCH / "machine_code.py"), "sm_90"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    header, _, *rows = table
    assert header.startswith("| kernel | target | registers | spills |")
    assert [row.split(" | ")[1] for row in rows] == ["sm_90"] * len(rows)
    assert any(row.startswith("| loss, tanh | sm_90 | ") and row.endswith(" | 5.0 |") for row in rows)
