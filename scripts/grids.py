#!/usr/bin/env python3
"""Writes csrc/core/grids.hpp: the tables of GGUF's IQ formats, as the `gguf` library has them.

python scripts/grids.py [--check]    (--check: exit status 1 where the file is another)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np

HEADER = Path(__file__).resolve().parents[1] / "csrc/core/grids.hpp"
# Format whose grid it is, and bits of a level.
GRIDS = {"Iq2Xxs": ("IQ2_XXS", 2), "Iq2Xs": ("IQ2_XS", 2), "Iq2S": ("IQ2_S", 2), "Iq3Xxs": ("IQ3_XXS", 4),
         "Iq3S": ("IQ3_S", 4), "Iq1": ("IQ1_S", 2)}  # fmt: skip

HEAD = """\
// Written by scripts/grids.py: the tables of GGUF's IQ formats. An entry is eight levels of two bits, or four of four,
// the first in the lowest bits. Not inline, as in codes.hpp.
#pragma once

namespace emoe {

// clang-format off
"""
TAIL = """\
// clang-format on

}  // namespace emoe
"""


def table(name: str, kind: str, bits: int) -> str:
    of = getattr(gguf.quants, kind)
    of.init_grid()
    grid = of.grid.reshape(of.grid_shape)  # [entries, values] float32
    levels = np.searchsorted(np.array(of.grid_map, np.float32), grid).astype(np.uint16)
    packed = (levels << (bits * np.arange(grid.shape[1], dtype=np.uint16))).sum(1, dtype=np.uint16)
    lines = [f"constexpr signed char k{name}Levels[] = {{{', '.join(map(str, of.grid_map))}}};"]
    lines.append(f"constexpr unsigned short k{name}Packed[{len(packed)}] = {{")
    words = [f"0x{value:04X}" for value in packed]
    lines += ["    " + ", ".join(words[at : at + 14]) + "," for at in range(0, len(words), 14)]
    return "\n".join([*lines, "};"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = HEAD + "\n".join(table(name, *of) for name, of in GRIDS.items()) + TAIL
    if args.check:
        same = HEADER.exists() and HEADER.read_text() == text
        print(f"{HEADER.name} is {'' if same else 'not '}what the gguf library has")
        return int(not same)
    HEADER.write_text(text)
    print(f"wrote {HEADER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
