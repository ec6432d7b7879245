"""What the scripts and benchmarks around the CUDA part rely on; no compiler is run."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "benchmarks")]  # last: helpers of tests have names of benchmarks

import cuda_matrix  # noqa: E402
import cuda_mutants  # noqa: E402
import transfer_cuda  # noqa: E402

from emoe.compute.choose import open_device  # noqa: E402

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4emoe4cuda11sort_kernelENS0_7SortingE' for 'sm_80'
ptxas info    : Function properties for _ZN4emoe4cuda11sort_kernelENS0_7SortingE
    {stack} bytes stack frame, 0 bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem, 448 bytes cmem[0]
ptxas info    : Compile time = 87.582 ms
"""


def test_the_table_of_ptxas_is_read_and_a_spill_is_a_problem():
    used = {"registers": 32, "shared": 64, "stack": 0, "spills": 0}
    clean = cuda_matrix.parse_ptxas(PTXAS.format(stack=0, loads=0))
    assert clean == {"sort_kernel": {"sm_80": used}}
    assert cuda_matrix.problems_of(clean) == []
    spilled = cuda_matrix.parse_ptxas(PTXAS.format(stack=8, loads=4))
    assert cuda_matrix.problems_of(spilled) == ["sort_kernel on sm_80: 4 bytes spilled, 8 bytes of stack"]
    assert len(cuda_matrix.compare(clean, spilled)) == 1
    assert cuda_matrix.compare(clean, clean) == []
    with pytest.raises(cuda_matrix.MatrixError, match="no kernels"):
        cuda_matrix.parse_ptxas("nvcc warning")


@pytest.mark.parametrize("mutant", cuda_mutants.mutants(), ids=lambda mutant: mutant.name)
def test_the_text_that_a_mutant_changes_occurs_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.find) == 1
    assert mutant.find != mutant.replace


def test_the_recorded_table_has_every_kernel_on_every_architecture_and_no_spill():
    table = json.loads(cuda_matrix.TABLE.read_text())["kernels"]
    assert cuda_matrix.problems_of(table) == []
    architectures = {f"sm_{arch}" for arch in cuda_matrix.ARCHS}
    assert all(used.keys() == architectures for used in table.values())
    assert sum(name.startswith("tiles_kernel") for name in table) == 8


def test_every_mutant_is_caught_in_the_recorded_sweep_and_enough_are_of_order():
    import mutants_order

    table = json.loads(cuda_mutants.TABLE.read_text())
    assert table.keys() == {mutant.name for mutant in cuda_mutants.mutants()}
    assert [name for name, row in table.items() if "caught" not in row.values()] == []
    assert len(table) >= 20
    assert len(mutants_order.MUTANTS) >= 8


def test_a_checker_counts_where_it_was_the_first_to_catch():
    table = {
        "a": {"file": "x.cpp", "plain": "caught"},
        "b": {"file": "x.cpp", "plain": "passed", "thread": "caught"},
    }
    assert cuda_mutants.summary(table, ["plain", "thread"]) == "1 first by plain, 1 first by thread"


def test_the_quick_mutants_are_of_both_kinds():
    quick = [mutant for mutant in cuda_mutants.mutants() if mutant.quick]
    suites = {suite for mutant in quick for suite in mutant.suites}
    assert {"test_cuda_kernels", "test_cuda_backend"} <= suites


@pytest.fixture
def emulated(found_device):
    return open_device(found_device("emulated"))


def test_every_copy_of_the_transfer_benchmark_arrives(emulated):
    rows = transfer_cuda.measure(emulated, quick=True)
    assert [row for row in rows if not row["right"]] == []
    assert all(row["bytes_per_second"] > 0 for row in rows)


def test_no_row_of_the_transfer_benchmark_is_right_when_the_last_byte_of_the_device_is_another(emulated):
    class Wrong(emulated.module.CudaDevice):
        def download(self, dst, src, nbytes, stream):
            super().download(dst, src, nbytes, stream)
            ctypes.c_uint8.from_address(dst + nbytes - 1).value ^= 1

    emulated.native = Wrong(0)
    emulated.module = SimpleNamespace(**{**vars(emulated.module), "CudaDevice": Wrong})
    rows = transfer_cuda.measure(emulated, quick=True)
    assert [row for row in rows if row["right"]] == []
    assert len(rows) == 13
