"""What a body may ask of a gateway beside a model's answer, and this one does not do: searching the web, presets, tools of its own.

Whoever asks for it is told so (400, naming the field): they would take, and pay, an answer without it for one with it. Plugins
that leave nothing out of an answer when they do nothing are ignored. Texts of the body are never repeated.
Source: OpenRouter plugins, presets and server tools, read 2026-11.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gateway.domain.errors import BadRequest

# They mend an answer or a prompt that does not fit, or choose for models that are none here.
IGNORED_PLUGINS = frozenset(("context-compression", "response-healing", "auto-router", "auto-beta-router", "pareto-router"))
SERVER_TOOL = b'"openrouter:'  # begins the type of a tool that a gateway runs
NO_PRESETS = "preset: this gateway keeps no presets; send what the preset holds"
NO_SEARCH = "this gateway does not search the web"
_INSTEAD = "drop the plugin, or set its enabled to false"


class Pdf(msgspec.Struct, frozen=True, gc=False):
    engine: str | None = None


class Plugin(msgspec.Struct, frozen=True, gc=False):
    """One of `plugins`, as far as it decides whether it can be ignored."""

    id: str
    enabled: bool | None = None  # null: yes
    pdf: Pdf | None = None


class _Tool(msgspec.Struct, frozen=True, gc=False):
    type: msgspec.Raw = msgspec.Raw()


_tools_decoder = msgspec.json.Decoder(list[_Tool])


def require_served_plugins(plugins: Sequence[Plugin]) -> None:
    """Raises BadRequest for the first that is asked for and cannot be ignored."""
    for index, plugin in enumerate(plugins):
        if plugin.enabled is False or plugin.id in IGNORED_PLUGINS:
            continue
        if plugin.id == "file-parser":
            if plugin.pdf is not None and plugin.pdf.engine not in (None, "native"):
                raise BadRequest(f"plugins[{index}].pdf.engine: only models read files here; use native, and a model that takes files")
        elif plugin.id == "web":
            raise BadRequest(f"plugins[{index}].id: {NO_SEARCH}; {_INSTEAD}")
        else:
            raise BadRequest(f"plugins[{index}].id: this gateway has no such plugin; {_INSTEAD}")


def require_no_server_tools(tools: msgspec.Raw) -> None:
    """Of the `tools` of a body. Raises BadRequest for the first that a gateway would have to run."""
    for index, tool in enumerate(_tools_decoder.decode(tools)):
        if bytes(tool.type).startswith(SERVER_TOOL):
            raise BadRequest(f"tools[{index}].type: this gateway runs no tools of its own; drop it, or describe a function")
