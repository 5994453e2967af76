"""Health checking, as gRPC's own tools expect it: grpc.health.v1.Health of gRPC's document
doc/health-checking.md."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

Send = Callable[[Any], None]  # a status to who watches; None ends it


class Health(health.HealthServicer):
    """gRPC's own, which also lets go of who watches once the end has begun: a server waits for
    its calls."""

    def __init__(self, *services: str) -> None:
        """Of the services that are served; "" stands for all."""
        super().__init__(
            experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(1, "health")
        )
        self._watches: dict[Send, None] = {}
        for service in services:
            self.set(service, HealthCheckResponse.SERVING)

    def Watch(  # type: ignore[override]  # noqa: N802
        self, request: HealthCheckRequest, context: grpc.ServicerContext, send: Send
    ) -> None:
        """`send` is there, as it does not block."""
        self._watches[send] = None
        context.add_callback(partial(self._watches.pop, send, None))
        super().Watch(request, context, send)

    def leave(self) -> None:
        """Tell who asks, and all that watch, that the end has begun."""
        self.enter_graceful_shutdown()
        for send in list(self._watches):
            send(None)
