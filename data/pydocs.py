"""pydocs: known-item search over the docstrings of the Python packages that are already
installed."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data.cache import cached

PACKAGES = ("numpy", "torch", "transformers")
TEST_FOLDERS = {"test", "tests", "testing", "idle_test"}
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SHORTEST_QUERY, LONGEST_QUERY, SHORTEST_DOCUMENT = 4, 40, 20  # words

WORD = re.compile(r"[A-Za-z][A-Za-z0-9]+")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[^a-z])")
SIGNATURE = re.compile(r"\S*\w\(.*\)( *->.*)?:?$")
# what stands first in a docstring that has no summary line: a list of arguments, a directive, a
# section
NOT_A_SUMMARY = re.compile(
    r"(\.\. |>>>|```|#|"
    r":?(args|arguments|params?|parameters|returns?|raises|examples?|notes?|inputs?|outputs?"
    r"|usage)\b *:|"
    r"\W*\w+\W* ?(\(.*`.*\)|: ?`|\([^)]*\) *:))",
    re.IGNORECASE,
)
# summaries written by a script, or that say nothing of what they summarise
BOILERPLATE = re.compile(
    r"(tests?\b|see\b|same as\b|alias (of|for)\b|deprecated\b|"
    r"this (class|method|function) (is|has been) deprecated|"
    r"this (is the )?configuration class\b|the \[?`?\w+`?\]? forward method|initiali[sz]e self\b|"
    r"auto-?generated|copyright\b|licensed under\b|todo\b)",
    re.IGNORECASE,
)


def _package_files() -> list[tuple[str, Path]]:
    """(dotted module name, file) of the standard library and PACKAGES, sorted, nothing imported."""
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            roots.append((name, Path(spec.origin).parent))
    files = []
    for name, root in roots:
        for path in root.rglob("*.py"):
            parts = ([name] if name else []) + list(path.relative_to(root).with_suffix("").parts)
            if parts[0] not in ("site-packages", "dist-packages"):
                files.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(files)


def _literal(node: ast.expr) -> str:
    """The text of a string expression: constants, their sums, `.format` templates (without their
    fields)."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        return _literal(node.left) + _literal(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func,
                                                 ast.Attribute) and node.func.attr == "format":
        return re.sub(r"\{\w*\}", "", _literal(node.func.value)).replace("{{", "{").replace(
            "}}", "}")
    return ""


def _added_docstring(module: str, statement: ast.Expr | ast.Assign) -> tuple[str, str] | None:
    """(name, docstring) given to a function written in C: torch's `add_docstr`, numpy's
    `add_newdoc`."""
    call = statement.value
    if not (isinstance(call, ast.Call) and len(call.args) > 1):
        return None
    function = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    if function.endswith("add_docstr"):
        is_alias = isinstance(statement, ast.Assign)
        name = f"{module}.{ast.unparse(statement.targets[0])}" if is_alias else ast.unparse(
            call.args[0])
        return name, inspect.cleandoc(_literal(call.args[1]))
    if function.endswith("add_newdoc"):
        flat = [part for arg in call.args for part in (arg.elts if isinstance(arg, ast.Tuple)
                                                       else [arg])]
        *name, docstring = map(_literal, flat)
        return ".".join(name), inspect.cleandoc(docstring)
    return None


def _docstrings(module: str, source: bytes):
    """Yield (dotted name, cleaned docstring) of module, classes and functions, in the order of the
    file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, name = stack.pop()
        if isinstance(node, DEFINITIONS):
            name = name if node is tree else f"{name}.{node.name}"
            docstring = ast.get_docstring(node)
            if docstring:
                yield name, docstring
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue  # functions within functions are nobody's known item
        elif isinstance(node, (ast.Expr, ast.Assign)):
            added = _added_docstring(module, node)
            if added is not None:
                yield added
        for block in ("finalbody", "handlers", "orelse", "body"):
            stack += [(child, name) for child in reversed(getattr(node, block, ()))]


def _query_and_document(docstring: str) -> tuple[str, str]:
    """The summary (first sentence of the first paragraph that is not a signature) and all that
    follows it."""
    paragraph, _, rest = docstring.partition("\n\n")
    if SIGNATURE.match(" ".join(paragraph.split())):
        paragraph, _, rest = rest.lstrip("\n").partition("\n\n")
    summary, *more = SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)
    return summary, "\n\n".join([*more, rest.strip("\n")]).strip()


def _items_of(file: tuple[str, Path]) -> tuple[Counter, Counter, list[tuple[str, str, str]]]:
    """(counts of files and docstrings, counts of what was dropped, [(name, query, document)]) of
    one module."""
    module, path = file
    dropped, found, parts = Counter(), [], module.split(".")
    if TEST_FOLDERS & set(parts) or any(part.startswith("test_") for part in parts):
        return Counter(["files of tests"]), dropped, found
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return Counter(["files without docstrings"]), dropped, found
    try:
        docstrings = list(_docstrings(module, source))
    except (SyntaxError, ValueError):
        return Counter(["files that do not parse"]), dropped, found
    for name, docstring in docstrings:
        query, document = _query_and_document(docstring)
        words = len(WORD.findall(query))
        if len(WORD.findall(document)) < SHORTEST_DOCUMENT:
            dropped["nothing or too little after the summary"] += 1
        elif NOT_A_SUMMARY.match(query):
            dropped["no summary (a list of arguments, a directive)"] += 1
        elif BOILERPLATE.match(query):
            dropped["boilerplate summary"] += 1
        elif words < SHORTEST_QUERY:
            dropped[f"summary under {SHORTEST_QUERY} words"] += 1
        elif words > LONGEST_QUERY:
            dropped[f"summary over {LONGEST_QUERY} words"] += 1
        else:
            found.append((name, query, document))
    return Counter({"files": 1, "docstrings": len(docstrings)}), dropped, found


def _groups_of_near_duplicates(documents: list[str], threshold: float = 0.5) -> list[int]:
    """For every document the first of its group: linked by Jaccard >= threshold of their word
    3-grams.

    The Jaccard index is estimated from the 48 smallest hashes of each document (Broder's bottom-k
    sketch).
    """
    leader = list(range(len(documents)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    size = 48
    sketches, seen = [], defaultdict(list)
    for i, document in enumerate(documents):
        words = [word.lower() for word in WORD.findall(document)]
        trigrams = {" ".join(words[j : j + 3]) for j in range(len(words) - 2)}
        sketch = sorted(zlib.crc32(trigram.encode()) for trigram in trigrams)[:size]
        sketches.append(set(sketch))
        for other in sorted({other for value in sketch[:6] for other in seen[value][:50]}):
            if find(other) == find(i):
                continue
            union = set(sorted(sketches[i] | sketches[other])[:size])
            if len(union & sketches[i] & sketches[other]) >= threshold * len(union):
                first, second = sorted((find(i), find(other)))
                leader[second] = first
        for value in sketch[:6]:
            seen[value].append(i)
    return [find(i) for i in range(len(documents))]


def _split(text: str) -> str:
    """train, dev or test (90, 5, 5 in a hundred) by a hash of the text."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 100
    if number < 5:
        return "test"
    return "dev" if number < 10 else "train"


def pydocs_folder() -> Path:
    """The BEIR folder of `pydocs`, built at first use and cached by the versions of the packages it
    is made of."""
    versions = [importlib.metadata.version(name) for name in PACKAGES]
    source = Path(__file__).read_text(encoding="utf-8")
    return cached("pydocs", "\n".join([sys.version, *versions, source]), build_pydocs)


def build_pydocs(folder: Path) -> None:
    """Writes `pydocs` into an empty folder, in BEIR layout: corpus.jsonl, queries.jsonl,
    qrels/{train,dev,test}.tsv.

    Known-item search over the docstrings of the standard library, numpy, torch and transformers as
    installed. Query: the summary line. Its one relevant document: the rest of the same docstring.
    Queries of all splits search the same corpus; groups of near-duplicate documents lie in one
    split. The modules are parsed, not imported. What is left out, and how much of it, is printed
    once to stderr. The same installed packages give the same bytes.
    """
    counts, dropped, found = Counter(), Counter(), []
    files = _package_files()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        parsed = pool.map(_items_of, files, chunksize=32)
        bar = tqdm(parsed, total=len(files), desc="pydocs", unit=" files", leave=False,
                   disable=None)
        for part in bar:
            counts.update(part[0])
            dropped.update(part[1])
            found += part[2]
    kept = _distinct(found, dropped)
    if not kept:
        raise ValueError("pydocs: no docstrings found; are Python's own .py files installed?")

    groups = _groups_of_near_duplicates([document for _, _, document in kept])
    qrels = defaultdict(list)
    for (name, _, _), group in zip(kept, groups, strict=True):
        qrels[_split(kept[group][2])].append(name)
    with (
        open(folder / "corpus.jsonl", "w", encoding="utf-8") as corpus,
        open(folder / "queries.jsonl", "w", encoding="utf-8") as queries,
    ):
        for name, query, document in kept:
            corpus.write(_json_line(_id=name, title="", text=document))
            queries.write(_json_line(_id=name, text=query))
    (folder / "qrels").mkdir()
    for split in ("train", "dev", "test"):
        lines = ["query-id\tcorpus-id\tscore\n", *(f"{q}\t{q}\t1\n" for q in qrels[split])]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")

    skipped = sorted((what, n) for what, n in counts.items() if what.startswith("files "))
    sizes = ", ".join(f"{split} {len(qrels[split]):,}" for split in ("train", "dev", "test"))
    report = [f"pydocs: {counts['docstrings']:,} docstrings in {counts['files']:,} files",
              *(f"  skipped {n:>7,} {what}" for what, n in skipped),
              *(f"  dropped {n:>7,} {what}" for what, n in dropped.most_common()),
              f"  kept    {len(kept):>7,} queries, one document each: {sizes}"]
    print("\n".join(report), file=sys.stderr)


def _json_line(**row: str) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _distinct(found: list[tuple[str, str, str]], dropped: Counter) -> list[tuple[str, str, str]]:
    """The (name, query, document) of which name, query and document each occur once; counts what is
    dropped."""

    def key(text: str) -> str:
        return " ".join(word.lower() for word in WORD.findall(text))

    unique, documents_seen, names_seen = [], set(), set()
    for name, query, document in found:
        if key(document) in documents_seen:
            dropped["document seen before"] += 1
        elif name in names_seen:
            dropped["name seen before (overloads)"] += 1
        else:
            unique.append((name, query, document))
            documents_seen.add(key(document))
            names_seen.add(name)
    sharing = Counter(key(query) for _, query, _ in unique)
    kept = [item for item in unique if sharing[key(item[1])] == 1]
    dropped["summary shared by different documents"] = len(unique) - len(kept)
    return kept
