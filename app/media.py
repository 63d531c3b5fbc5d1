"""Images, sound and video inside a request: only what comes with it, bounded before anything decodes it. Pure.

A worker that fetches a client's address reaches whatever the worker's network reaches, and a redirect or a second
answer of the name server undoes any check of that address made here. So no address is passed on at all.
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Any

from app.errors import InvalidValue, UnsupportedParameter
from app.settings import Media

URL_FIELDS = {"image_url": "image", "audio_url": "audio", "video_url": "video", "file_url": "file"}
TENSOR_FIELDS = frozenset({"image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil"})
# A part of these may name its medium by `uuid`: the worker then takes whatever anybody sent under that name before.
PART_TYPES = ("image_url", "audio_url", "video_url", "input_image", "input_audio")
HEADER_BASE64_CHARS = 64


def check_media(value: list[Any] | dict[str, Any], where: str, limits: Media) -> None:
    """Refuse media that are addresses, too many, too large or not enabled, in `value` and anywhere below it.

    Raises InvalidValue or UnsupportedParameter, `param` the path of the offending part.
    """
    count = 0
    stack: list[tuple[Any, str]] = [(value, where)]
    while stack:
        node, path = stack.pop()
        if type(node) is list:
            stack += [(item, f"{path}[{at}]") for at, item in enumerate(node) if type(item) in (dict, list)]
            continue
        count += _check_part(node, path, limits)
        if count > limits.items:
            raise InvalidValue(f"There are more than {limits.items} images, sounds and videos.", param=where)
        stack += [(item, f"{path}.{name}") for name, item in node.items() if type(item) in (dict, list)]


def _check_part(node: dict[str, Any], path: str, limits: Media) -> int:
    """How many media `node` holds itself."""
    count = 0
    for name in TENSOR_FIELDS & node.keys():
        raise UnsupportedParameter("Embeddings are not accepted in place of media.", param=f"{path}.{name}")
    kind_of_part = node.get("type")
    if type(kind_of_part) is str and kind_of_part in TENSOR_FIELDS:
        raise UnsupportedParameter("Embeddings are not accepted in place of media.", param=f"{path}.type")
    if node.get("uuid") is not None and (kind_of_part in PART_TYPES or not URL_FIELDS.keys().isdisjoint(node)):
        raise UnsupportedParameter("Media have no names here: workers share theirs.", param=f"{path}.uuid")
    for name, kind in URL_FIELDS.items():
        if name in node and node[name] is not None:
            count += 1
            given = node[name]
            url = given.get("url") if type(given) is dict else given
            _check_url(url, kind, f"{path}.{name}", limits)
    source = node.get("source")
    if kind_of_part in ("image", "document") and type(source) is dict:
        count += 1
        if source.get("type") != "base64":
            raise _remote(f"{path}.source")
        _check_content(source.get("data"), "image", f"{path}.source.data", limits)
    sound = node.get("input_audio")
    if type(sound) is dict:
        count += 1
        _check_content(sound.get("data"), "audio", f"{path}.input_audio.data", limits)
    return count


def _remote(path: str) -> InvalidValue:
    return InvalidValue("Only data: URLs are accepted; addresses are never fetched.", param=path)


def _check_url(url: Any, kind: str, path: str, limits: Media) -> None:
    if type(url) is not str:
        raise InvalidValue("A data: URL is expected.", param=path)
    header, comma, content = url.partition(",")
    if not comma or not header.startswith(f"data:{kind}/") or not header.endswith(";base64"):
        raise _remote(path)
    _check_content(content, kind, path, limits)


def _check_content(content: Any, kind: str, path: str, limits: Media) -> None:
    if kind not in limits.kinds:
        raise UnsupportedParameter(f"Media of the kind {kind!r} are not enabled here.", param=path)
    if type(content) is not str:
        raise InvalidValue("Base64 is expected.", param=path)
    if len(content) * 3 // 4 > limits.item_bytes:
        raise InvalidValue(f"It is larger than {limits.item_bytes} bytes.", param=path)
    pixels = declared_pixels(content[:HEADER_BASE64_CHARS])
    if pixels is not None and pixels > limits.image_pixels:
        raise InvalidValue(f"The image has more than {limits.image_pixels} pixels.", param=path)


def declared_pixels(base64_head: str) -> int | None:
    """Width times height of a PNG or GIF, from its first bytes in base64; None for anything else."""
    try:
        head = base64.b64decode(base64_head[: len(base64_head) // 4 * 4], validate=True)
    except (binascii.Error, ValueError):
        return None
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
    elif head.startswith((b"GIF87a", b"GIF89a")) and len(head) >= 10:
        width, height = struct.unpack("<HH", head[6:10])
    else:
        return None
    return int(width) * int(height)
