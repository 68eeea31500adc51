"""OpenAI's REST API in front of a nanoserve server: a translation, and nothing else.

schema.py             a table of fields → a checked request;  fields.py: the tables of all APIs
answer.py             what the APIs share;  chat.py, completions.py, responses.py: one each. Pure, like:
errors.py             gRPC status → HTTP;  pages.py: the OpenAPI schema and /docs
live/                 the page at / that draws what the engine does, and its data
edge.py               what every request passes: its id, and who may call;  refusals.py: a line for each refusal
exchange.py           what a request says;  pieces.py: large JSON
streaming.py          answers on their way;  background.py: those that go on without a reader
conversations.py      the endpoints of /v1/responses;  store.py: responses that are kept
app.py                all endpoints: the ASGI application;  server.py: uvicorn, and the command
"""
