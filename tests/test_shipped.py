"""OPS-09: we know what we ship: pinned by hash, without hooks into the interpreter, nothing but our package, and new enough."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from gateway import requirements
from tests import shipped
from tests.shipped import REPOSITORY, locked, runtime

LEAST = {match[1]: match[2] for text in metadata.requires("gateway") or () if (match := re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)", text))}
# What the interpreter runs by itself at each start, whoever starts it.
START_UP_HOOKS = re.compile(r"(^|/)[^/]+\.pth$|(^|/)(sitecustomize|usercustomize)(\.py$|/)")


def test_ops_09_every_requirement_of_the_lock_is_pinned_by_hash() -> None:
    found = locked()
    assert len(found) > 50
    for each in found:
        assert each.version and each.hashes, each.text[:80]
        assert each.requirement.url is None
    assert not re.search(r"(?m)^\s*-|://", shipped.LOCK.read_text().replace("    --hash=", ""))
    assert "--require-hashes -r requirements.lock" in (REPOSITORY / "Makefile").read_text()


def test_ops_09_the_reader_of_the_lock_sees_what_is_not_pinned() -> None:
    good, bad, loose = locked(
        f'a-b==1.0 ; sys_platform == "linux" \\\n    --hash=sha256:{"a" * 64} \\\n    --hash=sha256:{"b" * 64}\n    # via x\nb==2\nc>=1\n'
    )
    assert (good.name, good.version, len(good.hashes)) == ("a-b", "1.0", 2)
    assert bad.hashes == [] and bad.version == "2"
    assert loose.version == ""


def test_ops_09_what_runs_here_is_what_is_locked() -> None:
    versions = {str(each.name): each.version for each in locked()}
    found = {str(canonicalize_name(each.name)): each.version for each in runtime()}
    assert LEAST.keys() <= found.keys() and len(found) > len(LEAST)
    assert found == {name: versions[name] for name in found}


def test_ops_09_no_wheel_brings_a_start_up_hook() -> None:
    for each in runtime():
        files = [str(file) for file in each.files or ()]
        assert len(files) > 3, each.name  # its RECORD was read
        assert not [file for file in files if START_UP_HOOKS.search(file)], each.name
        assert not [file for file in files if file.startswith(("/", "../")) and "/bin/" not in file], each.name
    hooked = metadata.distribution("gateway").files or ()  # of the editable install, which nobody ships
    assert [file for file in hooked if START_UP_HOOKS.search(str(file))]  # so the look finds what it looks for


def test_ops_09_the_wheel_is_our_package_and_nothing_else(tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(asked, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    [built] = tmp_path.iterdir()
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
        told = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        commands = wheel.read(next(name for name in names if name.endswith("/entry_points.txt"))).decode()
    files = [path for path in (REPOSITORY / "gateway").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    ours = {str(path.relative_to(REPOSITORY)) for path in files}
    about = {name for name in names if name.startswith("gateway-") and ".dist-info/" in name}
    assert names - about == ours
    assert {name.rpartition("/")[2] for name in about} == {"METADATA", "RECORD", "WHEEL", "entry_points.txt"}
    assert {path.suffix for path in files} <= {".py", ".sql", ".html", ".css", ".js", ".svg"}
    assert {"gateway/control/api/pages/auth.html", "gateway/edge/exchange.py"} <= ours and any(name.endswith(".sql") for name in ours)
    assert sorted(re.findall(r"(?m)^Requires-Dist: ([a-z0-9-]+)", told)) == sorted(LEAST)
    assert re.fullmatch(r"\[console_scripts\]\ngateway = gateway\.__main__:main\n+", commands)


@pytest.mark.parametrize("package", sorted(LEAST))
@pytest.mark.parametrize("command", [["-m", "gateway"], [str(Path(sys.executable).parent / "gateway")]], ids=["module", "script"])
def test_ops_09_a_gateway_on_too_old_a_package_says_so_and_does_not_start(tmp_path: Path, package: str, command: list[str]) -> None:
    """The package is found as it would be if it were installed, in an older version and before the true one."""
    told = tmp_path / f"{package.replace('-', '_')}-0.0.1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
    asked = [sys.executable, *command, "serve", "--config", str(REPOSITORY / "config" / "gateway.toml")]
    ended = subprocess.run(asked, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, timeout=30, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (1, b"")
    [line] = ended.stderr.splitlines()
    assert json.loads(line) == {"error": {"message": f"{package} 0.0.1 is too old; {LEAST[package]} or newer is needed"}}


OLDER = [("3.14.1", "3.14.2"), ("3.9", "3.14.2"), ("3.14.2rc1", "3.14.2"), ("0.19.9", "0.20"), ("1.dev3", "1"), ("x", "0.1")]


@pytest.mark.parametrize(("older", "newer"), OLDER)
def test_versions_sort_by_number(older: str, newer: str) -> None:
    assert requirements._order(older) < requirements._order(newer)


@pytest.mark.parametrize("same", [("3.14", "3.14.0"), ("1.0.post1", "1"), ("2.0+local", "2.0")])
def test_versions_that_differ_in_writing_alone_are_as_good(same: tuple[str, str]) -> None:
    assert requirements._order(same[0]) == requirements._order(same[1])


def test_ops_09_what_is_shipped_is_listed_with_licence_and_hashes(tmp_path: Path) -> None:
    shipped.write(tmp_path)
    bom = json.loads((tmp_path / "sbom.json").read_text())
    assert (bom["bomFormat"], bom["specVersion"], bom["metadata"]["component"]["name"]) == ("CycloneDX", "1.5", "gateway")
    listed = {each["name"]: each for each in bom["components"]}
    assert listed.keys() >= LEAST.keys() and len(listed) == len(runtime())
    for each in listed.values():
        assert each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}" and each["hashes"]
    licences = (tmp_path / "licences.txt").read_text().splitlines()
    assert len(licences) == len(listed) and not [line for line in licences if line.endswith(": unknown")]
    assert {each.name for each in locked((tmp_path / "runtime.txt").read_text())} == listed.keys()
