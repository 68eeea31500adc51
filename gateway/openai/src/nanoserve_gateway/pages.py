"""What describes the API: its OpenAPI schema, and /docs, a page that needs nothing from elsewhere. From the tables."""

import functools
import html as markup
import importlib.metadata
from typing import Any

from pydantic.json_schema import models_json_schema

from nanoserve_gateway.fields import QUERIES, SCHEMAS
from nanoserve_gateway.schema import Schema

# (method, path) -> what it does.
ENDPOINTS = {
    ("POST", "/v1/chat/completions"): "Answer a conversation.",
    ("POST", "/v1/completions"): "Complete texts or token ids.",
    ("POST", "/v1/responses"): "Answer, and remember the conversation.",
    ("POST", "/v1/responses/input_tokens"): "Count the tokens of what a response would answer to.",
    ("GET", "/v1/responses/{id}"): "A response that is kept.",
    ("DELETE", "/v1/responses/{id}"): "Forget it.",
    ("POST", "/v1/responses/{id}/cancel"): "End one that runs in the background.",
    ("GET", "/v1/responses/{id}/input_items"): "What it answered to.",
    ("GET", "/v1/models"): "The served model, and its adapters.",
    ("GET", "/v1/models/{name}"): "One of them.",
    ("POST", "/tokenize"): "Token ids of a text or a conversation.",
    ("POST", "/detokenize"): "Text of token ids.",
    (
        "POST",
        "/v1/load_lora_adapter",
    ): "Read a LoRA adapter, and serve it as a model. Needs an admin key, if there are keys.",
    (
        "POST",
        "/v1/unload_lora_adapter",
    ): "Stop to serve it, once its requests have ended. Needs an admin key, if there are keys.",
    ("GET", "/health"): "200 once requests are served, else 503. Needs no key.",
    ("GET", "/version"): "The gateway's version.",
    ("GET", "/docs"): "This table, for a browser.",
    ("GET", "/openapi.json"): "The OpenAPI schema.",
}
_STYLE = "body{font:16px sans-serif;margin:2em;max-width:70em}td,th{text-align:left;padding:.2em 1em .2em 0}"


@functools.cache
def openapi() -> dict[str, Any]:
    """The schema of requests; answers are those of OpenAI's API."""
    template = "#/components/schemas/{model}"
    models = [(schema.model, "validation") for schema in SCHEMAS.values()]
    keys, definitions = models_json_schema(models, ref_template=template)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), summary in ENDPOINTS.items():
        operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "OK"}}}
        if "{" in path:
            name = path.split("{")[1].split("}")[0]
            operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
        if query := QUERIES.get((method, path)):
            for name, kind in query.model.model_json_schema()["properties"].items():
                operation["parameters"].append({"name": name, "in": "query", "schema": kind})
        if method == "POST" and path in SCHEMAS:
            body = keys[SCHEMAS[path].model, "validation"]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        paths.setdefault(path, {})[method.lower()] = operation
    info = {"title": "nanoserve gateway", "version": importlib.metadata.version("nanoserve-gateway")}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": definitions["$defs"]}}


@functools.cache
def html() -> str:
    """The page at /docs."""
    endpoints = _rows([(f"{method} {path}", note) for (method, path), note in ENDPOINTS.items()])
    queries = {f"{method} {path}": schema for (method, path), schema in QUERIES.items()}
    tables = {**SCHEMAS, **queries}
    fields = "".join(f"<h2>{name}</h2>{_rows(_fields(schema))}" for name, schema in tables.items())
    head = f"<!doctype html><meta charset=utf-8><title>nanoserve</title><style>{_STYLE}</style>"
    return f"{head}<h1>nanoserve</h1><p><a href=openapi.json>OpenAPI schema</a></p>{endpoints}{fields}"


def _rows(rows: list[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{markup.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _fields(schema: Schema) -> list[tuple[str, ...]]:
    return [(field.name, field.status, field.note) for field in schema.fields.values()]
