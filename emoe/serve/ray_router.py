"""Ray Serve's request router of ours: `emoe.serve.routes` decides, this hands it what Ray knows. Needs emoe[ray]."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from emoe.serve.fleet import Call
from emoe.serve.routes import Books, Hint, Published


class PlacementRouter(RequestRouter):
    """Sends a request to the replica that `emoe.engine.placement` names; where that one takes no more, to the next.

    Its argument `router` is a name in `CHOICES` there. Calls that are no `Call` are looked at as unknown requests.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._books = Books(kwargs["router"])
        self._chosen: dict[str, PendingRequest] = {}  # for which a replica was named, and none has it yet

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each."""
        if not candidate_replicas:
            return []
        for id in [id for id, request in self._chosen.items() if request.future.cancelled()]:
            self._settle(id)
            self._books.withdraw(id)
        by_id = {each.replica_id: each for each in candidate_replicas}
        says = {id: Published.of(each.routing_stats) for id, each in by_id.items()}
        if pending_request is None:
            return [list(by_id.values())]
        request = pending_request.metadata.internal_request_id
        self._chosen[request] = pending_request
        return [[by_id[id]] for id in self._books.order(says, request, _hint(pending_request))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request = pending_request.metadata.internal_request_id
        self._settle(request)
        self._books.sent(replica_id, request, _hint(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        if self._settle(internal_request_id):  # it was given up on its way
            self._books.withdraw(internal_request_id)
        self._books.over(replica_id, internal_request_id)

    def _settle(self, request: str) -> bool:
        return self._chosen.pop(request, None) is not None

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._books.forget([each for each in self.curr_replicas if each != replica_id])


def _hint(request: PendingRequest) -> Hint:
    given = request.args[0] if request.args else None
    return given.hint if isinstance(given, Call) else Hint("", answers=0)
