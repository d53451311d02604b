"""What `/metrics` tells, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Meters:
    """Counts requests, inputs, tokens and batches.

    Args:
        waiting: Tells how many requests wait for the model.
    """

    def __init__(self, waiting: Callable[[], int]):
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "polarctl_requests", "Requests by route and status", ["route", "status"], registry=own
        )
        self.seconds = Histogram(
            "polarctl_request_seconds", "Seconds of a request", ["route"], registry=own
        )
        self.inputs = Counter("polarctl_inputs", "Rewards computed", registry=own)
        self.floored = Counter(
            "polarctl_floored", "Outputs that got the reward floor", ["reason"], registry=own
        )
        self.tokens = Counter("polarctl_tokens", "Tokens of the inputs", registry=own)
        self.batches = Counter("polarctl_batches", "Batches of requests", registry=own)
        gauge = Gauge("polarctl_waiting_requests", "Requests that wait for the model", registry=own)
        gauge.set_function(waiting)

    def text(self) -> bytes:
        """The numbers of now."""
        return generate_latest(self.registry)
