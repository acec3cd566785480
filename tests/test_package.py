"""The three folders arrive as graphopt, graphopt.passes and graphopt.kernels, however installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"graphopt": "graphopt", "passes": "graphopt.passes", "kernels": "graphopt.kernels"}

# Names are given, since an editable install's folders cannot be walked.
IMPORT_ALL = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""


def source_modules() -> dict[str, Path]:
    """Import name of every module, with its file in the source tree."""
    modules = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            modules[name] = path
    return modules


def run(*command: str | Path, cwd: Path, expect: int = 0) -> str:
    result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert result.returncode == expect, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, so that building leaves no trace in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def test_every_package_is_listed() -> None:
    packages = {name for name, path in source_modules().items() if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_every_folder_of_modules_is_a_package() -> None:
    for path in source_modules().values():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py"


def test_torch_stays_below_the_first_untested_release() -> None:
    (requirement,) = [d for d in PROJECT["project"]["dependencies"] if re.match(r"torch\b", d)]
    assert requirement == "torch>=2.9,<2.14"


@pytest.mark.slow
def test_wheel_holds_the_three_packages_and_nothing_else(source: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
    run(*pip, "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("graphopt-*.whl")
    files = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        for name, path in source_modules().items()
    }
    assert files == expected | {"graphopt/py.typed"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["wheel", "editable", "editable-strict"])
def test_installed_package_imports_from_elsewhere(mode: str, source: Path, tmp_path: Path) -> None:
    options = {
        "wheel": [source],
        "editable": ["--editable", source],
        "editable-strict": [
            "--editable",
            source,
            "--config-settings",
            "editable_mode=strict",
        ],
    }[mode]
    # An environment of its own that sees this one's libraries, but not its install of graphopt:
    # .pth files of a folder that is itself named in a .pth file are not followed.
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site_packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).strip()
    (Path(site_packages) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    # Already-installed copies that the libraries' folder shows must not be taken for this one's.
    flags = ("--no-build-isolation", "--no-deps", "--ignore-installed")
    run(*pip, *flags, *options, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = [name for name in source_modules() if not name.endswith("__main__")]
    imported: dict[str, str] = json.loads(run(python, "-c", IMPORT_ALL, *names, cwd=elsewhere))
    home = source if mode.startswith("editable") else Path(site_packages)
    for name, file in imported.items():
        assert Path(file).is_relative_to(home), f"{name} comes from {file}"
    for name in ("passes", "kernels"):
        run(python, "-c", f"import {name}", cwd=elsewhere, expect=1)


@pytest.mark.slow
def test_a_pass_module_imported_by_its_folder_is_refused() -> None:
    module = next(p.stem for p in sorted((ROOT / "passes").glob("*.py")) if p.stem != "__init__")
    result = subprocess.run(
        [sys.executable, "-c", f"import graphopt, passes.{module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert f"graphopt.passes.{module}" in result.stderr.splitlines()[-1]


def test_readme_has_exactly_two_set_up_commands() -> None:
    text = (ROOT / "README.md").read_text()
    marked = re.findall(r"^<!-- (demo|test) -->\n```bash\n(.+)\n```$", text, flags=re.MULTILINE)
    assert [name for name, _ in marked] == ["demo", "test"]
    assert all("\n" not in command for _, command in marked)
