"""What the site adds to MkDocs: files of the repository in pages, links out of docs/, and the messages of every error.

- `<!-- include: benchmarks/README.md -->` in a page stands for that file; `<!-- include: README.md arguments -->` for what
  it has between `<!-- arguments: begin -->` and `<!-- arguments: end -->`. The rest of the line is for the repository.
- A link that leads out of docs/ works on GitHub. On the site a picture is copied, and the name of another file is shown as
  it is, since it has no page.
- `<!-- messages: FrameError -->` stands for every message with which that error is raised, read from the source.
- A public name without a place in the API fails the build, which is strict.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
EXTRA = {"lara_adapter": ["lara_adapter/inspection.py"], "integrations": ["integrations/trainer.py"]}
SHOWN = {"benchmarks/README.md": "evidence.md", "examples/libero/README.md": "libero.md"}  # which have a page
PICTURES = (".png", ".gif", ".svg", ".jpg")
logger = logging.getLogger("mkdocs.hooks.lara")
wanted: dict[str, str] = {}  # pictures outside docs/: path in the site -> path in the repository


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in what a page includes, and settle the links that leave docs/."""
    here = posixpath.join("docs", page.file.src_uri)
    text = _settle_links(markdown, here, page, config, files)
    text = re.sub(
        r"<!-- include: (\S+)(?: (.+?))? -->[^\n]*",
        lambda found: _settle_links(included(found[1], found[2]), found[1], page, config, files),
        text,
    )
    return re.sub(r"<!-- messages: (\w+) -->", lambda found: messages_of(found[1]), text)


def included(path: str, section: str | None = None) -> str:
    """A file without its title, or what it has between the markers of a section."""
    text = (ROOT / path).read_text()
    if section is None:
        return re.sub(r"\A# .*\n", "", text)
    begin, end = f"<!-- {section}: begin -->\n", f"<!-- {section}: end -->"
    if begin not in text or end not in text:
        logger.warning("%s has no section %r", path, section)
        return ""
    return text.split(begin)[1].split(end)[0]


def _settle_links(text: str, source: str, page: Any, config: Any, files: Any) -> str:
    """Make the links of a file of the repository those of the page that shows it."""

    def settle(found: re.Match[str]) -> str:
        mark, label, target, anchor = found.groups()
        if "://" in target or not target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            logger.warning("%s: %s does not exist", source, target)
            return found[0]
        own = posixpath.dirname(posixpath.join("docs", page.file.src_uri))
        if path.startswith("docs/"):
            return f"{mark}[{label}]({posixpath.relpath(path, own)}{anchor or ''})"
        if path in SHOWN:
            return f"{mark}[{label}]({posixpath.relpath(posixpath.join('docs', SHOWN[path]), own)}{anchor or ''})"
        if path.endswith(PICTURES):
            if mark and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            return f"{mark}[{label}]({posixpath.relpath(posixpath.join('docs', path), own)})" if mark else label
        return f"{label} (`{path}`)" if path not in label else f"`{path}`"

    return re.sub(r"(!?)\[((?:[^\[\]]|\n)*)\]\(([^)#\s]*)(#[^)\s]*)?\)", settle, text)


def public_names() -> Iterator[tuple[str, str]]:
    """The public names: what the packages and the modules of EXTRA have in `__all__`, without constants."""
    for package, prefix in (("lara_adapter", ""), ("integrations", "lara_adapter.")):
        for path in [*sorted((ROOT / package).rglob("__init__.py")), *(ROOT / each for each in EXTRA[package])]:
            module = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if module not in ("lara_adapter.integrations", "lara_adapter.cli"):
                yield from ((module, name) for name in _all(path) if not name.isupper())


def _all(path: Path) -> list[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


@cache
def raised() -> dict[str, list[tuple[str, str]]]:
    """Error -> its messages and the modules that raise it. What a message computes is shown in braces."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in _all(ROOT / "lara_adapter" / "errors.py")}
    for package in ("lara_adapter", "integrations"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in found
                    and node.args
                ):
                    for text in _messages(node.args[0], tree):
                        if (module, text) not in found[node.func.id]:
                            found[node.func.id].append((module, text))
    return found


def _messages(node: ast.expr, tree: ast.Module) -> list[str]:
    """The texts of an expression that makes a message, also through a function of the same module that returns them."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        makers = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == node.func.id]
        returned = [each.value for maker in makers for each in ast.walk(maker) if isinstance(each, ast.Return)]
        return [text for value in returned if value is not None for text in _messages(value, tree)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return ["".join(parts) for parts in [(*_messages(node.left, tree), *_messages(node.right, tree))] if parts]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{_name(part.value)}}}"  # type: ignore[attr-defined]
            for part in node.values
        )
        return [text] if re.sub(r"\{[^}]*\}", "", text).strip(" :,.") else []
    return []


def _name(node: ast.expr) -> str:
    """What a placeholder is called: the name that it shows, else dots."""
    names = re.findall(r"[A-Za-z_]\w*", ast.unparse(node))
    sign = "-" if isinstance(node, ast.UnaryOp) else ""
    return sign + names[-1].strip("_") if 1 <= len(names) <= 2 else "..."


def messages_of(error: str) -> str:
    """A folded table of the messages of an error."""
    rows = raised().get(error, [])
    if not rows:
        logger.warning("no message of %s was found in the source", error)
        return ""
    lines = [f'??? note "The messages of {error}, by module"', ""]
    for module in dict.fromkeys(module for module, _ in rows):
        lines += [f"    `{module}`", ""]
        for text in (text for each, text in rows if each == module):
            plain = re.sub(r"([*_`\[\]<>|#])", r"\\\1", " ".join(text.split()))
            lines.append(f"    - {plain}")
        lines.append("")
    return "\n".join(lines)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Show names in docstrings without the roles that Sphinx would read (:class:, :func:)."""
    return re.sub(r":(?:class|func|meth|mod|attr|data):<code>~?", "<code>", html)


def on_post_build(config: Any) -> None:
    """Fail where a public name is not in the API."""
    text = "".join(path.read_text() for path in (Path(config.site_dir) / "api").glob("*.html"))
    for module, name in public_names():
        if not re.search(rf'id="({module}(\.\w+)*|lara_adapter)\.{name}"', text):
            logger.warning("%s.%s is public and not in docs/api", module, name)
