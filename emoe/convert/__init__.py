"""Checkpoints with their experts encoded: what `emoe convert` does.

`encode` makes bytes of numbers, `names` says what a family calls them, `plan` which bytes go where, `run` writes them.
"""
