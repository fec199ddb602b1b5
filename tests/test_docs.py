"""README, docs and examples say what the code does: commands, links, files, imports, tables, and no place of ours."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from sansmax.cli import app
from sansmax.engine.bag_config import load_bag_config
from sansmax.engine.config import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
if not (DOCS / "index.md").exists():
    pytest.skip("the documentation is not part of this distribution", allow_module_level=True)
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# test_dense.py runs them, looks at what they print and draw
ELSEWHERE = ("detection", "segmentation")
RUN = [path for path in EXAMPLES if path.stem not in ELSEWHERE]
WINGS = ("ops", "models", "data", "engine", "report")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def fences(path):
    """Language and text of each fenced block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# Examples


# what makes an example that trains short
SHORT = {
    "train_on_slides": ["--slides", "2", "--size", "1024", "--epochs", "1"],
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Every example, all at once: most of their time is importing."""
    folder = tmp_path_factory.mktemp("examples")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    runs = {}
    for path in RUN:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs[path] = subprocess.Popen(
            [sys.executable, path, *SHORT.get(path.stem, [])], cwd=folder, env=environment, **pipes
        )
    yield runs
    for run in runs.values():
        run.kill()
        run.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=lambda p: p.stem)
def test_examples_run_as_they_are(path, started):
    out, err = started[path].communicate()
    assert started[path].returncode == 0, err
    assert out


def test_the_guide_names_every_example():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [p.name for p in EXAMPLES if f"examples/{p.name}" not in text] == []


# Files


def listed_files(page):
    """Lines of fenced blocks of the form `sansmax/...py   description`."""
    return [
        line.split()[0]
        for _, text in fences(page)
        for line in text.splitlines()
        if re.match(r"sansmax/\S+\.py\s+\S", line)
    ]


@pytest.mark.parametrize("page", [README, DOCS / "architecture.md"], ids=lambda p: p.name)
def test_every_file_is_listed_once(page):
    listed = listed_files(page)
    if not listed:
        pytest.skip(f"{page.name} has no tree yet")
    there = [name_of(p) for p in (ROOT / "sansmax").rglob("*.py") if p.name != "__init__.py"]
    assert sorted(listed) == sorted(there)


# Commands


def shell_lines(path):
    """Commands of the fenced shell blocks, continued lines joined and comments left out."""
    for language, text in fences(path):
        if language in ("sh", "bash", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                if parts := shlex.split(line.removeprefix("$ "), comments=True):
                    yield parts


def inline_commands(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"(?<!`)`(sansmax [^`]+)`(?!`)", text):
        yield shlex.split(" ".join(code.split()))


def commands():
    for page in PAGES:
        for parts in [*shell_lines(page), *inline_commands(page)]:
            if Path(parts[0]).name == "sansmax":
                yield pytest.param(parts[1:], id=f"{name_of(page)}: {shlex.join(parts)}")


# from click, or from the copy of it that newer versions of typer bring
UsageError = typer.BadParameter.__mro__[1]


def check_command(parts):
    group = typer.main.get_command(app)
    with group.make_context("sansmax", list(parts)) as outer:
        name, command, rest = group.resolve_command(outer, list(parts))
        with command.make_context(name, rest, parent=outer) as inner:
            return inner.params


@pytest.mark.parametrize("parts", list(commands()))
def test_commands_are_understood(parts):
    given = check_command(parts)
    if config := given.get("config"):
        assert config.parts[0] == "runs" or (ROOT / config).is_file(), f"there is no {config}"
    load = load_bag_config if given.get("bags") else load_config
    load(None, given.get("set_"))


@pytest.mark.parametrize("line", ["train photos --no-such-option", "nonsense", "predict"])
def test_wrong_commands_would_be_noticed(line):
    with pytest.raises(UsageError):
        check_command(line.split())


def python_commands():
    for page in [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "recipes").glob("*.yaml"))]:
        text = page.read_text(encoding="utf-8")
        for found in sorted(set(re.findall(r"python -m ([\w.]+)|python ((?:examples|docs|benchmarks)/\S+\.py)", text))):
            yield pytest.param(*found, id=f"{name_of(page)}: {''.join(found)}")


@pytest.mark.parametrize(("module", "script"), list(python_commands()))
def test_python_commands_name_what_is_there(module, script):
    if script:
        assert (ROOT / script).is_file()
    elif module.startswith(("sansmax", "benchmarks")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def make_targets():
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_make_targets_exist():
    for page in PAGES:
        used = [parts[1] for parts in shell_lines(page) if parts[0] == "make"]
        used += re.findall(r"`make (\w+)`", page.read_text(encoding="utf-8"))
        assert set(used) <= make_targets(), name_of(page)


def test_python_blocks_are_python():
    for page in PAGES:
        for language, text in fences(page):
            if language == "python":
                compile(text, name_of(page), "exec")


# Links


def links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [
        link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http://", "https://", "mailto:"))
    ]


def slug(heading):
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_internal_links_lead_somewhere(page):
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{name_of(page)} links to {link}"


def test_the_menu_has_every_page():
    menu = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert menu == {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}


# The table of the configuration


def test_the_table_of_the_configuration_is_up_to_date():
    spec = importlib.util.spec_from_file_location("config_table", DOCS / "config_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert page == module.with_table(page), "run `python docs/config_table.py`"
    assert set(module.WORDS) <= {line[0].strip("`") for line in module.rows()}


# Imports follow the arrows


BENEATH = {"errors", "files", "optional"}
ALLOWED = {
    "ops": set(),
    "models": {"ops"} | BENEATH,
    "data": BENEATH,
    "report": BENEATH,
    "engine": {"ops", "models", "data", "report"} | BENEATH,
    "cli": {*WINGS} | BENEATH,
    "__main__": {"cli"},
    "__init__": {"models", "engine"},
    "errors": set(),
    "files": set(),
    "optional": {"errors"},
}


def part_of(path):
    inside = path.relative_to(ROOT / "sansmax")
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path):
    """Parts of the package that a file imports, anywhere in it; `import sansmax` is the networks, registered."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} has a relative import"
            names = [f"sansmax.{a.name}" for a in node.names] if node.module == "sansmax" else [node.module]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"sansmax\.[\w.]+", node.value)
        ):
            # a module that is loaded when it is first used
            names = [node.value]
        found |= {(n.split(".") + ["models"])[1] for n in names if n.split(".")[0] == "sansmax"}
    return found - {part_of(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "sansmax").rglob("*.py")), ids=name_of)
def test_imports_follow_the_arrows(path):
    assert imports(path) <= ALLOWED[part_of(path)]


OPS_LIBRARIES = {"torch", "jaxtyping", "sansmax", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", sorted((ROOT / "sansmax" / "ops").glob("*.py")), ids=name_of)
def test_ops_need_nothing_but_torch(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    used |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert {name.split(".")[0] for name in used} <= OPS_LIBRARIES


# No place of ours


# in pieces, so that this file holds none of them
PLACES = re.compile(r"(?<![\w.~$}-])/(?:ho" + r"me|ro" + r"ot|wo" + r"rk|Us" + r"ers)/\w|[A-Z]:\\Us" + r"ers\\")
HOSTS = re.compile(r"py" + r"pi\.org|python" + r"hosted|ana" + r"conda\.(?:org|com)|--(?:extra-)?index" + r"-url \S*//")


def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a clone: there is no list of tracked files")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_place_of_ours():
    wrong = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if PLACES.search(line) or HOSTS.search(line):
                wrong.append(f"{name_of(path)}:{number}: {line.strip()[:80]}")
    assert wrong == []


@pytest.mark.parametrize("text", ["see /ho" + "me/me/x", '"/wo' + 'rk/main"', "https://py" + "pi.org/simple"])
def test_a_place_of_ours_would_be_noticed(text):
    assert PLACES.search(text) or HOSTS.search(text)


# Messages


def messages():
    """Every text of the package, with blanks for what is filled in."""
    texts = []
    for path in (ROOT / "sansmax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_of_the_guide_are_those_of_the_code():
    known = messages()
    page = (DOCS / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \|", page, flags=re.MULTILINE)
    shown = [part for row in rows if row not in ("---", "the message says") for part in re.split(r"'?\.\.\.'?|, ", row)]
    pieces = [part.strip(" :()'") for part in shown]
    assert len(pieces) > 40
    assert [piece for piece in pieces if piece and piece not in known] == []
