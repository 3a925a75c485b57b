"""What is shipped: the runtime dependencies, where the lock has them, and lists of them for people and machines.

    python -m tests.shipped FOLDER

writes `licences.txt`, `sbom.json` (CycloneDX) and `runtime.txt` (their part of the lock) into the folder. Nothing is asked of a network.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot5
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
LOCK = REPOSITORY / "requirements.lock"


class Locked:
    """One requirement of the lock: `name==version`, a marker if it is for some machines only, and a hash for each of its files."""

    def __init__(self, text: str) -> None:
        self.text = text
        line = text.replace("\\\n", " ")
        self.hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})(?=\s|$)", line)
        self.requirement = Requirement(re.sub(r"\s--hash=\S+|#.*", "", line).strip())
        self.name = canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        """ "" where it is not pinned to one."""
        [*pins] = self.requirement.specifier
        return pins[0].version if len(pins) == 1 and pins[0].operator == "==" and "*" not in pins[0].version else ""


def locked(text: str | None = None) -> list[Locked]:
    """All that the lock names. Raises for a line that is no requirement."""
    whole = LOCK.read_text() if text is None else text
    return [Locked(each) for each in re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n?", "", whole).strip()) if each]


def runtime() -> list[metadata.Distribution]:
    """The gateway's dependencies and theirs, as they are installed here, by name."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [("gateway", "")]
    while wanted:
        name, extra = wanted.pop()
        for text in metadata.distribution(name).requires or ():
            requirement = Requirement(text)
            key = canonicalize_name(requirement.name)
            if (requirement.marker is None or requirement.marker.evaluate({"extra": extra})) and key not in found:
                found[key] = metadata.distribution(key)
                wanted += [(key, each) for each in ("", *requirement.extras)]
    return [found[name] for name in sorted(found)]


def licence(distribution: metadata.Distribution) -> str:
    """As its metadata says it: an SPDX expression, else its classifiers, else the first line of its text."""
    told = distribution.metadata.json
    classified = [each.rpartition(" :: ")[2] for each in told.get("classifier", ()) if each.startswith("License :: ")]
    text = str(told.get("license", "")).strip().partition("\n")[0]
    return str(told.get("license_expression", "")) or " and ".join(classified) or text or "unknown"


def bill_of_materials() -> str:
    """CycloneDX 1.5 JSON of what runs: each with its version, licence, and the hashes that the lock knows its files by."""
    known = {each.name: each for each in locked()}
    ours = metadata.distribution("gateway")
    bom, parts = Bom(), []
    whole = bom.metadata.component = Component(name="gateway", version=ours.version, type=ComponentType.APPLICATION)
    for each in runtime():
        name = canonicalize_name(each.name)
        parts.append(
            Component(
                name=name,
                version=each.version,
                type=ComponentType.LIBRARY,
                purl=PackageURL("pypi", None, name, each.version),
                licenses=[DisjunctiveLicense(name=licence(each))],
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in known[name].hashes],
            )
        )
    bom.components.update(parts)
    bom.register_dependency(whole, parts)
    return JsonV1Dot5(bom).output_as_string(indent=1)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = runtime()
    names = {canonicalize_name(each.name) for each in found}
    (folder / "licences.txt").write_text("".join(f"{each.name} {each.version}: {licence(each)}\n" for each in found))
    (folder / "runtime.txt").write_text("".join(f"{each.text}\n" for each in locked() if each.name in names))
    (folder / "sbom.json").write_text(bill_of_materials())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
