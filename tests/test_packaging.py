"""The house: packages match folders, imports only go down, the wheel works outside the checkout."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
MAY_IMPORT = {
    "kernels": set(),
    "runtime": {"kernels"},
    "calibrate": {"runtime", "kernels"},
    "compress": {"calibrate", "runtime", "kernels"},
    "cli": {"compress", "calibrate", "runtime", "kernels"},
    "recipes": set(),
}


def test_every_folder_with_code_is_a_listed_package() -> None:
    found = {
        "compressor." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in SETUPTOOLS["package-dir"].values()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == set(SETUPTOOLS["packages"])


def test_kernels_has_no_init() -> None:
    # With one, `import kernels` in a script at the repository root finds ours, and transformers breaks.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_go_down(floor: str) -> None:
    for path in (ROOT / floor).rglob("*.py"):
        depth = len(path.relative_to(ROOT / floor).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > depth and node.module:
                assert node.module.split(".")[0] in MAY_IMPORT[floor], f"{path} imports {node.module}"
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not (node.module or "").startswith("compressor"), f"{path}: import relatively"


def test_files_and_functions_stay_short() -> None:
    for floor in MAY_IMPORT:
        for path in (ROOT / floor).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert text.count("\n") <= 500, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and floor != "kernels":
                    assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    subprocess.run(wheel, check=True, cwd=tmp_path)
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *tmp_path.glob("*.whl")]
    subprocess.run(install, check=True)
    assert {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")} <= {"compressor", "bin"}
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "from compressor.compress.recipe import shipped, parse_recipe\n"
        "import compressor.runtime, compressor.cli.main\n"
        f"assert compressor.runtime.__file__.startswith({str(target)!r}), compressor.runtime.__file__\n"
        "assert [parse_recipe(text) for text in shipped().values()]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
