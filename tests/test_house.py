"""The house: who imports whom, how large files and functions are, how dense lines may be, and that pages tell the truth."""
import ast
import io
import re
import tokenize

import pytest
from conftest import ROOT

GROUND = {"haste", "sit", "dit", "mmdit", "xar", "teacher", "vae", "text", "fid"}                 # each can be copied alone
BUDGET = {"haste_train": 34_000, "fid": 38_000}                             # bytes; whole programs
USUAL_BUDGET = 28_000
CODE_COLUMNS, COMMENT_COLUMNS = 100, 120
LOOPS = {("haste_train.py", "train"), ("xar_train.py", "train")}            # may be longer than a screen
TOP = sorted(ROOT.glob("*.py"))
FILES = [*TOP, *sorted(ROOT.glob("tools/*.py")), *sorted(ROOT.glob("experiments/*.py"))]
SIBLINGS = {path.stem for path in TOP}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(tree):
    """[(name of a sibling, line)] of all imports below a node."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node.lineno))
    return [(name.split(".")[0], line) for name, line in found if name.split(".")[0] in SIBLINGS]


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def too_wide(text):
    """Lines whose code is wider than CODE_COLUMNS, or whose trailing comment ends beyond COMMENT_COLUMNS."""
    trailing = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line[:token.start[1]].strip():
            trailing[token.start[0]] = token.start[1]
    bad = []
    for number, line in enumerate(text.splitlines(), 1):
        code = line[:trailing[number]].rstrip() if number in trailing else line
        if len(code) > CODE_COLUMNS or len(line) > COMMENT_COLUMNS:
            bad.append(number)
    return bad


def tuple_assignments(tree):
    """Lines with `a, b = x, y`."""
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Tuple)
            and any(isinstance(target, ast.Tuple) for target in n.targets)]


def squeezed(tree):
    """Lines with a named lambda, a comprehension of two loops, or a conditional inside a tuple or an argument list."""
    bad = []
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda):
            bad.append((n.lineno, "named lambda"))
        if isinstance(n, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) and len(n.generators) > 1:
            bad.append((n.lineno, "comprehension of two loops"))
        values = []
        if isinstance(n, ast.Call):
            values = [*n.args, *(keyword.value for keyword in n.keywords)]
        elif isinstance(n, ast.Tuple):
            values = n.elts
        bad += [(v.lineno, "conditional in a tuple or call") for v in values if isinstance(v, ast.IfExp)]
    return bad


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_reads_well(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert path.parent != ROOT or len(text.encode()) <= BUDGET.get(path.stem, USUAL_BUDGET), "too large"
    assert not too_wide(text), "lines too wide"
    assert len(tuple_assignments(tree)) <= 5, f"assignments of tuples: {tuple_assignments(tree)}"
    assert not squeezed(tree)
    long = [f.name for f in functions(tree)
            if f.end_lineno - f.lineno >= 60 and (name_of(path), f.name) not in LOOPS]
    assert not long, f"functions above 60 lines: {long}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_of_siblings(path):
    tree = ast.parse(path.read_text())
    inside = []
    for function in functions(tree):
        inside += [name for name, _ in imports(function)]
    if path.stem == "fid":                                                  # --features dinov2 needs the file beside it
        inside = [name for name in inside if name != "teacher"]
    assert not inside, f"imported inside a function: {inside}"
    if path.parent == ROOT and path.stem in GROUND:
        assert {name for name, _ in imports(tree)} <= ({"teacher"} if path.stem == "fid" else set())


def test_no_circle():
    arrows = {p.stem: {name for name, _ in imports(ast.parse(p.read_text()))} for p in TOP}
    while arrows:
        leaves = [name for name, targets in arrows.items() if not targets & arrows.keys()]
        assert leaves, f"a circle among {sorted(arrows)}"
        for name in leaves:
            del arrows[name]


# ---- pages

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 180
OTHERS_FILES = {"merges.txt"}                                               # of CLIP
# flags of other programs that the pages may name
OTHERS_FLAGS = {"--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint",
                "--job-name", "--dependency", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task",
                "--time", "--signal", "--requeue", "--open-mode", "--shutdown-timeout"}


def all_code():
    return "".join(p.read_text() for p in [*FILES, *sorted(ROOT.glob("tests/*.py"))])


def defined_at(file, line):
    """Return the line of a file where something is defined, or a field of a dict or dataclass stands."""
    return file.read_text().splitlines()[int(line) - 1]


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        assert (page.parent / file).exists() if file else True, target
        if re.fullmatch(r"L\d+", anchor):                                   # a line: the label names what stands there
            names = re.findall(r"\w+", label.strip("`"))
            assert re.search(rf"\b(def|class) {names[-1]}\b|^{names[-1]} = ", defined_at(page.parent / file, anchor[1:])), target
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / file if file else page).read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_flags_of_pages_exist(page):
    text, code = page.read_text(), all_code()
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - OTHERS_FLAGS:
        positive = re.sub("^--no-", "--", flag)
        field = positive[2:].replace("-", "_")
        assert re.search(rf'"{positive}"|^    {field}: ', code, re.M), f"{flag} is not a flag"
    for path in re.findall(r"`((?:docs|tests|tools|experiments)/[\w./]+|\w+\.(?:py|npz|txt))`", text):
        assert path in OTHERS_FILES or (ROOT / path).exists(), path


def test_readme_counts_lines():
    """The reading table says how long each file is."""
    rows = re.findall(r"^\|[^|]*\[`(\w+\.py)`\]\(\1\) *\| *([\d,]+) *\|", PAGES[0].read_text(), re.M)
    assert {file for file, _ in rows} >= {"haste.py", "haste_train.py", "sit.py", "xar.py", "fid.py"}
    for file, count in rows:
        assert int(count.replace(",", "")) == len((ROOT / file).read_text().splitlines()), file


def test_readme_shows_where_things_are():
    labels = re.findall(r"\[`([\w.]+)`\]\([\w/]+\.py#L\d+\)", PAGES[0].read_text())
    linked = {label.split(".")[-1] for label in labels}
    assert linked >= {"losses", "drop_projector", "interpolant", "sample_sde", "sample_tokens", "frechet_distance"}
