"""Mutation tests of the CUDA part on the emulation: each mutant is one change that breaks it, and must be caught.

    python scripts/cuda_mutants.py                  every mutant, until one checker catches it (some minutes)
    python scripts/cuda_mutants.py --quick          the subset that continuous integration runs, on a plain build only
    python scripts/cuda_mutants.py --all-checkers   every mutant under every checker: which one catches what
    python scripts/cuda_mutants.py --write          the sweep, and its table to csrc/tests/mutants.json
    python scripts/cuda_mutants.py --only NAME ...  some; --list shows the names

The sources are copied and built once per checker; a mutant then recompiles one file. Ends with status 1 when one
survives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))

# How an unchanged build runs without a report, and a mutant does not: (name, EMOE_SANITIZE, seeds).
CHECKERS = (("plain", "", (1, 2, 3)), ("address", "address;undefined", (1,)), ("thread", "thread", (1,)))
TABLE = ROOT / "csrc/tests/mutants.json"
SLOWER = 10  # a mutant that takes so many times as long as the unchanged sources, and over 200 s, hangs: caught
ENVIRONMENT = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1", "EMU_DELAY_US": "200"}


@dataclass(frozen=True)
class Mutant:
    """`find`, which occurs once in `file`, becomes `replace`; the executables `suites` have to notice."""

    name: str
    file: str
    find: str
    replace: str
    suites: tuple[str, ...]
    quick: bool = False


def mutants() -> list[Mutant]:
    import mutants_order

    found = list(mutants_order.MUTANTS)
    try:
        import mutants_kernels
    except ModuleNotFoundError:
        return found
    return found + list(mutants_kernels.MUTANTS)


class Tree:
    """A copy of the sources with one build folder per checker."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.folder = folder
        self.seconds: dict[tuple[str, str], float] = {}  # of the unchanged sources, by checker and suite
        wanted = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*"), *(ROOT / "cmake").rglob("*")]
        for file in (each for each in wanted if each.is_file()):
            self._write(self.source / file.relative_to(ROOT), file.read_bytes())

    @staticmethod
    def _write(target: Path, content: bytes) -> None:
        """Leaves a file alone that is right already: its time tells ninja what to build, also after a mutant."""
        if target.exists() and target.read_bytes() == content:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def configure(self, checker: str, sanitize: str) -> None:
        subprocess.run(
            ["cmake", "-G", "Ninja", "-S", self.source, "-B", self.folder / checker, "-DEMOE_TESTS=ON", "-DEMOE_CUDA=0",
             f"-DEMOE_SANITIZE={sanitize}", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"],  # quick to compile
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def build(self, checker: str, suites: tuple[str, ...]) -> bool:
        """False where it does not compile."""
        command = ["cmake", "--build", str(self.folder / checker), "--target", *suites]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        self.output = done.stdout
        return done.returncode == 0

    def time(self, checker: str, suite: str, seed: int) -> bool:
        """As `run`, for the unchanged sources."""
        started = time.monotonic()
        passed = self.run(checker, suite, seed, limit=3600)
        self.seconds[checker, suite] = max(self.seconds.get((checker, suite), 20.0), time.monotonic() - started)
        return passed

    def run(self, checker: str, suite: str, seed: int, limit: float = 0) -> bool:
        """True where the suite passes."""
        command = [str(self.folder / checker / suite)]
        if shutil.which("setarch"):
            command = ["setarch", platform.machine(), "-R", *command]
        environment = {**ENVIRONMENT, **os.environ, "EMU_SEED": str(seed)}
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                timeout=limit or SLOWER * self.seconds[checker, suite],
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def catches(tree: Tree, mutant: Mutant, checker: str, seeds: tuple[int, ...]) -> bool:
    if not tree.build(checker, mutant.suites):
        raise SystemExit(f"mutant '{mutant.name}' does not compile:\n{tree.output[-3000:]}")
    return any(not tree.run(checker, suite, seed) for seed in seeds for suite in mutant.suites)


def test(tree: Tree, mutant: Mutant, checkers: list[tuple[str, str, tuple[int, ...]]], every: bool) -> dict[str, bool]:
    """Which checkers catch it, in order; the rest is not run unless `every`."""
    path = tree.source / mutant.file
    original = path.read_text()
    if original.count(mutant.find) != 1:
        raise SystemExit(
            f"mutant '{mutant.name}': its text occurs {original.count(mutant.find)} times in {mutant.file}"
        )
    path.write_text(original.replace(mutant.find, mutant.replace))
    result = {}
    try:
        for checker, _, seeds in checkers:
            result[checker] = catches(tree, mutant, checker, seeds)
            if result[checker] and not every:
                break
    finally:
        path.write_text(original)
    return result


def outcome(hit: bool) -> str:
    return "caught" if hit else "passed"


def summary(table: dict[str, dict[str, str]], checkers: list[str]) -> str:
    """How many each checker was the first to catch."""
    firsts = [next((c for c in checkers if row.get(c) == "caught"), "none") for row in table.values()]
    return ", ".join(f"{firsts.count(name)} first by {name}" for name in checkers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--all-checkers", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--checkers", nargs="+", choices=[name for name, *_ in CHECKERS])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.relative_to(ROOT)}")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.write and (args.quick or args.checkers):
        parser.error("--write needs every checker")
    chosen = [m for m in mutants() if (not args.quick or m.quick) and (not args.only or m.name in args.only)]
    unknown = set(args.only) - {m.name for m in mutants()}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}; --list shows the names")
    if args.list:
        print("\n".join(m.name for m in chosen))
        return 0
    wanted = args.checkers or (["plain"] if args.quick else [name for name, *_ in CHECKERS])
    checkers = [each for each in CHECKERS if each[0] in wanted]
    tree = Tree(args.folder)
    suites = tuple(sorted({suite for m in chosen for suite in m.suites}))
    for checker, sanitize, seeds in checkers:
        tree.configure(checker, sanitize)
        if not tree.build(checker, suites):
            raise SystemExit(f"the unchanged sources do not compile for '{checker}':\n{tree.output[-3000:]}")
        failing = [suite for suite in suites for seed in seeds if not tree.time(checker, suite, seed)]
        if failing:
            raise SystemExit(f"the unchanged sources fail under '{checker}': {', '.join(failing)}")
    table: dict[str, dict[str, str]] = {}
    survivors = []
    for mutant in chosen:
        started = time.monotonic()
        result = test(tree, mutant, checkers, args.all_checkers)
        caught = [checker for checker, hit in result.items() if hit]
        table[mutant.name] = {"file": mutant.file, **{checker: outcome(hit) for checker, hit in result.items()}}
        if not caught:
            survivors.append(mutant.name)
        print(f"{mutant.name:58} {', '.join(caught) or 'SURVIVED':24} {time.monotonic() - started:6.1f} s", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    print(summary(table, [name for name, *_ in checkers]))
    if args.write:  # with --only: these rows anew, the others as they were
        before = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        rows = {m.name: table.get(m.name) or before.get(m.name) for m in mutants()}
        TABLE.write_text(json.dumps({name: row for name, row in rows.items() if row}, indent=1) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
