"""Which expert is in which slot: states, holds and evictions, per layer. Ids only; no bytes, tensors or waiting.

docs/slots.md draws the state machine. Not thread-safe: callers share the runtime's lock.

An update may be cut off between any two of its lines (KeyboardInterrupt). `_state` and `_expert_of` are what `repair`
goes by; the rest is made from them. So an update counts the version up first, and changes a slot's state before the
names of what is in it: a slot that is being given away is loading, or free, before anything else says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from emoe.errors import CacheError, CacheFullError, ConfigError
from emoe.slots import policy as policies
from emoe.slots.policy import PolicyFactory

# A slot's state is one number: 0 and up is ready with that many holds.
_CLOSED = -3
_FREE = -2
_LOADING = -1
_NOBODY = -1


class Admission(NamedTuple):
    """A slot that is now loading, and the expert that left it (None where it was free)."""

    slot: int
    evicted: int | None


class CacheManager:
    """Slots of every layer and the experts in them.

    Args:
        slots_per_layer: number of slots of each layer, at least 1; slot numbers count through the layers.
        policy: a name in `emoe.slots.policy.POLICIES`, or a function layer -> policy object.

    Raises:
        ConfigError: an unknown policy, or a layer without a slot.
    """

    def __init__(self, slots_per_layer: Sequence[int], *, policy: str | PolicyFactory = "lru") -> None:
        for layer, count in enumerate(slots_per_layer):
            if count < 1:
                raise ConfigError(f"layer {layer} has {count} slots; it needs at least 1")
        make = policies.make(policy)
        self._ranges: list[range] = []
        first = 0
        for count in slots_per_layer:
            self._ranges.append(range(first, first + count))
            first += count
        layers = range(len(self._ranges))
        self._policies = [make(layer) for layer in layers]
        for layer, each in enumerate(self._policies):
            if missing := [name for name in ("touch", "victim", "forget", "known") if not hasattr(each, name)]:
                raise ConfigError(f"policy={policy!r} gave {each!r} for layer {layer}, which has no {missing[0]}")
        self._slot_of: list[dict[int, int]] = [{} for _ in layers]  # loading, ready or held
        self._free = [list(reversed(slots)) for slots in self._ranges]
        self._expert_of = [_NOBODY] * first
        self._state = [_FREE] * first
        self._protected: list[frozenset[int]] = [frozenset() for _ in layers]
        self._steps = [-1] * len(self._ranges)  # the first step is 0
        self._versions = [0] * len(self._ranges)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._ranges)

    def slots(self, layer: int) -> range:
        """The slot numbers of a layer."""
        return self._ranges[layer]

    def lookup(self, layer: int, expert: int) -> int | None:
        """The expert's slot, be it loading, ready or held; None where it is in none."""
        return self._slot_of[layer].get(expert)

    def state(self, slot: int) -> str:
        """ "closed", "free", "loading", "ready" or "held"."""
        state = self._state[slot]
        if state == _CLOSED:
            return "closed"
        if state == _FREE:
            return "free"
        if state == _LOADING:
            return "loading"
        return "held" if state else "ready"

    def resident(self, layer: int) -> list[int]:
        """Experts that are ready or held, in ascending order."""
        # A list: a signal handler that runs the model may change the dict between two rounds of the loop.
        return sorted(expert for expert, slot in list(self._slot_of[layer].items()) if self._state[slot] >= 0)

    def version(self, layer: int) -> int:
        """A number that changes whenever `resident(layer)` does."""
        return self._versions[layer]

    def free(self, layer: int) -> int:
        """How many slots of a layer hold nothing."""
        return len(self._free[layer])

    def capacity(self, layer: int) -> int:
        """How many slots of a layer are in use: all but the closed ones."""
        return len(self._slot_of[layer]) + len(self._free[layer])

    def close(self, layer: int) -> Admission | None:
        """Takes a slot out of use until `open`: a free one, or that of the expert that would be evicted next.

        Returns the slot and who left it; None where each is held or loading.

        Raises:
            CacheError: it is the layer's last.
        """
        if self.capacity(layer) <= 1:
            raise CacheError(f"layer {layer} has one slot in use, which cannot be closed")
        self._versions[layer] += 1
        if self._free[layer]:
            slot = self._free[layer][-1]
            self._state[slot] = _CLOSED
            self._free[layer].pop()
            return Admission(slot, None)
        ready = {other for other, where in list(self._slot_of[layer].items()) if self._state[where] == 0}
        if not ready:
            return None
        evicted = self._policies[layer].victim(ready - self._protected[layer] or ready)
        slot = self._slot_of[layer][evicted]
        self._state[slot] = _CLOSED
        self._expert_of[slot] = _NOBODY
        del self._slot_of[layer][evicted]
        self._policies[layer].forget(evicted)
        return Admission(slot, evicted)

    def open(self, layer: int) -> int:
        """A closed slot is free again.

        Raises:
            CacheError: none is closed.
        """
        slot = next((slot for slot in self._ranges[layer] if self._state[slot] == _CLOSED), None)
        if slot is None:
            raise CacheError(f"layer {layer} has no slot that is closed")
        self._versions[layer] += 1
        self._state[slot] = _FREE
        self._free[layer].append(slot)
        return slot

    def protect(self, layer: int, experts: Iterable[int]) -> None:
        """These experts, in slots or not, are evicted only where nothing else can be; replaces a layer's before."""
        self._protected[layer] = frozenset(experts)

    def protected(self, layer: int) -> frozenset[int]:
        """What `protect` was last told."""
        return self._protected[layer]

    @property
    def learns(self) -> bool:
        """Whether the policy goes by `saw`."""
        return any(hasattr(each, "saw") for each in self._policies)

    def saw(self, layer: int, picks: Any) -> None:
        """What the tokens of the next step of a layer picked: an integer array [T, K], below 0 for no pick."""
        saw = getattr(self._policies[layer], "saw", None)
        if saw is not None:
            saw(picks)

    def advance(self, layer: int) -> None:
        """Begins the next step of a layer: the clock that its policy sees."""
        self._steps[layer] += 1

    def touch(self, layer: int, expert: int) -> None:
        """The expert is used in this step.

        Raises:
            CacheError: it is in no slot.
        """
        if expert not in self._slot_of[layer]:
            raise CacheError(f"expert ({layer}, {expert}) is in no slot and cannot be touched")
        self._policies[layer].touch(expert, self._steps[layer])

    def hold(self, layer: int, expert: int) -> int:
        """Keeps a ready expert from being evicted until `release`; holds are counted. Returns its slot.

        Raises:
            CacheError: it is in no slot, or still loading.
        """
        slot = self._slot_of[layer].get(expert)
        if slot is None or self._state[slot] < 0:
            raise self._refusal(layer, expert, "held")
        self._state[slot] += 1
        return slot

    def hold_resident(self, layer: int, experts: Iterable[int]) -> tuple[list[tuple[int, int]], list[int]]:
        """Begins a step, then holds and touches those of `experts` that are ready; the way in of every forward.

        Returns:
            (expert, slot) of those that are now held, and the other experts; both in the order given.
        """
        slot_of, state = self._slot_of[layer], self._state
        touch = self._policies[layer].touch
        step = self._steps[layer] = self._steps[layer] + 1
        held, missing = [], []
        for expert in experts:
            slot = slot_of.get(expert)
            if slot is None or state[slot] < 0:
                missing.append(expert)
            else:
                state[slot] += 1
                touch(expert, step)
                held.append((expert, slot))
        return held, missing

    def release(self, layer: int, expert: int) -> None:
        """Takes one hold back.

        Raises:
            CacheError: the expert is not held.
        """
        slot = self._slot_of[layer].get(expert)
        if slot is None or self._state[slot] <= 0:
            raise self._refusal(layer, expert, "released")
        self._state[slot] -= 1

    def release_all(self, layer: int, held: Iterable[tuple[int, int]]) -> None:
        """Takes one hold of each back, (expert, slot) as `hold_resident` gave them; the way out of every forward.

        Raises:
            CacheError: as `release`.
        """
        state, expert_of = self._state, self._expert_of
        for expert, slot in held:
            if state[slot] <= 0 or expert_of[slot] != expert:
                raise self._refusal(layer, expert, "released")
            state[slot] -= 1

    def admit(self, layer: int, expert: int, keep: Collection[int] = frozenset()) -> Admission:
        """Gives the expert a slot that is free, or whose expert the policy evicts; the slot is then loading.

        Held and loading slots are never taken, nor those of experts in `keep`; protected experts are taken last.

        Raises:
            CacheFullError: no slot of the layer can be taken.
            CacheError: the expert already has a slot.
        """
        admission = self.reserve(layer, expert, keep)
        self.assign(layer, expert, admission)
        return admission

    def reserve(self, layer: int, expert: int, keep: Collection[int] = frozenset()) -> Admission:
        """The first half of `admit`: the slot is loading, and everything else as it was until `assign` or `give_back`.

        Raises:
            CacheFullError, CacheError: as `admit`.
        """
        slot_of = self._slot_of[layer]
        if expert in slot_of:
            raise self._refusal(layer, expert, "admitted")
        evicted = None
        if self._free[layer]:
            slot = self._free[layer][-1]
        else:
            state = self._state
            candidates = {other for other, where in slot_of.items() if state[where] == 0 and other not in keep}
            if not candidates:
                raise CacheFullError(
                    f"expert ({layer}, {expert}) finds no slot: of the layer's {len(self._ranges[layer])}, "
                    f"{self._describe(layer)}, and {len(keep)} experts are to be kept"
                )
            evicted = self._policies[layer].victim(candidates - self._protected[layer] or candidates)
            slot = slot_of[evicted]
            self._versions[layer] += 1
        self._state[slot] = _LOADING
        return Admission(slot, evicted)

    def assign(self, layer: int, expert: int, admission: Admission) -> None:
        """The second half of `admit`: the slot is the expert's, and what was in it is forgotten."""
        slot, evicted = admission
        if evicted is None:
            self._free[layer].pop()
        else:
            del self._slot_of[layer][evicted]
            self._policies[layer].forget(evicted)
        self._expert_of[slot] = expert
        self._slot_of[layer][expert] = slot
        self._policies[layer].touch(expert, self._steps[layer])

    def give_back(self, layer: int, admission: Admission) -> None:
        """Takes `reserve` back: nothing was written to the slot."""
        if admission.evicted is not None:
            self._versions[layer] += 1
        self._state[admission.slot] = _FREE if admission.evicted is None else 0

    def ready(self, layer: int, expert: int) -> None:
        """The expert's bytes are all in its slot.

        Raises:
            CacheError: it was not loading.
        """
        slot = self._loading_slot(layer, expert, "made ready")
        self._versions[layer] += 1
        self._state[slot] = 0

    def fail(self, layer: int, expert: int) -> None:
        """The expert's bytes did not arrive: its slot is free.

        Raises:
            CacheError: it was not loading.
        """
        self._loading_slot(layer, expert, "failed")
        self._forget(layer, expert)

    def drop(self, layer: int, expert: int) -> None:
        """Takes a ready expert out of its slot.

        Raises:
            CacheError: it is in no slot, loading, or held.
        """
        slot = self._slot_of[layer].get(expert)
        if slot is None or self._state[slot] != 0:
            raise self._refusal(layer, expert, "dropped")
        self._forget(layer, expert)

    def loading(self, layer: int) -> list[tuple[int, int]]:
        """(expert, slot) of a layer's loading slots, also where an update of the slot was cut off.

        Where `admit` was, the expert may be the one that leaves.
        """
        return [(self._expert_of[slot], slot) for slot in self._ranges[layer] if self._state[slot] == _LOADING]

    def repair(self, layer: int, loading: Collection[int]) -> None:
        """Makes a layer whole after an update that was cut off; nobody holds a slot of it any more.

        Args:
            layer: the layer.
            loading: slots that are loading indeed; the others that say so are free from now on.
        """
        self._versions[layer] += 1
        slot_of: dict[int, int] = {}
        free = []
        for slot in self._ranges[layer]:
            expert, state = self._expert_of[slot], self._state[slot]
            if state == _CLOSED:
                self._expert_of[slot] = _NOBODY
                continue
            lost = state == _LOADING and slot not in loading
            if state == _FREE or lost or expert == _NOBODY or expert in slot_of:
                self._state[slot] = _FREE
                self._expert_of[slot] = _NOBODY
                free.append(slot)
            else:
                self._state[slot] = min(state, 0)
                slot_of[expert] = slot
        self._slot_of[layer] = slot_of
        self._free[layer] = free[::-1]
        policy = self._policies[layer]
        known = set(policy.known())
        for expert in known - slot_of.keys():
            policy.forget(expert)
        for expert in sorted(slot_of.keys() - known):
            policy.touch(expert, self._steps[layer])

    def check_integrity(self) -> None:
        """Proves that states, maps, free lists and policies agree.

        Raises:
            CacheError: they do not; names layer and slot.
        """
        for layer, slots in enumerate(self._ranges):
            counts = dict.fromkeys(("closed", "free", "loading", "ready", "held"), 0)
            for slot in slots:
                counts[self.state(slot)] += 1
                expert = self._expert_of[slot]
                if (self._state[slot] in (_FREE, _CLOSED)) != (expert == _NOBODY):
                    raise CacheError(f"slot {slot} of layer {layer} is {self.state(slot)} and names expert {expert}")
                if expert != _NOBODY and self._slot_of[layer].get(expert) != slot:
                    raise CacheError(
                        f"slot {slot} names expert ({layer}, {expert}), which is in {self.lookup(layer, expert)}"
                    )
            free = self._free[layer]
            if sorted(free) != [slot for slot in slots if self._state[slot] == _FREE]:
                raise CacheError(f"layer {layer}: the free list {sorted(free)} is not the free slots")
            if len(self._slot_of[layer]) != len(slots) - len(free) - counts["closed"] or sum(counts.values()) != len(
                slots
            ):
                raise CacheError(
                    f"layer {layer}: {counts} and {len(self._slot_of[layer])} experts in {len(slots)} slots"
                )
            if set(self._policies[layer].known()) != self._slot_of[layer].keys():
                raise CacheError(f"layer {layer}: the policy's experts are not those in slots")

    def _loading_slot(self, layer: int, expert: int, verb: str) -> int:
        slot = self._slot_of[layer].get(expert)
        if slot is None or self._state[slot] != _LOADING:
            raise self._refusal(layer, expert, verb)
        return slot

    def _forget(self, layer: int, expert: int) -> None:
        slot = self._slot_of[layer][expert]
        self._versions[layer] += 1
        self._state[slot] = _FREE
        self._expert_of[slot] = _NOBODY
        del self._slot_of[layer][expert]
        self._policies[layer].forget(expert)
        self._free[layer].append(slot)

    def _refusal(self, layer: int, expert: int, verb: str) -> CacheError:
        slot = self._slot_of[layer].get(expert)
        where = "in no slot" if slot is None else f"{self.state(slot)} in slot {slot}"
        return CacheError(f"expert ({layer}, {expert}) is {where} and cannot be {verb}")

    def _describe(self, layer: int) -> str:
        states = [self.state(slot) for slot in self._ranges[layer]]
        return ", ".join(f"{states.count(name)} {name}" for name in ("loading", "held", "ready"))
