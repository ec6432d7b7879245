"""Runs a command of emoe within the test's process."""

from __future__ import annotations

import json

from emoe import cli


def run(capsys, *words):
    """Exit status, stdout, stderr of one command."""
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys, *words):
    status, out, _ = run(capsys, *words, "--json")
    return status, json.loads(out)
