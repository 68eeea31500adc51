"""ModelService: what is served, and its tokenizer."""

import asyncio
from collections.abc import Callable

from nanoserve_client.v1 import model_pb2

from nanoserve.engine.engine import Engine
from nanoserve.rpc import messages, validate
from nanoserve.rpc.call import Call, off_loop


class ModelService:
    """Read-only. Event loop thread; keeps nothing between calls."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        """`engine` raises NotReady until there is one."""
        self._engine = engine

    async def ListModels(self, request: model_pb2.ListModelsRequest, _call: Call) -> model_pb2.ListModelsResponse:
        validate.nothing(request)
        return model_pb2.ListModelsResponse(models=[messages.model(self._engine().model)])

    async def Tokenize(self, request: model_pb2.TokenizeRequest, _call: Call) -> model_pb2.TokenizeResponse:
        engine = self._engine()
        prompt = await off_loop(validate.tokenization, request, engine.model)
        token_ids, text = await engine.tokenize(prompt)
        tokens = await asyncio.to_thread(lambda: [engine.codec.token_bytes(token_id) for token_id in token_ids])
        return model_pb2.TokenizeResponse(token_ids=token_ids, tokens=tokens, text=text)

    async def Detokenize(self, request: model_pb2.DetokenizeRequest, _call: Call) -> model_pb2.DetokenizeResponse:
        engine = self._engine()
        token_ids = await off_loop(validate.detokenization, request, engine.model)
        text = await asyncio.to_thread(
            engine.codec.decode, token_ids, skip_special_tokens=not request.keep_special_tokens
        )
        return model_pb2.DetokenizeResponse(text=text)
