"""ModelService: what is served, and its tokenizer."""

import asyncio
import time
from collections.abc import Callable

from nanoserve_client.v1 import model_pb2

from nanoserve.engine.engine import Engine
from nanoserve.engine.text import TextCodec
from nanoserve.rpc import messages, validate
from nanoserve.rpc.call import Call, off_loop

# Of a long answer, made at once: about a millisecond's work.
PIECE_TOKENS = 10_000
# Between two pieces. However short, it hands the interpreter to the event loop, which would else wait for 5 ms.
PAUSE_S = 0.0001


class ModelService:
    """Read-only. Event loop thread; keeps nothing between calls."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        """`engine` raises NotReady until there is one."""
        self._engine = engine

    async def ListModels(self, request: model_pb2.ListModelsRequest, _call: Call) -> model_pb2.ListModelsResponse:
        validate.nothing(request)
        engine = self._engine()
        # It looks into the folder that they lie in.
        names = await asyncio.to_thread(lambda: engine.adapter_names)
        adapters = [messages.adapter_model(engine.model, name, info) for name, info in names.items()]
        return model_pb2.ListModelsResponse(models=[messages.model(engine.model), *adapters])

    async def Tokenize(self, request: model_pb2.TokenizeRequest, _call: Call) -> model_pb2.TokenizeResponse:
        engine = self._engine()
        prompt, add_special_tokens = await off_loop(validate.tokenization, request, engine)
        token_ids, text = await engine.tokenize(prompt, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(_tokenized, engine.codec, token_ids, text)

    async def Detokenize(self, request: model_pb2.DetokenizeRequest, _call: Call) -> model_pb2.DetokenizeResponse:
        engine = self._engine()
        token_ids = await off_loop(validate.detokenization, request, engine)
        text = await asyncio.to_thread(
            engine.codec.decode, token_ids, skip_special_tokens=not request.keep_special_tokens
        )
        return model_pb2.DetokenizeResponse(text=text)

    async def CheckConstraint(
        self, request: model_pb2.CheckConstraintRequest, _call: Call
    ) -> model_pb2.CheckConstraintResponse:
        engine = self._engine()
        constraint = await off_loop(validate.constraint_check, request, engine)
        return messages.constraint_check(await engine.compile_constraint(constraint))


def _tokenized(codec: TextCodec, token_ids: list[int], text: str) -> model_pb2.TokenizeResponse:
    """The answer, in pieces. A text of megabytes has millions of tokens: to copy them in one call would hold the
    interpreter, and with it every stream, for a tenth of a second and more."""
    # A vocabulary is small beside such a text.
    spelled = {token_id: codec.token_bytes(token_id) for token_id in set(token_ids)}
    answer = model_pb2.TokenizeResponse(text=text)
    for start in range(0, len(token_ids), PIECE_TOKENS):
        piece = token_ids[start : start + PIECE_TOKENS]
        answer.token_ids.extend(piece)
        answer.tokens.extend([spelled[token_id] for token_id in piece])
        time.sleep(PAUSE_S)
    return answer
