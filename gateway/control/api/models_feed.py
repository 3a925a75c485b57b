"""The list of models as an RSS 2.0 feed, newest first."""

from __future__ import annotations

import email.utils
import re
from collections.abc import Iterable
from urllib.parse import quote
from xml.sax.saxutils import escape

from gateway.domain.catalog import Model

CONTENT_TYPE = "application/rss+xml"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def feed(models: Iterable[Model], *, public_url: str, to_chat: bool) -> bytes:
    """XML in UTF-8. `to_chat`: links lead to a conversation with the model instead of its page."""
    newest = sorted(models, key=lambda model: -model.created)
    items = "".join(_item(model, f"{public_url}{_path(model, to_chat)}") for model in newest)
    head = f"<title>Models</title><link>{_text(public_url or '/')}</link><description>Models, newest first</description>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<rss version="2.0"><channel>{head}{items}</channel></rss>\n'.encode()


def _item(model: Model, link: str) -> str:
    published = f"<pubDate>{email.utils.formatdate(model.created, usegmt=True)}</pubDate>" if model.created else ""
    return (
        f"<item><title>{_text(model.name)}</title><link>{_text(link)}</link>"
        f'<guid isPermaLink="false">{_text(model.canonical_slug)}</guid>'
        f"<description>{_text(model.description)}</description>{published}</item>"
    )


def _path(model: Model, to_chat: bool) -> str:
    return f"/chat?models={quote(model.id)}" if to_chat else f"/{quote(model.id)}"


def _text(text: str) -> str:
    return escape(_NOT_XML.sub("", text))
