"""What may be asked of the list of models. Lists are comma-separated; prices are USD per million tokens, as decimals."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

YesNo = Literal["true", "false"]
# A decimal that no float is in between; `parse_usd` has the last word.
UsdText = Annotated[str, Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?([eE]-0?[0-9])?$", examples=["2.5"])]
Days = Annotated[int, Meta(ge=0, le=10**6)]


class CountQuery(msgspec.Struct, frozen=True, kw_only=True):
    output_modalities: Annotated[str, Meta(description="of text, image, audio, embeddings; or all")] = "text"


class ModelsQuery(msgspec.Struct, frozen=True, kw_only=True):
    offset: Annotated[int, Meta(ge=0, le=10**9)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=1000)] | UnsetType = UNSET
    q: Annotated[str, Meta(description="text within an id or a name")] = ""
    output_modalities: Annotated[str, Meta(description="of text, image, audio, embeddings; or all")] = "text"
    input_modalities: str = ""
    supported_parameters: str = ""
    model_authors: str = ""
    providers: Annotated[str, Meta(description="slugs or names")] = ""
    arch: str = ""
    category: str = ""
    context: Annotated[int, Meta(ge=0, le=10**12, description="tokens at least")] | UnsetType = UNSET
    min_price: UsdText | UnsetType = UNSET
    max_price: UsdText | UnsetType = UNSET
    min_output_price: UsdText | UnsetType = UNSET
    max_output_price: UsdText | UnsetType = UNSET
    min_age_days: Days | UnsetType = UNSET
    max_age_days: Days | UnsetType = UNSET
    distillable: YesNo | UnsetType = UNSET
    zdr: YesNo | UnsetType = UNSET
    region: Literal["eu", "us"] | UnsetType = UNSET
    sort: str = ""
    use_rss: YesNo | UnsetType = UNSET
    use_rss_chat_links: YesNo | UnsetType = UNSET


def words(text: str) -> frozenset[str]:
    """Of a comma-separated list."""
    return frozenset(word.strip() for word in text.split(",") if word.strip())
