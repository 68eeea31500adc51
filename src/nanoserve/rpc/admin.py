"""AdminService: the operator's surface. auth.py asks for an admin key before a call gets here."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from nanoserve_client.v1 import admin_pb2

from nanoserve.adapter.vocabulary import AdapterStatus, Residency
from nanoserve.engine.engine import Engine
from nanoserve.errors import NotRecorded, RequestNotFound
from nanoserve.rpc import messages, validate
from nanoserve.rpc.call import Call

# Making snapshots may take this part of the event loop's time, for all watchers together: the rest is for requests.
WATCHERS_SHARE = 0.1


class Recorder(Protocol):
    """Remembers what the engine did, for WatchEngine and ExplainRequest: flight_recorder/ is one."""

    def snapshot(self, position: int | None) -> tuple[admin_pb2.WatchEngineResponse, int]:
        """The engine now, without `stats`, and its steps since the snapshot that came with this position. None = it is
        the first one. Also the position for the next snapshot."""
        ...

    def explain(self, request_id: str) -> list[admin_pb2.RequestTimeline]:
        """What happened to all requests with the caller's id, newest first; empty = none is known."""
        ...


class AdminService:
    """Event loop thread; keeps nothing between calls but the number of those who watch."""

    def __init__(self, engine: Callable[[], Engine], recorder: Recorder | None) -> None:
        """`engine` raises NotReady until there is one. recorder: None = nothing is recorded."""
        self._engine = engine
        self._recorder = recorder
        self._num_watchers = 0

    async def Cancel(self, request: admin_pb2.CancelRequest, _call: Call) -> admin_pb2.CancelResponse:
        request_id = validate.request_id(request)
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
        self._num_watchers += 1
        try:
            while True:
                begin_s = time.thread_time()
                message, position = recorder.snapshot(position)
                message.stats.CopyFrom(messages.stats(self._engine().stats()))
                took_s = time.thread_time() - begin_s
                # While the reader is slow this waits, and the next snapshot is made when it is over.
                await call.context.write(message)
                await asyncio.sleep(_pause_s(interval_s, took_s, self._num_watchers))
        finally:
            self._num_watchers -= 1

    async def ExplainRequest(
        self, request: admin_pb2.ExplainRequestRequest, _call: Call
    ) -> admin_pb2.ExplainRequestResponse:
        request_id = validate.request_id(request)
        timelines = self._needed_recorder().explain(request_id)
        if not timelines:
            raise RequestNotFound(request_id)
        return admin_pb2.ExplainRequestResponse(timelines=timelines)

    async def LoadAdapter(self, request: admin_pb2.LoadAdapterRequest, _call: Call) -> admin_pb2.LoadAdapterResponse:
        engine = self._engine()
        validate.adapter_load(request, engine.model)
        info = await engine.load_adapter(
            request.name, request.path, is_pinned=request.pinned, may_replace=request.replace
        )
        known = {status.info.adapter: status for status in (await engine.list_adapters()).adapters}
        # Somebody may have unloaded or replaced it meanwhile.
        status = known.get(info.adapter, AdapterStatus(info, Residency.HOST))
        return admin_pb2.LoadAdapterResponse(adapter=messages.adapter(status))

    async def UnloadAdapter(
        self, request: admin_pb2.UnloadAdapterRequest, _call: Call
    ) -> admin_pb2.UnloadAdapterResponse:
        engine = self._engine()
        drain_timeout_s = validate.adapter_unload(request, engine.model)
        await engine.unload_adapter(request.name, drain_timeout_s)
        return admin_pb2.UnloadAdapterResponse()

    async def ListAdapters(self, request: admin_pb2.ListAdaptersRequest, _call: Call) -> admin_pb2.ListAdaptersResponse:
        validate.nothing(request)
        return messages.adapters(await self._engine().list_adapters())

    def _needed_recorder(self) -> Recorder:
        if self._recorder is None:
            raise NotRecorded
        return self._recorder


def _pause_s(interval_s: float, took_s: float, num_watchers: int) -> float:
    """Until the next snapshot, when the last one took so much time of the event loop's thread."""
    return max(interval_s, num_watchers * took_s / WATCHERS_SHARE)
