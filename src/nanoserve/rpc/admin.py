"""AdminService: the operator's surface. auth.py asks for an admin key before a call gets here."""

import asyncio
from collections.abc import Callable

from nanoserve_client.v1 import admin_pb2

from nanoserve.engine.engine import Engine
from nanoserve.observability.flight_recorder import FlightRecorder
from nanoserve.rpc import messages, validate, watching
from nanoserve.rpc.call import Call
from nanoserve.rpc.errors import NotRecorded, RequestNotFound


class AdminService:
    """Event loop thread; keeps nothing between calls."""

    def __init__(self, engine: Callable[[], Engine], recorder: FlightRecorder | None) -> None:
        """`engine` raises NotReady until there is one. recorder: None = nothing is recorded."""
        self._engine = engine
        self._recorder = recorder

    async def Cancel(self, request: admin_pb2.CancelRequest, _call: Call) -> admin_pb2.CancelResponse:
        request_id = validate.cancellation(request)
        return admin_pb2.CancelResponse(cancelled=self._engine().cancel(request_id))

    async def ResetCache(self, request: admin_pb2.ResetCacheRequest, _call: Call) -> admin_pb2.ResetCacheResponse:
        validate.nothing(request)
        return admin_pb2.ResetCacheResponse(freed_blocks=await self._engine().reset_cache())

    async def GetStats(self, request: admin_pb2.GetStatsRequest, _call: Call) -> admin_pb2.GetStatsResponse:
        validate.nothing(request)
        return messages.stats(self._engine().stats())

    async def WatchEngine(self, request: admin_pb2.WatchEngineRequest, call: Call) -> None:
        interval_s = validate.watch(request)
        recorder = self._needed_recorder()
        position = None
        while True:
            stats = self._engine().stats()
            snapshot = recorder.snapshot(position)
            position = snapshot.position
            # While the reader is slow this waits, and the next snapshot is made when it is over.
            await call.context.write(watching.snapshot(snapshot, messages.stats(stats)))
            await asyncio.sleep(interval_s)

    async def ExplainRequest(
        self, request: admin_pb2.ExplainRequestRequest, _call: Call
    ) -> admin_pb2.ExplainRequestResponse:
        request_id = validate.explanation(request)
        timelines = self._needed_recorder().explain(request_id)
        if not timelines:
            raise RequestNotFound(request_id)
        return admin_pb2.ExplainRequestResponse(timelines=map(watching.timeline, timelines))

    def _needed_recorder(self) -> FlightRecorder:
        if self._recorder is None:
            raise NotRecorded
        return self._recorder
