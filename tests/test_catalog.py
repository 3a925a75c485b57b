"""The catalog's file format: what it accepts, what it refuses and where, and that prices stay exact."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import ConfigError, read_catalog
from gateway.domain.catalog import Catalog, Provider
from gateway.domain.catalog_rules import Document, compile_catalog, digest
from gateway.domain.document import Findings
from gateway.domain.money import AMOUNT_NANOS_MAX, format_price, format_usd, parse_price, parse_usd
from gateway.settings import Settings

GOOD = """
[[providers]]
slug = "north"
name = "North"
base_url = "http://127.0.0.1:9001/v1/"
api_key_env = "NORTH_API_KEY"
data = { trains = false, retains = false, zdr = true }

[[models]]
id = "acme/sage-1"
name = "Acme: Sage 1"
created = 2026-04-01
context_length = 131072
max_completion_tokens = 8192
supported_parameters = ["max_tokens", "tools"]

[[models.endpoints]]
provider = "north"
upstream_model = "sage-1"
pricing = { prompt = "0.0000025", completion = "0.00001" }
"""


def provider(**fields: Any) -> Provider:
    return Provider(**({"slug": "north", "name": "North", "base_url": "http://127.0.0.1:1/v1"} | fields))


def compiled(*texts: str) -> tuple[Catalog | None, Findings]:
    findings = Findings()
    documents = [Document(file=f"/etc/gateway/{i}.toml", table=tomllib.loads(text)) for i, text in enumerate(texts)]
    catalog, _ = compile_catalog(documents, findings)
    return catalog, findings


def accepted(*texts: str) -> Catalog:
    catalog, findings = compiled(*texts)
    assert catalog is not None and not findings.errors, findings.errors
    return catalog


def refused(*texts: str) -> dict[str, str]:
    catalog, findings = compiled(*texts)
    assert catalog is None and findings.errors
    return {problem.key: problem.message for problem in findings.errors}


def test_a_good_catalog_with_its_defaults() -> None:
    catalog = accepted(GOOD)
    north, model = catalog.providers["north"], catalog.models["acme/sage-1"]
    assert north.base_url == "http://127.0.0.1:9001/v1"
    assert model.canonical_slug == "acme/sage-1" and model.created == 1775001600 and catalog.aliases == {}
    (endpoint,) = model.endpoints
    assert (endpoint.id, endpoint.tag) == ("acme/sage-1@north", "north")
    assert (endpoint.context_length, endpoint.max_completion_tokens) == (131072, 8192)
    assert endpoint.supported_parameters == ("max_tokens", "tools")
    assert endpoint.price.prompt == 2_500_000_000 and endpoint.price.completion == 10_000_000_000
    assert endpoint.price.input_cache_read is None


def test_an_endpoint_may_differ_from_its_model() -> None:
    catalog = accepted(
        GOOD
        + """
context_length = 1000
max_completion_tokens = 10
supported_parameters = []
tag = "north/eu"
region = "eu"
quantization = "fp8"
timeouts = { connect_s = 1, total_s = 2.5 }
[[models.endpoints]]
provider = "north"
upstream_model = "sage-1-us"
tag = "north/us"
pricing = { prompt = "0", completion = "0" }
"""
    )
    first, second = catalog.models["acme/sage-1"].endpoints
    assert (first.context_length, first.max_completion_tokens, first.supported_parameters) == (1000, 10, ())
    assert first.id == "acme/sage-1@north/eu" and first.timeouts.connect_s == 1.0 and first.timeouts.idle_s is None
    assert second.context_length == 131072


@pytest.mark.parametrize(
    ("old", "new", "warned"),
    [
        ("", "", True),
        ('prompt = "0.0000025", completion = "0.00001"', 'prompt = "0", completion = "0"', False),
        ('provider = "north"\n', 'provider = "north"\ncontext_length = 4096\n', False),
        ('provider = "north"\n', 'provider = "north"\nmax_completion_tokens = 4096\n', False),
    ],
)
def test_a_model_need_not_say_how_long_its_answers_get_and_one_with_a_price_is_named(old: str, new: str, warned: bool) -> None:
    text = GOOD.replace("context_length = 131072\n", "").replace("max_completion_tokens = 8192\n", "")
    assert old in text
    catalog, findings = compiled(text.replace(old, new, 1))
    assert catalog is not None and not findings.errors
    assert catalog.models["acme/sage-1"].context_length is None
    named = [problem.key for problem in findings.problems if "bit by bit" in problem.message]
    assert named == ["models[0].endpoints[0].max_completion_tokens"] * warned


def test_canonical_slugs_resolve() -> None:
    catalog = accepted(GOOD.replace("created =", 'canonical_slug = "acme/sage-1-20260401"\ncreated ='))
    assert catalog.find("acme/sage-1-20260401") is catalog.models["acme/sage-1"]
    assert catalog.find("Acme/sage-1") is None


def test_models_and_providers_may_be_in_different_files() -> None:
    head, _, models = GOOD.partition("[[models]]")
    assert list(accepted("[[models]]" + models, head).models) == ["acme/sage-1"]


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ('name = "North"', 'nmae = "North"', "providers[0].nmae", "did you mean name?"),
        ('slug = "north"', 'slug = "North"', "providers[0].slug", "slug"),
        ("http://127.0.0.1:9001/v1/", "ftp://h/", "providers[0].base_url", "http"),
        ("http://127.0.0.1:9001/v1/", "http://u:p@h/", "providers[0].base_url", "user"),
        ("http://127.0.0.1:9001/v1/", "http://h/?a=b", "providers[0].base_url", "query"),
        ("http://127.0.0.1:9001/v1/", "http://h/#", "providers[0].base_url", "fragment"),
        ("http://127.0.0.1:9001/v1/", "http:///v1", "providers[0].base_url", "host"),
        ("http://127.0.0.1:9001/v1/", "http://h:99999/", "providers[0].base_url", "ort"),
        ("http://127.0.0.1:9001/v1/", "http://h\\r\\nX: y/", "providers[0].base_url", "control"),
        ("http://127.0.0.1:9001/v1/", "", "providers[0].base_url", "URL"),
        ('api_key_env = "NORTH_API_KEY"', 'api_key_env = "a b"', "providers[0].api_key_env", "variable"),
        ('api_key_env = "NORTH_API_KEY"', 'api_key_env = "K"\napi_key_file = "k"', "providers[0].api_key_file", "not both"),
        ('api_key_env = "NORTH_API_KEY"', 'headers = { AUTHORIZATION = "x" }', "providers[0].headers.AUTHORIZATION", "gateway"),
        ('api_key_env = "NORTH_API_KEY"', 'headers = { x-a = "a\\nb" }', "providers[0].headers.x-a", "control"),
        ('api_key_env = "NORTH_API_KEY"', 'dialect = "smoke"', "providers[0].dialect", "openai"),
        ("zdr = true", "zdr = 1", "providers[0].data.zdr", "true or false"),
        ("retains = false", "retains = true", "providers[0].data.zdr", "contradict"),
        ("retains = false, ", "", "providers[0].data.retains", "missing"),
        ('"acme/sage-1"', '"Acme/sage-1"', "models[0].id", "author/name"),
        ('"acme/sage-1"', '"acme"', "models[0].id", "author/name"),
        ('"acme/sage-1"', '"acme/sagé"', "models[0].id", "author/name"),
        ('"acme/sage-1"', '"acme/sage-1\\n"', "models[0].id", "author/name"),
        ('"acme/sage-1"', '"acme/sage-1:nitro"', "models[0].id", ":nitro"),
        ('"acme/sage-1"', '"acme/sage-1:floor"', "models[0].id", ":floor"),
        ('"acme/sage-1"', '"acme/sage-1:online"', "models[0].id", ":online"),
        ("131072", "0", "models[0].context_length", ">= 1"),
        ('["max_tokens", "tools"]', '"tools"', "models[0].supported_parameters", "list"),
        ("max_completion_tokens = 8192", 'input_modalities = ["smell"]', "models[0].input_modalities[0]", "one of text"),
        (
            "max_completion_tokens = 8192",
            "default_parameters = { temprature = 1 }",
            "models[0].default_parameters.temprature",
            "temperature?",
        ),
        (
            "max_completion_tokens = 8192",
            "default_parameters = { temperature = inf }",
            "models[0].default_parameters.temperature",
            "finite",
        ),
        ("2026-04-01", "1_000_000_000_000", "models[0].created", "<="),
        ("max_completion_tokens = 8192", "reasoning = { speed = 1 }", "models[0].reasoning.speed", "unknown"),
        ('provider = "north"', 'provider = "west"', "models[0].endpoints[0].provider", "no provider"),
        ('provider = "north"', 'provider = "north"\ntag = "south/x"', "models[0].endpoints[0].tag", "north/"),
        ('provider = "north"', 'provider = "north"\nquantization = "int3"', "models[0].endpoints[0].quantization", "int4"),
        ('provider = "north"', 'provider = "north"\ntimeouts = { idle_s = 0 }', "models[0].endpoints[0].timeouts.idle_s", "> 0"),
        ('"0.0000025"', "0.0000025", "models[0].endpoints[0].pricing.prompt", '"0.0000025"'),
        ('"0.0000025"', "0", "models[0].endpoints[0].pricing.prompt", '"0"'),
        ('"0.0000025"', "true", "models[0].endpoints[0].pricing.prompt", "decimal string"),
        ('"0.0000025"', '"-0.0000025"', "models[0].endpoints[0].pricing.prompt", "negative"),
        ('"0.0000025"', '"1/2"', "models[0].endpoints[0].pricing.prompt", "decimal"),
        ('"0.0000025"', '"0.0000000000000001"', "models[0].endpoints[0].pricing.prompt", "finer"),
        ('prompt = "0.0000025", ', "", "models[0].endpoints[0].pricing.prompt", "missing"),
        ('prompt = "0.0000025"', 'prompt = "0", imago = "0"', "models[0].endpoints[0].pricing.imago", "image?"),
        ('prompt = "0.0000025"', 'prompt = "0", discount = "1.1"', "models[0].endpoints[0].pricing.discount", "from 0 to 1"),
        ('prompt = "0.0000025"', 'prompt = "0", discount = 0.1', "models[0].endpoints[0].pricing.discount", "quotes"),
        ('prompt = "0.0000025"', 'prompt = "0", overrides = [{}]', "models[0].endpoints[0].pricing.overrides[0]", "condition"),
        (
            'prompt = "0.0000025"',
            'prompt = "0", overrides = [{ utc_start = 100, prompt = "0" }]',
            "models[0].endpoints[0].pricing.overrides[0]",
            "together",
        ),
        (
            'prompt = "0.0000025"',
            'prompt = "0", overrides = [{ utc_start = 160, utc_end = 170, prompt = "0" }]',
            "models[0].endpoints[0].pricing.overrides[0]",
            "HHMM",
        ),
        (
            'prompt = "0.0000025"',
            'prompt = "0", overrides = [{ utc_days = [7], prompt = "0" }]',
            "models[0].endpoints[0].pricing.overrides[0].utc_days[0]",
            "6",
        ),
        ("[[models.endpoints]]", "[models.x]", "models[0].endpoints", "missing"),
        ("[[models]]", "[[modells]]\n[[models]]", "modells", "models?"),
    ],
)
def test_a_fault_is_refused_by_key(old: str, new: str, key: str, words: str) -> None:
    assert old in GOOD
    found = refused(GOOD.replace(old, new, 1))
    assert key in found, found
    assert words in found[key]


def test_every_fault_of_a_model_is_told_at_once() -> None:
    text = (
        GOOD.replace('"acme/sage-1"', '"Acme"').replace("131072", "0").replace('"0.00001"', "0.00001").replace('er = "north"', 'er = "x"')
    )
    assert set(refused(text)) == {
        "models[0].id",
        "models[0].context_length",
        "models[0].endpoints[0].pricing.completion",
        "models[0].endpoints[0].provider",
    }


def test_duplicates_are_refused_with_both_places() -> None:
    head, _, models = GOOD.partition("[[models]]")
    assert refused(GOOD, head) == {"providers[0].slug": "north is used twice; the other is at /etc/gateway/0.toml: providers[0]"}
    assert refused(GOOD, "[[models]]" + models) == {
        "models[0].id": "acme/sage-1 is used twice; the other is at /etc/gateway/0.toml: models[0]"
    }
    endpoint = "[[models.endpoints]]" + GOOD.partition("[[models.endpoints]]")[2]
    assert refused(GOOD + endpoint) == {
        "models[0].endpoints[1].tag": "north is used twice; the other is at /etc/gateway/0.toml: models[0].endpoints[0]"
    }
    alias = "[[models]]" + models.replace('"acme/sage-1"', '"acme/other"\ncanonical_slug = "acme/sage-1"')
    assert list(refused(GOOD, alias)) == ["models[0].canonical_slug"]


def test_warnings_do_not_refuse() -> None:
    text = GOOD.replace("data = {", "#").replace('"tools"', '"frobnicate"')
    _, findings = compiled(text)
    assert [(problem.key, problem.warning) for problem in findings.problems] == [
        ("providers[0].data", True),
        ("models[0].supported_parameters[1]", True),
    ]
    catalog, findings = compiled("")
    assert catalog is not None and [problem.key for problem in findings.problems] == ["models"]


def test_all_price_kinds_and_overrides() -> None:
    text = """prompt = "0.000001", completion = "0.000002", request = "0.01", image = "0.001", internal_reasoning = "0.000003",
        input_cache_read = "0.0000001", input_cache_write = "0.00000125", web_search = "0.004", discount = "0.25", overrides = [
        { min_prompt_tokens = 200000, prompt = "0.000002" },
        { utc_start = 1630, utc_end = 30, utc_days = [0, 6], completion = "0" } ]"""
    catalog = accepted(GOOD.replace('prompt = "0.0000025", completion = "0.00001"', text.replace("\n", " ")))
    price = catalog.models["acme/sage-1"].endpoints[0].price
    assert price.request == 10**13 and price.image == 10**12 and price.web_search == 4 * 10**12
    assert (price.prompt, price.completion, price.internal_reasoning) == (10**9, 2 * 10**9, 3 * 10**9)
    assert (price.input_cache_read, price.input_cache_write, price.discount_millionths) == (10**8, 1_250_000_000, 250_000)
    by_size, by_time = price.overrides
    assert by_size.min_prompt_tokens == 200_000 and by_size.prices == {"prompt": 2 * 10**9}
    assert (by_time.utc_start, by_time.utc_end, by_time.utc_days, by_time.prices) == (1630, 30, (0, 6), {"completion": 0})


def test_the_revision_is_of_the_content() -> None:
    first = accepted(GOOD)
    head, _, models = GOOD.partition("[[models]]")
    assert first.revision == accepted("[[models]]" + models, head).revision == digest(first)
    assert first.revision != accepted(GOOD.replace('"0.00001"', '"0.00002"')).revision
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(first), type=Catalog) == first


def test_key_files_lie_beside_the_catalog() -> None:
    catalog = accepted(GOOD.replace('api_key_env = "NORTH_API_KEY"', 'api_key_file = "../keys/north"'))
    assert catalog.providers["north"].api_key_file == "/etc/keys/north"


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "catalog"
    folder.mkdir()
    head, _, models = GOOD.partition("[[models]]")
    (folder / "b.toml").write_text(head)
    (folder / "a.toml").write_text("[[models]]" + models)
    (folder / ".a.toml").write_text("not toml")
    (folder / "readme.txt").write_text("not toml")
    environ = {"NORTH_API_KEY": "k"}
    for entries in ((str(folder),), (f"{folder}/*.toml",), (f"{folder}/a.toml", f"{folder}/b.toml", str(folder))):
        catalog, warnings = read_catalog(Settings(catalog=entries), environ)
        assert list(catalog.models) == ["acme/sage-1"] and warnings == []
    _, warnings = read_catalog(Settings(catalog=(str(folder),)), {})
    assert "NORTH_API_KEY is not set" in str(warnings[0]) and warnings[0].file == str(folder / "b.toml")
    (tmp_path / "empty").mkdir()
    for entry in (tmp_path / "empty", tmp_path / "no*.toml", tmp_path / "none.toml"):
        with pytest.raises(ConfigError):
            read_catalog(Settings(catalog=(str(folder), str(entry))), environ)


@pytest.mark.parametrize(
    ("line", "prefill"), [("", ""), ("prefill = false", ""), ("prefill = true", "assistant"), ('prefill = "mistral"', "mistral")]
)
def test_an_endpoint_goes_on_with_an_answer_only_where_it_is_said_to(line: str, prefill: str) -> None:
    catalog = accepted(GOOD.replace("pricing", f"{line}\npricing"))
    assert catalog.models["acme/sage-1"].endpoints[0].prefill == prefill
    assert "prefill" in str(refused(GOOD.replace("pricing", 'prefill = "odd"\npricing')))


@given(st.integers(-AMOUNT_NANOS_MAX, AMOUNT_NANOS_MAX))
def test_amounts_survive_text(nanos: int) -> None:
    assert parse_usd(format_usd(nanos)) == nanos


@given(st.integers(0, AMOUNT_NANOS_MAX))
def test_prices_survive_text(price: int) -> None:
    assert parse_price(format_price(price)) == price


@pytest.mark.parametrize(
    "text", ["1.0000000000000000000000000000001", "1e999999999999", "--5", "", " 1", "nan", "1_0", ".", "4611686019", "\u0661"]
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"decimal|finer|range"):
        parse_usd(text)
