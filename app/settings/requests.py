"""Bounds on what clients send."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.settings.part import Part


class Limits(Part):
    """Bounds on what a client may send, as HTTP."""

    header_timeout_s: float = Field(
        10, gt=0, le=600, description="to the last header's end, from connecting or a later request's first byte"
    )
    header_bytes: int = Field(32 * 1024, ge=1024, description="all headers of a request together")
    header_count: int = Field(100, ge=8, le=10_000, description="of one request")
    target_bytes: int = Field(8 * 1024, ge=256, description="the path and the query together")
    body_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="of one request")
    body_timeout_s: float = Field(30, gt=0, le=600, description="from the headers' end to the body's")
    body_grace_s: float = Field(5, ge=0, le=600, description="before the lowest rate of a body counts")
    body_bytes_per_s: float = Field(16 * 1024, gt=0, description="lowest rate of a body, after the grace")


class Structured(Part):
    """Constraints on generation that a client may ask for: the engine compiles them, and some never end."""

    regex: bool = Field(False, description="`structured_outputs.regex`")
    grammar: bool = Field(False, description="`structured_outputs.grammar` and `structural_tag`")
    regex_bytes: int = Field(1024, ge=1, description="of one expression")
    schema_depth: int = Field(16, ge=1, le=64, description="of one JSON schema")
    schema_nodes: int = Field(1000, ge=1, description="objects and lists of one JSON schema")


class Media(Part):
    """Images, sound and video inside messages, as `data:` URLs only: no server here fetches a client's address."""

    kinds: frozenset[Literal["image", "audio", "video"]] = Field(frozenset({"image"}), description="that are let in")
    items: int = Field(16, ge=0, description="in one request")
    item_bytes: int = Field(20 * 1024 * 1024, ge=1, description="of one, decoded from base64")
    image_pixels: int = Field(50_000_000, ge=1, description="width times height, as a PNG or GIF declares it")


class Parameters(Part):
    """Bounds on what a request may ask for."""

    choices: int = Field(16, ge=1, le=16_384, description="`n`")
    prompts: int = Field(128, ge=1, description="prompts of one text completion")
    inputs: int = Field(2048, ge=1, description="texts of one embedding, rerank or score request")
    messages: int = Field(2048, ge=1, description="of one conversation")
    tools: int = Field(512, ge=1, description="of one request")
    structured: Structured = Structured()
    media: Media = Media()
