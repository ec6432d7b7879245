"""Memory that is left, as control groups of both versions tell it."""

from __future__ import annotations

import pytest

from emoe import memory

MACHINE = 10_000


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """groups(line, version, {folder: (limit, used, reclaimable)}): a process whose /proc/self/cgroup says `line`."""

    class Free:
        available = MACHINE

    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Free)
    monkeypatch.setattr(memory, "_ROOT", tmp_path / "fs")
    monkeypatch.setattr(memory, "_OWN", tmp_path / "cgroup")

    def arrange(line, version, found):
        (tmp_path / "cgroup").write_text(line)
        names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
        prefix = "total_" if version == 1 else ""
        for folder, (limit, used, reclaimable) in found.items():
            path = tmp_path / "fs" / folder
            path.mkdir(parents=True, exist_ok=True)
            (path / names[0]).write_text(f"{limit}\n")
            (path / names[1]).write_text(f"{used}\n")
            (path / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {reclaimable}\n")

    return arrange


def test_without_a_group_the_machine_counts(groups):
    groups("", 2, {})
    assert memory.available_memory() == MACHINE


def test_a_group_of_version_2_counts_with_those_above_it(groups):
    groups("0::/a/b\n", 2, {"a/b": ("max", 50, 0), "a": (1000, 700, 100)})
    assert memory.available_memory() == 400


def test_a_group_of_version_1_counts_with_those_above_it(groups):
    groups("5:cpu:/x\n4:memory:/a/b\n0::/\n", 1, {"memory/a/b": (900, 400, 0), "memory/a": (5000, 400, 0)})
    assert memory.available_memory() == 500


def test_a_limit_beyond_the_machine_changes_nothing(groups):
    groups("4:memory:/\n", 1, {"memory": (1 << 62, 400, 0)})
    assert memory.available_memory() == MACHINE


def test_a_group_over_its_limit_leaves_nothing(groups):
    groups("0::/a\n", 2, {"a": (100, 170, 20)})
    assert memory.available_memory() == 0


def test_a_path_that_lies_outside_the_mounted_groups_is_passed_over(groups):
    groups("0::/../../elsewhere\n", 2, {"": (300, 100, 0)})
    assert memory.available_memory() == 200
