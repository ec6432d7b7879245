"""Steps that do not need the host, for CUDA graphs: `model.emoe.graphs` (docs/cuda.md).

Those of `routing="resident"`, and of `exact` where all experts are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from emoe.compute.bank import Bank
from emoe.compute.slot_tables import SlotTables
from emoe.errors import ConfigError


class Graphs:
    """Settles the slot tables of a model and guards replays of its graphs.

    Settle, run a step, capture one, and be `replaying` it.

    Args:
        bank: whose tables and slots they are.
        mode: that of routing.
        top_k: experts of a token.
        require_open: raises where the runtime was closed.
    """

    def __init__(self, bank: Bank, mode: str, top_k: int, require_open: Callable[[], None]) -> None:
        self._bank, self._mode, self._top_k, self._require_open = bank, mode, top_k, require_open

    def settle(self) -> None:
        """Fills free slots and writes the slot tables: until experts in memory change, steps do not need the host.

        Free slots get the experts with the lowest ids; a prompt that ran before has filled them with its own. Layers
        with a token table for router (`stats()["routing"]["exact_layers"]`) need the host in each step all the same.

        Raises:
            ClosedError: the runtime was closed.
            ConfigError: no GPU, or any step may load experts; a layer has fewer slots than a token has experts.
            ReadError: the bytes of an expert could not be read; the others are loaded.
        """
        with self._bank.lock:
            self._tables().settle(self._top_k)

    def replaying(self) -> AbstractContextManager[None]:
        """In the block, graphs captured of this model are replayed on the current stream.

        Their slot tables are those of the experts in memory now, and no slot is filled before the replays have read it.
        Only replays belong in it: a load that the block itself begins does not wait for those before it.

        Raises:
            ClosedError, ConfigError: as `settle`.
            EmoeError: a layer has a free slot or a prefetch under way (`settle` ends both).
        """
        return self._tables().replaying(self._bank.slab, self._top_k)

    def _tables(self) -> SlotTables:
        self._require_open()
        if self._bank.tables is None:
            raise ConfigError(
                f"device='{self._bank.device.name}' with routing='{self._mode}' may need the host in any step; steps "
                "without it need a GPU, and routing='exact' with all experts in memory, or routing='resident' without "
                "max_substituted_mass and without top_pick='keep'"
            )
        return self._bank.tables
