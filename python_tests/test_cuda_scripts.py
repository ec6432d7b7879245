"""What the scripts around the CUDA part rely on; no compiler is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import cuda_matrix  # noqa: E402
import cuda_mutants  # noqa: E402

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


def test_the_quick_mutants_are_of_both_kinds():
    quick = [mutant for mutant in cuda_mutants.mutants() if mutant.quick]
    suites = {suite for mutant in quick for suite in mutant.suites}
    assert {"test_cuda_kernels", "test_cuda_backend"} <= suites
