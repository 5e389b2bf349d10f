"""Rules of the repository that no checker knows: sizes, layout, names."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

LONG_MODULES = {
    "megatron_drpo/config/schema.py": "every knob in one file",
    "tests/unit/step/test_experience_source.py": "stand-ins of engine and rewards, beside their tests",
}
"""Path -> why it may be longer."""

LONG_FUNCTIONS: dict[str, str] = {}
"""path:function -> why it may be longer."""

FOLDERS = {"megatron_drpo", "conversion", "examples", "tools", "tests"}
FILES = {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "constraints-cpu.txt", "pyproject.toml"}
FILES |= {"requirements-sglang-cpu.txt"}
TEXT_SUFFIXES = {".py", ".toml", ".txt", ".md", ".yaml", ".jsonl", ".html", ".sh", ""}
FORBIDDEN_TEXT = {
    "a path of somebody's machine": re.compile(r"/(?:home|root|Users|work|private)/\w"),
    "a fixed temporary path": re.compile(r"""(?<![\w{$.])/(?:tmp|var/tmp)(?![\w])"""),
    "an unfinished place": re.compile(r"\b(?:TODO|FIXME|XXX)\b"),
    "a merge conflict": re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE),
}


def tracked_files(root: Path) -> list[Path] | None:
    """None where git cannot say: in an export nothing tells the project's files from others beside them."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-c", f"safe.directory={root}", "ls-files", "-z"]  # whoever the checkout belongs to
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        return None
    paths = [root / name for name in listing.stdout.split("\0") if name]
    return sorted(path for path in paths if path.is_file())


@cache
def project_files() -> list[Path]:
    """What the rules are about: logs, notes and experiments of whoever works here are not."""
    tracked = tracked_files(ROOT)
    if tracked is not None:
        return tracked
    visible = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in [*visible, *(ROOT / name for name in FILES)] if path.is_file())


def sources(*folders: str) -> list[Path]:
    """The Python files in these folders."""
    below = [ROOT / folder for folder in folders]
    return [
        path
        for path in project_files()
        if path.suffix == ".py" and any(path.is_relative_to(folder) for folder in below)
    ]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function too long; decorators and docstring count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.name, lines


def test_modules_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in sources(*FOLDERS)}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_MODULE_LINES}
    assert {name: lines for name, lines in long.items() if name not in LONG_MODULES} == {}
    assert LONG_MODULES.keys() <= long.keys(), "an exception that is no longer needed"


def test_functions_are_short() -> None:
    long = {
        f"{name_of(path)}:{name}": lines
        for path in sources(*FOLDERS)
        for name, lines in long_functions(path.read_text())
    }
    assert {name: lines for name, lines in long.items() if name not in LONG_FUNCTIONS} == {}
    assert LONG_FUNCTIONS.keys() <= long.keys(), "an exception that is no longer needed"


def test_size_rule_sees_methods_and_decorators() -> None:
    """61 lines: a decorator, the def and 59 statements."""
    method = "class A:\n    @property\n    def f(self):\n" + "        pass\n" * 59
    assert list(long_functions(method)) == [("f", 61)]
    assert list(long_functions(method.replace("    @property\n", ""))) == []


def test_top_level_holds_nothing_else() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in project_files()}
    assert {name for name in found if not name.startswith(".")} == FOLDERS | FILES


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_only_tracked_files_count(tmp_path: Path) -> None:
    """`make test > test.log` writes at the top of the checkout while the rules are checked."""
    for name in ("kept.py", "removed.py", "with space.md"):
        (tmp_path / name).write_text("")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    (tmp_path / "removed.py").unlink()
    (tmp_path / "test.log").write_text("")
    assert tracked_files(tmp_path) == [tmp_path / "kept.py", tmp_path / "with space.md"]


def test_an_export_has_no_tracked_files(tmp_path: Path) -> None:
    assert tracked_files(tmp_path) is None


def test_every_unit_test_mirrors_a_package_file() -> None:
    """tests/unit/losses/test_drpo.py tests megatron_drpo/losses/drpo.py; a folder's test has its name."""
    unit = ROOT / "tests" / "unit"
    beside_the_package = {"test_repository.py", "test_conftest.py"}
    strays = []
    for path in sources("tests/unit"):
        if not path.name.startswith("test_"):
            continue
        place = path.relative_to(unit)
        target = ROOT / "megatron_drpo" / place.parent / place.name.removeprefix("test_")
        package = target.with_suffix("") / "__init__.py"
        if not (target.is_file() or package.is_file() or place.as_posix() in beside_the_package):
            strays.append(f"{name_of(path)}: there is no {name_of(target)}")
    assert strays == []


def test_every_folder_of_the_package_is_importable() -> None:
    folders = {path.parent for path in sources("megatron_drpo")}
    folders.remove(ROOT / "megatron_drpo" / "fleet" / "sglang_cpu")  # on another interpreter's path
    assert {name_of(folder) for folder in folders if not (folder / "__init__.py").is_file()} == set()


def texts() -> list[Path]:
    return [
        path
        for path in project_files()
        if path.suffix in TEXT_SUFFIXES and path != Path(__file__) and path.name != "LICENSE"
    ]


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_text_that_does_not_belong_here(what: str) -> None:
    pattern = FORBIDDEN_TEXT[what]
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("see /home/ann/model", "a path of somebody's machine"),
        ('open("/tmp/x")', "a fixed temporary path"),
        ("# TODO later", "an unfinished place"),
        ("<<<<<<< HEAD", "a merge conflict"),
    ],
)
def test_forbidden_text_is_recognised(text: str, what: str) -> None:
    assert [name for name, pattern in FORBIDDEN_TEXT.items() if pattern.search(text)] == [what]


@pytest.mark.parametrize("text", ["tmp_path / 'x'", "https://example.org/home", "<a>/tmpfile", "-------"])
def test_ordinary_text_is_allowed(text: str) -> None:
    assert [name for name, pattern in FORBIDDEN_TEXT.items() if pattern.search(text)] == []


def code_in(markdown: str) -> str:
    """The code spans and blocks, one a line."""
    return "\n".join(a or b for a, b in re.findall(r"```\w*\n(.*?)```|`([^`]+)`", markdown, re.DOTALL))


def unknown_names(markdown: str, place: Path) -> Iterator[str]:
    """What a page names in code or links to, and the repository does not have."""
    code = code_in(markdown)
    keys = {line.split(" = ")[0] for line in (ROOT / "tests/golden/config_keys.txt").read_text().splitlines()}
    sections = "|".join({key.partition(".")[0] for key in keys if "." in key})
    known = keys | {key.rpartition(".")[0] for key in keys}
    for key in re.findall(rf"(?<![\w./])(?:{sections})(?:\.[a-z_0-9]+)+(?=[=`\s,)]|$)", code, re.MULTILINE):
        if key not in known and not key.endswith((".py", ".jsonl", ".json")):
            yield f"setting {key}"
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^make ([a-z0-9-]+)", code, re.MULTILINE):
        if target not in targets:
            yield f"make {target}"
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(sorted(FOLDERS))})/[\w./-]+", code):
        if not (ROOT / name).exists():
            yield name
    for link in re.findall(r"\]\(([^)#]+)", markdown):
        if "://" not in link and not (place.parent / link).exists():
            yield link


PAGES = [path for path in project_files() if path.suffix == ".md" and path.name != "CHANGELOG.md"]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_documentation_names_what_exists(path: Path) -> None:
    assert list(unknown_names(path.read_text(), path)) == []


def test_names_that_no_longer_exist_are_recognised() -> None:
    text = """Set `policy.logprob_chunk_tokens` or `rollout.max_staleness=1`; [how](docs/how.md).
```bash
make demo
make test PYTEST_ARGS="-k x"
python tools/gone.py --all
```
See `tools/parity.py`, `data.train_path`, `checkpoints/latest`, `metrics.jsonl` and [this](LICENSE)."""
    found = list(unknown_names(text, ROOT / "README.md"))
    assert found == ["setting policy.logprob_chunk_tokens", "make demo", "tools/gone.py", "docs/how.md"]


def num_required(tool: str) -> int:
    """The positional arguments that a tool cannot do without."""
    calls = [node for node in ast.walk(ast.parse(tool)) if isinstance(node, ast.Call)]
    added = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"]
    literal = [[a.value for a in c.args if isinstance(a, ast.Constant)] for c in added]
    optional = [
        any(k.arg == "nargs" and ast.unparse(k.value) in ("'?'", "'*'") for k in c.keywords) for c in added
    ]
    return sum(
        not str(names[0]).startswith("-") and not may_miss
        for names, may_miss in zip(literal, optional, strict=True)
        if names
    )


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_tools_run_as_the_documentation_names_them(path: Path) -> None:
    """`python tools/x.py`, alone, is for a tool that needs no argument."""
    wrong = [
        command
        for command, name, first in re.findall(
            r"(python (tools/\w+\.py) ?([^\s;]*))", code_in(path.read_text())
        )
        if num_required((ROOT / name).read_text()) and first[:1] in ("", "-")
    ]
    assert wrong == []


def test_required_arguments_are_recognised() -> None:
    source = """
parser.add_argument("folder", type=Path)
parser.add_argument("rest", nargs="*")
parser.add_argument("output", nargs="?", help="x")
parser.add_argument("--seed", type=int)
parser.add_argument(
    "more", nargs="+"
)
"""
    assert num_required(source) == 2


def test_ci_and_makefile_start_with_what_a_bare_machine_has() -> None:
    """All commands of CI are make targets, and every make target that runs Python installs it first."""
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make check", "make test", "make sglang-env", "make test-sglang"]
    makefile = (ROOT / "Makefile").read_text()
    for target in ("quickstart", "test", "check", "test-sglang"):
        assert re.search(rf"^{target}: \$\(INSTALLED\)", makefile, re.MULTILINE)


COMPARED_IF_INSTALLED = {"liger-kernel", "quack", "transformer-engine", "verl"}
"""Libraries that tools/bench_logprobs.py looks for."""


def canonical(name: str) -> str:
    """A distribution's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(*extras: str) -> set[str]:
    """The distributions that `pip install '.[extras]'` asks for, without what these need themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, open_extras = set(), [*extras]
    requirements = project["dependencies"]
    while True:
        for requirement in map(Requirement, requirements):
            if requirement.name == project["name"]:
                open_extras += requirement.extras
            else:
                found.add(canonical(requirement.name))
        if not open_extras:
            return found
        requirements = project["optional-dependencies"][open_extras.pop()]


@cache
def owners() -> Mapping[str, list[str]]:
    """Module -> the installed distributions that have it."""
    return packages_distributions()


def imported_distributions(source: str) -> set[str]:
    """What a module's imports, wherever they stand, need from the package index."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").partition(".")[0])
    third_party = modules - sys.stdlib_module_names - FOLDERS
    return {canonical(owners().get(module, [module])[0]) for module in third_party}


def test_every_environment_has_what_the_tests_import() -> None:
    """With what the tests run: tools, conversions, examples."""
    makefile = (ROOT / "Makefile").read_text()
    environments = re.findall(r"--editable '\.\[([\w,]+)\]'", makefile)
    assert len(environments) == 2
    needed: dict[str, str] = {}
    for path in sources(*FOLDERS):
        if ROOT / "megatron_drpo" / "fleet" / "sglang_cpu" not in path.parents:  # SGLang's environment
            needed |= dict.fromkeys(imported_distributions(path.read_text()), name_of(path))
    for extras in environments:
        covered = installed_with(*extras.split(",")) | COMPARED_IF_INSTALLED
        assert {name: user for name, user in needed.items() if name not in covered} == {}, extras


def test_imports_are_recognised() -> None:
    source = "import os.path\nfrom tools import x\ndef f():\n    import yaml, absent_one\n"
    assert imported_distributions(source) == {"pyyaml", "absent-one"}
    assert "ray" not in installed_with("smollm2")
    assert installed_with("dev") > {"torch", "ray", "gguf", "pytest", "ruff"}


def test_constraints_pin_what_the_project_declares() -> None:
    """No name is pinned that pyproject.toml does not ask for, directly or for math-verify's parser."""
    pinned = dict(
        re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / "constraints-cpu.txt").read_text(), re.MULTILINE)
    )
    declared = set(re.findall(r'"([A-Za-z][\w-]*)[>=\[]', (ROOT / "pyproject.toml").read_text()))
    assert set(pinned) - declared == {"latex2sympy2_extended", "sympy"}
    assert pinned["torch"] == "2.13.0"
