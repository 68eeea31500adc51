"""OpenAI's REST API in front of a nanoserve server: a translation, and nothing else.

schema.py             a table of fields → a checked request;  fields.py: the tables of all APIs
answer.py             what the APIs share;  chat.py, completions.py, responses.py: one each. Pure, like:
errors.py             gRPC status → HTTP;  pages.py: the OpenAPI schema and /docs
live/                 the page at / that draws what the engine does, and its data
store.py              responses that are kept
streaming.py, app.py  the ASGI application;  server.py: uvicorn, and the command
"""
