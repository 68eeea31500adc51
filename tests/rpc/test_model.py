"""ModelService and AdminService over a channel."""

import asyncio

import grpc
import pytest
from nanoserve_client.v1 import admin_pb2, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb

from nanoserve.errors import NotReady
from nanoserve.rpc import model


async def test_the_served_model_is_listed_with_its_defaults(served):
    (model,) = (await served.model.ListModels(model_pb2.ListModelsRequest())).models
    assert (model.name, model.max_context_tokens, model.vocab_size) == ("fake", 200, 257)
    assert list(model.eos_token_ids) == [256]
    assert model.create_time.ToMilliseconds() == 1_700_000_000_250
    set_fields = {field.name for field, _ in model.default_sampling.ListFields()}
    scalars = {field.name for field in pb.Sampling.DESCRIPTOR.fields} - {"seed", "logit_bias"}
    assert set_fields == scalars
    assert (model.default_sampling.temperature, model.default_sampling.top_k) == (0.75, 40)


async def test_the_served_model_says_how_it_guesses(served):
    (model,) = (await served.model.ListModels(model_pb2.ListModelsRequest())).models
    assert list(model.draft_sources) == [pb.DRAFT_SOURCE_NGRAM, pb.DRAFT_SOURCE_DRAFT_MODEL]
    assert (model.max_draft_tokens, model.draft_model) == (8, "smaller")


async def test_a_text_is_tokenized(served):
    answer = await served.model.Tokenize(model_pb2.TokenizeRequest(text="hé"))
    assert answer == model_pb2.TokenizeResponse(token_ids=[104, 0xC3, 0xA9], tokens=[b"h", b"\xc3", b"\xa9"], text="hé")


async def test_a_long_answer_is_made_in_pieces_that_join(served, monkeypatch):
    monkeypatch.setattr(model, "PIECE_TOKENS", 2)
    text = "abcabca"
    answer = await served.model.Tokenize(model_pb2.TokenizeRequest(text=text))
    assert bytes(answer.token_ids) == b"".join(answer.tokens) == text.encode()


async def test_a_chat_is_rendered_and_tokenized(served):
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content=c) for c in "ab"])
    answer = await served.model.Tokenize(model_pb2.TokenizeRequest(chat=chat))
    assert (answer.text, bytes(answer.token_ids)) == ("a\nb", b"a\nb")


async def test_token_ids_become_text_with_or_without_special_tokens(served):
    request = model_pb2.DetokenizeRequest(token_ids=[104, 0xC3, 0xA9, 0xC3, 256])
    assert (await served.model.Detokenize(request)).text == "hé\N{REPLACEMENT CHARACTER}"
    request.keep_special_tokens = True
    assert (await served.model.Detokenize(request)).text == "hé\N{REPLACEMENT CHARACTER}<eos>"


@pytest.mark.parametrize("method", ["Tokenize", "Detokenize"])
async def test_unary_calls_fail_by_the_same_table(served, failure_of, method):
    request_class = getattr(model_pb2, f"{method}Request")
    failure = await failure_of(getattr(served.model, method)(request_class(model="other")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    call = served.channel.unary_unary(f"/nanoserve.v1.ModelService/{method}")
    failure = await failure_of(call(b"\x0a\x01\xff"))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_an_unknown_field_is_refused_where_there_are_no_known_ones(served, failure_of):
    call = served.channel.unary_unary("/nanoserve.v1.ModelService/ListModels")
    failure = await failure_of(call(b"\x08\x01"))
    assert list(failure.violations) == ["1"]


async def test_the_operator_ends_every_request_of_a_label(served, failure_of):
    served.engine.script = served.engine.until_operator_cancel("r-1")
    calls = [served.generation.Generate(pb.GenerateRequest(text="hi")) for _ in range(2)]
    for call in calls:
        await call.initial_metadata()
    answer = await served.admin.Cancel(admin_pb2.CancelRequest(request_id="r-1"))
    assert answer.cancelled == 2
    for failure in await asyncio.gather(*map(failure_of, calls)):
        assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "CANCELLED_BY_OPERATOR")
    answer = await served.admin.Cancel(admin_pb2.CancelRequest(request_id="r-1"))
    assert answer.cancelled == 0


async def test_a_cancel_without_an_id_is_refused(served, failure_of):
    failure = await failure_of(served.admin.Cancel(admin_pb2.CancelRequest()))
    assert list(failure.violations) == ["request_id"]


async def test_the_cache_is_reset(served):
    answer = await served.admin.ResetCache(admin_pb2.ResetCacheRequest())
    assert (answer.freed_blocks, served.engine.num_resets) == (7, 1)


async def test_the_cache_of_an_engine_that_goes_down_is_not_reset(served, failure_of):
    async def refuse():
        raise NotReady("draining", 1.0)

    served.engine.reset_cache = refuse
    failure = await failure_of(served.admin.ResetCache(admin_pb2.ResetCacheRequest()))
    assert failure.code == grpc.StatusCode.UNAVAILABLE


async def test_every_figure_of_the_snapshot_is_reported(served):
    stats = await served.admin.GetStats(admin_pb2.GetStatsRequest())
    assert stats.uptime.ToMilliseconds() == 61_500
    stats.ClearField("uptime")
    assert stats == admin_pb2.GetStatsResponse(
        running=0,
        waiting=2,
        kv_blocks_total=100,
        kv_blocks_used=0,
        kv_blocks_cached=30,
        kv_block_tokens=16,
        prefix_hit_ratio=0.25,
        draft_acceptance_ratio=0.75,
        tokens_per_second=12.5,
        preemptions=4,
    )
