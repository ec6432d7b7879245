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

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each."""
        if not candidate_replicas:
            return []
        by_id = {each.replica_id: each for each in candidate_replicas}
        says = {id: Published.of(each.routing_stats) for id, each in by_id.items()}
        request = None if pending_request is None else pending_request.metadata.internal_request_id
        return [[by_id[id]] for id in self._books.order(says, request, _hint(pending_request))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._books.sent(replica_id, pending_request.metadata.internal_request_id, _hint(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._books.over(replica_id, internal_request_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._books.forget([each for each in self.curr_replicas if each != replica_id])


def _hint(request: PendingRequest | None) -> Hint:
    given = request.args[0] if request is not None and request.args else None
    return given.hint if isinstance(given, Call) else Hint("", answers=0)
