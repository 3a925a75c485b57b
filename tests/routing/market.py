"""One model at endpoints that differ in all that wishes, rules and needs go by."""

from __future__ import annotations

import json
from typing import Any

from gateway.domain.catalog import DataPolicy
from gateway.domain.rules import AccountRules
from tests.routing.scene import Scene, endpoint, model_of

TRAINS = DataPolicy(trains=True, retains=True)
TRAINING = AccountRules(train_paid=True, train_free=True)
KEEPS = DataPolicy(trains=False, retains=True)
FORGETS = DataPolicy(trains=False, retains=False, zdr=True)
MODEL = model_of(
    [
        endpoint("north", 1.0, quantization="fp8", supported_parameters=("tools", "tool_choice", "max_tokens"), max_completion_tokens=4096),
        endpoint("south", 2.0, quantization="bf16", supported_parameters=("max_tokens", "seed", "response_format"), context=2048),
        endpoint("south/eu", 3.0, supported_parameters=("max_tokens", "seed")),
        endpoint("west", 4.0, supported_parameters=("tools", "max_tokens")),
        endpoint("west/priority", 9.0, supported_parameters=("tools", "max_tokens")),
    ],
    input_modalities=("text", "image"),
)
DATA = {"north": TRAINS, "south": KEEPS, "west": FORGETS}


def scene(**settings: Any) -> Scene:
    return Scene(MODEL, data=DATA, rules=TRAINING, **settings)


def order(wishes: dict[str, Any], name: str = "acme/large", *, at: Scene | None = None, **given: Any) -> list[str]:
    at = at or scene()
    found = at.router.rank_as_wished(
        [at.router.resolve(name)],
        at.router.wishes.find(json.dumps(wishes).encode()),
        now_s=at.now_s,
        rng=at.random.random,
        **{"rules": at.rules, **given},
    )
    return [pick.endpoint.tag for pick in found]


ALL = {"north", "south", "south/eu", "west"}
