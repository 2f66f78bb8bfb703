"""The published description of the HTTP interface: OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

import outrider
from orchestrator.http.schemas import ChatCompletionRequest, CompletionRequest

_OBJECT: dict[str, Any] = {"type": "object"}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "schema": {"type": "string"},
    "description": "To resume a stream: the id of the last event that was received",
}


def document() -> dict[str, Any]:
    """Describe all routes."""
    template = "#/components/schemas/{model}"
    _, definitions = models_json_schema(
        [(CompletionRequest, "validation"), (ChatCompletionRequest, "validation")],
        ref_template=template,
    )
    schemas = {**definitions["$defs"], **_answers()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Outrider",
            "version": outrider.__version__,
            "description": "OpenAI-compatible completions, decoded speculatively.",
        },
        "security": [{}, {"bearer": []}, {"basic": []}],
        "paths": _paths(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            },
        },
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: int) -> dict[str, Any]:
    meanings = {
        400: "The request is wrong; param names the field",
        401: "A key is needed",
        404: "There is no such model, or no such generation to resume",
        408: "The body did not come in time",
        409: "The generation goes on elsewhere, or nobody serves its model any more",
        413: "The body is too large",
        415: "The body is no JSON",
        429: "No room now, or the key's limits are used up; see Retry-After",
        503: "No verifier is ready",
    }
    return {str(status): _json(_ref("Error"), meanings[status]) for status in statuses}


def _get(summary: str, answer: dict[str, Any], *statuses: int, name: str) -> dict[str, Any]:
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            "responses": {"200": answer, **_errors(*statuses)},
        }
    }


def _post(summary: str, body: str, answer: str, name: str) -> dict[str, Any]:
    success = _json(_ref(answer), "The answer, or a stream of it in chunks")
    success["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "parameters": [_LAST_EVENT_ID],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _ref(body)}},
            },
            "responses": {
                "200": success,
                **_errors(400, 401, 404, 408, 409, 413, 415, 429, 503),
            },
        }
    }


def _paths() -> dict[str, Any]:
    text = {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    page = {"description": "HTML", "content": {"text/html": {"schema": {"type": "string"}}}}
    model = _get("One model", _json(_ref("Model"), "The model"), 401, 404, 503, name="model")
    model["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    status = _json(_ref("Health"), "It is")
    # Health needs no key.
    health = {
        "/health/live": _get("Is the process alive?", status, name="live"),
        "/health/ready": _get("Are requests welcome?", status, 503, name="ready"),
        "/health": _get("The same", status, 503, name="health"),
    }
    for path in health.values():
        path["get"]["security"] = []
    answer = "Completion"
    return {
        "/v1/models": _get("Models", _json(_ref("Models"), "Models"), 401, name="models"),
        "/v1/models/{model}": model,
        "/v1/completions": _post("Continue text", "CompletionRequest", answer, "complete"),
        "/v1/chat/completions": _post("Answer", "ChatCompletionRequest", "Chat" + answer, "chat"),
        **health,
        "/version": _get("Version", _json(_ref("Version"), "Versions"), 401, name="version"),
        "/metrics": _get("Prometheus metrics", text, 401, name="metrics"),
        "/fleet": _get("Workers and load", _json(_ref("Fleet"), "The fleet"), 401, name="fleet"),
        "/openapi.json": _get("This", _json(_OBJECT, "The document"), 401, name="openapi"),
        "/": _get("Live page", page, 401, name="page"),
    }


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _answers() -> dict[str, Any]:
    text, number, maybe = {"type": "string"}, {"type": "integer"}, {"type": ["string", "null"]}
    share = {"type": "number"}
    details = _object(
        *(names := ("accepted_prediction_tokens", "rejected_prediction_tokens")),
        **dict.fromkeys(names, number),
    )
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), number)
    usage = _object(
        *counts, "completion_tokens_details", **counts, completion_tokens_details=details
    )
    speculation = {
        **dict.fromkeys(("mean_acceptance_length", "draft_acceptance_rate"), share),
        "acceptance_histogram": {"type": "array", "items": number},
        **dict.fromkeys(
            ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens", "num_spec_tokens"),
            number,
        ),
    }
    metrics = _object(
        "speculative_decoding", speculative_decoding=_object(*speculation, **speculation)
    )
    metrics["type"] = ["object", "null"]
    common = {
        "index": number,
        "finish_reason": {"enum": ["stop", "length", "abort"]},
        "logprobs": {"type": ["object", "null"]},
        "token_ids": {"type": "array", "items": number},
        "token_sources": {"type": "array", "items": number},
    }
    message = _object("role", "content", role={"const": "assistant"}, content=text)

    def answer(kind: str, **own: Any) -> dict[str, Any]:
        choice = _object("index", "finish_reason", "logprobs", *own, **common, **own)
        parts = {
            "id": text,
            "object": {"const": kind},
            "created": number,
            "model": text,
            "system_fingerprint": text,
            "choices": {"type": "array", "items": choice, "minItems": 1},
            "usage": _ref("Usage"),
            "metrics": metrics,
        }
        return _object(*parts, **parts)

    card = {
        "id": text,
        "object": {"const": "model"},
        "created": number,
        "owned_by": text,
        "max_model_len": number,
        "fingerprint": text,
    }
    error = {"message": text, "type": text, "param": maybe, "code": maybe}
    models = {"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}
    count_or_none = {"type": ["integer", "null"]}
    worker = {
        "role": {"enum": ["verifier", "drafter"]},
        **dict.fromkeys(("address", "state", "reason"), text),
        "model": maybe,
        **dict.fromkeys(("sessions", "sessions_max", "kv_tokens_used", "waiting"), number),
        "step_s": share,
        "kv_used_ratio": {"type": ["number", "null"]},
        **dict.fromkeys(("source", "draft_tokens", "accepted_tokens"), count_or_none),
    }
    counters = ("sessions", "sessions_max", "rounds", "draft_tokens", "accepted_tokens")
    fleet = {
        "workers": {"type": "array", "items": _object(*worker, **worker)},
        **dict.fromkeys((*counters, "completion_tokens"), number),
        "prediction_source": count_or_none,
    }
    versions = {"version": text, "protocol_version": number, "rule_version": number}
    return {
        "Usage": usage,
        "Completion": answer("text_completion", text=text),
        "ChatCompletion": answer("chat.completion", message=message),
        "Model": _object(*card, **card),
        "Models": _object(*models, **models),
        "Health": _object("status", status=text),
        "Fleet": _object(*fleet, **fleet),
        "Version": _object(*versions, **versions),
        "Error": _object("error", error=_object(*error, **error)),
    }
