"""How API families differ on the way out: paths, and how the credential is shown."""

from __future__ import annotations

import msgspec


class Dialect(msgspec.Struct, frozen=True):
    """Paths below a provider's base URL, the header that carries its key (`%s` is the secret), what a body may hold."""

    chat_path: str
    text_path: str
    auth_header: str
    auth_value: str
    stream_options: bool = True  # whether usage must be asked for; False: it comes unasked, and asking is refused


DIALECTS: dict[str, Dialect] = {
    "openai": Dialect("/chat/completions", "/completions", "Authorization", "Bearer %s"),
    # Mistral refuses what it does not know with 422, stream_options.include_usage among it (users' reports up to 2026).
    "mistral": Dialect("/chat/completions", "/completions", "Authorization", "Bearer %s", stream_options=False),
    # Azure's v1 API speaks OpenAI's words but takes resource keys in a header of its own.
    "azure": Dialect("/chat/completions", "/completions", "api-key", "%s"),
}
