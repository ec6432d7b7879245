"""Some cases of the fuzzer in each run, always the same; CONTRIBUTING.md has the command for more."""

from __future__ import annotations

import logging

from fuzz_readers import fuzz

CASES = 12  # of each reader


def test_a_damaged_file_of_a_user_gives_an_error_of_emoe_in_time_and_memory(tmp_path):
    logging.getLogger("emoe").setLevel(logging.ERROR)
    try:
        count, findings = fuzz(tmp_path / "fuzz", iter(range(CASES)))
    finally:
        logging.getLogger("emoe").setLevel(logging.NOTSET)
    assert count >= 15 * CASES
    assert [(name, seed, wrong) for name, seed, wrong, _ in findings] == []
