"""The files in config/ as they are shipped: they load, their prices name a source, and they hold no secret."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from gateway.config import check, load_settings, provider_secret, read_catalog, sqlite_path
from gateway.wire.dialect import DIALECTS

CONFIG = Path(__file__).parent.parent / "config"
CATALOG = sorted((CONFIG / "catalog").glob("*.toml"))


@pytest.mark.parametrize("name", ["gateway.toml", "demo.toml", "local-llm.toml"])
def test_every_config_starts_without_any_key(name: str) -> None:
    assert [problem for problem in check(CONFIG / name, {}) if not problem.warning] == []


def test_a_single_key_or_a_local_server_is_enough_to_be_served() -> None:
    environ = {"OPENAI_API_KEY": "sk-test"}
    catalog, warnings = read_catalog(load_settings(CONFIG / "gateway.toml", environ), environ)
    for model_id, slug in (("openai/gpt-4o-mini", "openai"), ("local/llama-3.2-3b", "ollama")):
        model = catalog.find(model_id)
        assert model is not None and model.endpoints[0].provider == slug
        provider = catalog.providers[slug]
        assert provider_secret(provider, environ) is not None and provider.data is not None and not provider.data.trains
    assert not any("variable OPENAI_API_KEY" in warning.message for warning in warnings)


def test_a_local_model_may_be_loaded_and_read_a_long_prompt_before_its_first_token() -> None:
    for config in ("gateway.toml", "local-llm.toml"):
        catalog, _ = read_catalog(load_settings(CONFIG / config, {}), {})
        local = [endpoint for model in catalog.models.values() if model.id.startswith("local/") for endpoint in model.endpoints]
        assert {endpoint.provider for endpoint in local} == {"ollama", "llama-cpp", "vllm"}
        for endpoint in local:
            assert (endpoint.timeouts.headers_s or 0) >= 300 and (endpoint.timeouts.first_token_s or 0) >= 300, endpoint


def test_mistral_is_not_sent_what_it_refuses() -> None:
    catalog, _ = read_catalog(load_settings(CONFIG / "gateway.toml", {}), {})
    assert not DIALECTS[catalog.providers["mistral"].dialect].stream_options
    for model in catalog.models.values():
        for endpoint in model.endpoints:
            assert endpoint.provider != "mistral" or "max_completion_tokens" not in endpoint.supported_parameters


def test_every_price_names_its_source_and_day() -> None:
    for path in CATALOG:
        tables = re.split(r"^\[\[models\.endpoints\]\]$", path.read_text(), flags=re.MULTILINE)[1:]
        for table in tables:
            free = 'prompt = "0", completion = "0"' in table
            assert free or re.match(r"\n# source: .+, read \d{4}-\d\d-\d\d\n", table), f"{path.name}: {table[:200]}"


def test_only_local_models_and_embeddings_answers_are_free() -> None:
    catalog, _ = read_catalog(load_settings(CONFIG / "gateway.toml", {}), {})
    assert len(catalog.models) > 70
    for model in catalog.models.values():
        for endpoint in model.endpoints:
            local = catalog.providers[endpoint.provider].base_url.startswith("http://127.0.0.1")
            assert local == (endpoint.price.prompt == 0) == model.id.startswith("local/"), endpoint
            assert endpoint.price.completion > 0 or local or model.output_modalities == ("embeddings",), endpoint
            cached = endpoint.price.input_cache_read
            assert cached is None or cached <= endpoint.price.prompt, endpoint


def test_keys_travel_encrypted_and_names_fit() -> None:
    catalog, _ = read_catalog(load_settings(CONFIG / "gateway.toml", {}), {})
    for provider in catalog.providers.values():
        assert provider.base_url.startswith("https://") or not provider.api_key_env
    for path in CATALOG:
        for model in tomllib.loads(path.read_text()).get("models", []):
            assert ": " in model["name"], model["id"]


def test_the_demo_needs_no_secret_and_keeps_its_state_in_var_demo() -> None:
    settings = load_settings(CONFIG / "demo.toml", {})
    demo = CONFIG.parent / "var" / "demo"
    assert sqlite_path(settings) == demo / "gateway.db" and settings.journal.dir == str(demo / "journal")
    assert settings.server.runtime_dir == str(demo / "run")
    catalog, warnings = read_catalog(settings, {})
    assert warnings == [] and list(catalog.models) == ["acme/sage-1", "acme/sage-mini", "acme/sage-1:free", "acme/thinker"]
    assert {provider.base_url for provider in catalog.providers.values()} == {"http://127.0.0.1:9001/v1", "http://127.0.0.1:9002/v1"}
    assert all(provider_secret(provider, {}) == "" for provider in catalog.providers.values())


def test_no_secret_is_written_anywhere() -> None:
    for path in CONFIG.rglob("*.toml"):
        assert not re.search(r"\b(sk|gsk|xai|AIza)[-_][A-Za-z0-9]{8}", path.read_text()), path
