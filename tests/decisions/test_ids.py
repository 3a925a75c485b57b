"""Generation ids and keys: their form, and that nobody can guess the next."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from gateway.domain.generation import GenerationIds
from gateway.domain.keys import PREFIX, digest, label, new_secret

GENERATION = re.compile(r"gen-1764031697-[0-9A-Za-z]{20}")


def test_ids_have_the_form_and_do_not_repeat() -> None:
    ids = GenerationIds()
    made = [ids.new(1764031697) for _ in range(20_000)]
    assert all(GENERATION.fullmatch(made_id) for made_id in made)
    assert len(set(made)) == len(made)


def test_two_makers_do_not_make_the_same() -> None:
    first, second = GenerationIds(), GenerationIds()
    assert not {first.new(1) for _ in range(1000)} & {second.new(1) for _ in range(1000)}


def test_every_letter_comes_up_about_as_often_in_every_place() -> None:
    ids = GenerationIds()
    made = [ids.new(0).rpartition("-")[2] for _ in range(20_000)]
    for place in range(4, 20):  # before them is the time
        counts = Counter(letters[place] for letters in made)
        assert len(counts) >= 16
        fair = 20_000 / len(counts)  # of 16 letters 1,250 each, standard deviation 34
        assert 0.8 * fair < min(counts.values()) <= max(counts.values()) < 1.2 * fair, place


def test_the_time_is_that_of_the_caller() -> None:
    assert GenerationIds().new(5).startswith("gen-5-")


def test_secrets_have_the_form_and_do_not_repeat() -> None:
    made = {new_secret() for _ in range(1000)}
    assert len(made) == 1000
    assert all(re.fullmatch(r"sk-or-v1-[0-9a-f]{64}", secret) for secret in made)


@pytest.mark.parametrize("secret", ["sk-or-v1-" + "ab" * 32, "", "é"])
def test_a_digest_is_sha_256_of_the_whole_plaintext(secret: str) -> None:
    expected = hashlib.sha256(secret.encode()).hexdigest()
    assert digest(secret) == digest(secret.encode()) == expected


def test_a_label_shows_six_characters_of_the_secret() -> None:
    secret = PREFIX + "0123456789abcdef" * 4
    assert label(secret) == "sk-or-v1-012...def"
    assert all(secret[start : start + 7] not in label(secret) for start in range(len(PREFIX), len(secret) - 7))


def test_ids_sort_as_they_were_given() -> None:
    ids = GenerationIds()
    given = [ids.new(1764031697 + step / 1000) for step in range(3000)]
    assert given == sorted(given)
