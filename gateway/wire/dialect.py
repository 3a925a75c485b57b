"""How API families differ on the way out: paths, and how the credential is shown."""

from __future__ import annotations

import msgspec


class Dialect(msgspec.Struct, frozen=True):
    """Paths below a provider's base URL, and the header that carries its key (`%s` is the secret)."""

    chat_path: str
    text_path: str
    auth_header: str
    auth_value: str


DIALECTS: dict[str, Dialect] = {
    "openai": Dialect("/chat/completions", "/completions", "Authorization", "Bearer %s"),
    # Azure's v1 API speaks OpenAI's words but takes resource keys in a header of its own.
    "azure": Dialect("/chat/completions", "/completions", "api-key", "%s"),
}
