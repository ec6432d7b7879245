"""`emoe replay`: the command of `emoe.replay`."""

from __future__ import annotations

import argparse

from emoe.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from emoe import replay

    replay.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from emoe import replay

    with common.stage("replaying"):
        return int(replay.run(args) or 0)
