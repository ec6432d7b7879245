"""Routing modes: what happens to a routed expert that is not resident. docs/routing.md explains them."""

from emoe.requests import Request, Tally
from emoe.routing.control import Routing, attach
from emoe.routing.options import RoutingOptions, parse_options, routing_of
from emoe.routing.recognise import Site, find_routers
from emoe.routing.resident import FixedResidency, Residency, random_residency
from emoe.routing.rules import Rule

__all__ = [
    "FixedResidency",
    "Request",
    "Residency",
    "Routing",
    "RoutingOptions",
    "Rule",
    "Site",
    "Tally",
    "attach",
    "find_routers",
    "parse_options",
    "random_residency",
    "routing_of",
]
