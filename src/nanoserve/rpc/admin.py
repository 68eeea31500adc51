"""AdminService: the operator's surface. auth.py asks for an admin key before a call gets here."""

from collections.abc import Callable

from nanoserve_client.v1 import admin_pb2

from nanoserve.engine.engine import Engine
from nanoserve.rpc import messages, validate
from nanoserve.rpc.call import Call


class AdminService:
    """Event loop thread; keeps nothing between calls."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        """`engine` raises NotReady until there is one."""
        self._engine = engine

    async def Cancel(self, request: admin_pb2.CancelRequest, _call: Call) -> admin_pb2.CancelResponse:
        request_id = validate.cancellation(request)
        return admin_pb2.CancelResponse(cancelled=self._engine().cancel(request_id))

    async def ResetCache(self, request: admin_pb2.ResetCacheRequest, _call: Call) -> admin_pb2.ResetCacheResponse:
        validate.nothing(request)
        return admin_pb2.ResetCacheResponse(freed_blocks=await self._engine().reset_cache())

    async def GetStats(self, request: admin_pb2.GetStatsRequest, _call: Call) -> admin_pb2.GetStatsResponse:
        validate.nothing(request)
        return messages.stats(self._engine().stats())
