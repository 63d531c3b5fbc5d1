"""Good JSON that asks for what it must not."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

from tests.hostile.case import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RERANK, RESPONSES, SCORE, Case, asking

VALUE, REFUSED = "invalid_value", "unsupported_parameter"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def bad(row: str, fields: dict[str, Any], param: str, path: str = CHAT, code: str = VALUE, what: str = "") -> Case:
    where = "" if path == CHAT else f" ({path.rpartition('/')[2]})"
    return Case(row, (what or json.dumps(fields)) + where, asking(fields, path), (400,), code, param)


def _amounts() -> Iterator[Case]:
    for count in (0, -1, 17, 10**9):
        yield bad("B46", {"n": count}, "n")
    yield bad("B47", {"prompt": ["x"] * 100_000}, "prompt", COMPLETIONS, what="100,000 prompts")
    yield bad("B47", {"prompt": [[1]] * 129}, "prompt", COMPLETIONS, what="129 prompts of token ids")
    yield bad("B47", {"input": ["x"] * 2049}, "input", EMBEDDINGS, what="2,049 inputs")
    for value in (0, -1, 2**63, 2**64):
        yield bad("B48", {"max_tokens": value}, "max_tokens")
        yield bad("B48", {"max_completion_tokens": value}, "max_completion_tokens")
    yield bad("B48", {"max_tokens": 0}, "max_tokens", COMPLETIONS)
    yield bad("B48", {"max_tokens": 99_999}, "max_tokens", what="max_tokens above the model's context")
    yield bad("B48", {"min_tokens": 6, "max_tokens": 5}, "min_tokens")
    yield bad("B48", {"min_tokens": 5}, "min_tokens")
    for fields in (
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"top_k": -2},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"repetition_penalty": 0},
        {"top_logprobs": 21},
        {"prompt_logprobs": -1},
    ):
        yield bad("B49", fields, next(iter(fields)))
    yield bad("B49", {"logprobs": 21}, "logprobs", COMPLETIONS)
    yield bad("B49", {"logit_bias": {str(at): 1 for at in range(1025)}}, "logit_bias", what="logit_bias of 1,025")
    for biases in ({"x": 1}, {"-1": 1}, {"99999999": 1}):
        yield bad("B49", {"logit_bias": biases}, "logit_bias")
    yield bad("B49", {"logit_bias": {"5": 101}}, "logit_bias.5")


def _engine() -> Iterator[Case]:
    yield bad("B50", {"prompt_embeds": "AAAA"}, "prompt_embeds", COMPLETIONS, REFUSED)
    for kind in ("image_embeds", "audio_embeds"):
        parts = [{"role": "user", "content": [{"type": kind, kind: "AAAA"}]}]
        yield bad("B50", {"messages": parts}, f"messages[0].content[0].{kind}", code=REFUSED, what=kind)
    tensor = {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "AAAA"}]}]}
    yield bad("B50", tensor, "messages[0].content[0].type", code=REFUSED, what="prompt_embeds as a part")
    yield bad("B51", {"chat_template": "{{ 1 }}"}, "chat_template", code=REFUSED)
    for name in ("chat_template", "tokenize"):
        fields = {"chat_template_kwargs": {name: "x"}}
        yield bad("B51", fields, f"chat_template_kwargs.{name}", code=REFUSED)
    for name, value in (("regex", "(a+)+b"), ("grammar", "root ::= 'a'"), ("structural_tag", "{}"), ("_backend", "x")):
        fields = {"structured_outputs": {name: value}}
        yield bad("B52", fields, f"structured_outputs.{name}", code=REFUSED)
    yield bad("B52", {"response_format": {"type": "structural_tag"}}, "response_format.type", code=REFUSED)
    for name in ("kv_transfer_params", "ec_transfer_params", "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs"):
        yield bad("B55", {name: {"x": 1}}, name, code=REFUSED)
    yield bad("B55", {"bad_words": ["x"] * 1_000}, "bad_words", what="1,000 bad_words")
    yield bad("B55", {"logprob_token_ids": [1] * 129}, "logprob_token_ids", what="129 logprob_token_ids")
    yield bad("B55", {"background": True}, "background", RESPONSES, REFUSED)
    yield bad("B55", {"previous_response_id": "resp_x"}, "previous_response_id", RESPONSES, REFUSED)
    for name in ("cache_salt", "priority", "request_id", "session_id"):
        row, what = ("B54", "replaced") if name == "cache_salt" else ("B55", "removed")
        yield Case(row, f"{name} is {what}", asking({name: "x"}), (200,))


def _schemas() -> Iterator[Case]:
    cycle = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}}}}
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(16):
        deep = {"type": "array", "items": deep}
    for what, schema in (
        ("a cycle", cycle),
        ("a reference to itself", {"properties": {"a": {"$ref": "#"}}}),
        ("10,000 properties", {"properties": {f"p{at}": {"type": "string"} for at in range(10_000)}}),
        ("an unknown keyword", {"type": "object", "exec": "x"}),
        ("minItems 10^9", {"type": "array", "minItems": 10**9}),
        ("17 levels", deep),
        ("a remote reference", {"$ref": "http://127.0.0.1/x"}),
        ("a dangling reference", {"$ref": "#/$defs/none"}),
        ("a catastrophic pattern", {"type": "string", "pattern": "(a+)+b"}),
    ):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        param = "response_format.json_schema.schema"
        yield bad("B53", {"response_format": wanted}, param, what=f"schema with {what}")
    yield bad("B53", {"structured_outputs": {"json": json.dumps(cycle)}}, "structured_outputs.json", what="as text")
    tool = {"type": "function", "function": {"name": "f", "parameters": cycle}}
    yield bad("B53", {"tools": [tool]}, "tools[0].function.parameters", what="tool with a cycle")
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": cycle}}
    yield bad("B53", {"text": wanted}, "text.format.schema", RESPONSES, what="schema with a cycle")


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _messages(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def _media() -> Iterator[Case]:
    where = "messages[0].content[0].image_url"
    for url in (
        "http://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://a\\@b/",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "ftp://x/",
        "DATA:text/html;base64,AAAA",
        "data:text/html;base64,AAAA",
        " data:image/png;base64,AAAA",
    ):
        yield bad("B56", _messages(_image(url)), where, what=f"image_url {url}")
    remote = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1/"}]}]
    yield bad("B56", {"input": remote}, "input[0].content[0].image_url", RESPONSES, what="input_image")
    source = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}}
    yield bad("B56", _messages(source), "messages[0].content[0].source", MESSAGES, what="image source")
    scored = {"content": [_image("http://127.0.0.1/")]}
    yield bad("B56", {"data_1": scored, "data_2": "x"}, "data_1.content[0].image_url", SCORE, what="one scored image")
    yield bad("B56", {"query": scored, "documents": ["x"]}, "query.content[0].image_url", RERANK, what="image as query")
    for part in ({"type": "image_url", "image_url": None}, {"image_url": {"url": "data:image/gif;base64,AA=="}}):
        named = _messages({**part, "uuid": "logo"})
        what = f"an image by its name in the worker's cache, with{'' if part['image_url'] else 'out'} content"
        yield bad("B57", named, "messages[0].content[0].uuid", code=REFUSED, what=what)
    tiny = "data:image/gif;base64,R0lGODdhAQABAA=="
    yield bad("B57", _messages(*[_image(tiny)] * 17), "messages", what="17 images")
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 60_000, 60_000) + b"\x08\x06\0\0\0"
    bomb = "data:image/png;base64," + base64.b64encode(head + bytes(19)).decode()
    yield bad("B57", _messages(_image(bomb)), where, what="PNG of 60,000 times 60,000 pixels")
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}
    yield bad("B57", _messages(sound), "messages[0].content[0].input_audio.data", code=REFUSED, what="audio")


def _names() -> Iterator[Case]:
    for name in ("", "x" * 10_240, "../../x", "m:other", "/models/adapter", "M", "m "):
        shown = name if len(name) < 50 else "of 10 KiB"
        sent = asking({"model": name})
        yield Case("B58", f"model {shown or 'empty'}", sent, (404,), "model_not_found", "model")
    yield bad("B59", {"stream_options": {"include_usage": True}}, "stream_options")
    choice = {"type": "function", "function": {"name": "g"}}
    yield bad("B59", {"tools": [TOOL], "tool_choice": choice}, "tool_choice", what="tool_choice naming no tool")
    for message, param in (
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "tool", "tool_call_id": "none", "content": "x"}, "messages[0].tool_call_id"),
        ("x", "messages[0]"),
    ):
        yield bad("B59", {"messages": [message]}, param)
    long = asking({"messages": [{"role": "user", "content": "x " * 3000}]})
    yield Case("B60", "prompt above the context", long, (400,), "context_length_exceeded", "messages")


MEANINGS = [*_amounts(), *_engine(), *_schemas(), *_media(), *_names()]
