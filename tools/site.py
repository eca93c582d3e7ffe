"""MkDocs' hook: pages that are made of other files, and links as GitHub follows them.

A document links to other files of the repository, as GitHub shows them. On the site the README is the first page, a bundle's
README a page of its own, and the link to an experiment's table, ``results/NAME.csv.gz``, leads to the experiment's page.
"""

from __future__ import annotations

import functools
import json
import posixpath
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_morse.__main__ import build_parser
from tools.experiments import ROOT, read_experiments, write_page
from tools.notebook import page_of

if TYPE_CHECKING:
    from mkdocs.structure.files import Files  # of the docs extra, which tests do without

CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)|^ {4,}\S.*?$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^]\[]|\[[^]]*\])*)\]\(([^)\s]+)\)")
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {"docs/notebooks/first_steps.ipynb": "notebooks/first_steps.md"}
PAGES |= {f"bundles/{p.parts[-3]}/docs/README.md": f"bundles/{p.parts[-3]}.md" for p in ROOT.glob("bundles/*/docs/README.md")}
TABLES = {f"results/{name}.csv.gz": f"experiments/{name}.md" for name in read_experiments()}


@functools.cache
def experiments() -> dict[str, str | bytes]:
    """Pages and figures of all experiments by their place on the site: made once, for they take half a minute."""
    found: dict[str, str | bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, experiment in read_experiments().items():
            found[f"experiments/{name}.md"] = write_page(experiment, Path(folder))
        found |= {f"experiments/{file.name}": file.read_bytes() for file in Path(folder).iterdir()}
    return found


def on_config(config: Any) -> Any:
    """Put the experiments into the navigation."""
    for section in config.nav:
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict) and "Experiments" in entry:
                    entry["Experiments"] = [{e.title: f"experiments/{name}.md"} for name, e in read_experiments().items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    from mkdocs.structure.files import File

    for place, content in experiments().items():
        files.append(File.generated(config, place, content=content))
    for source, place in PAGES.items():
        text = (ROOT / source).read_text()
        if source.endswith(".ipynb"):
            text, pictures = page_of(json.loads(text))
            for i, picture in enumerate(pictures):
                files.append(File.generated(config, place.replace(".md", f"_{i}.png"), content=picture))
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages; what the site does not have is only named."""
    place = page.file.src_uri
    homes = {new: old for old, new in (PAGES | TABLES).items()}
    home = posixpath.dirname(homes.get(place, f"docs/{place}"))
    if place == "command_line.md":
        markdown += options()

    def moved(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        name, hash_, anchor = target.partition("#")
        if not name or re.match(r"[a-z]+:", target) or (place.startswith(("experiments/", "notebooks/")) and picture):
            return match.group()
        path = posixpath.normpath(posixpath.join(home, name))
        new = PAGES.get(path) or TABLES.get(path) or path.removeprefix("docs/")
        if new == path:
            return text
        return f"{picture}[{text}]({posixpath.relpath(new, posixpath.dirname(place) or '.')}{hash_}{anchor})"

    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def options() -> str:
    """What ``--help`` says of every command."""
    parser = build_parser()
    lines = []
    for name, command in sorted(next(a for a in parser._actions if a.dest == "command").choices.items()):
        kinds = next((a.choices for a in command._actions if a.dest == "kind"), None) or {"": command}
        for kind, of in kinds.items():
            lines.append(f"\n## {name} {kind}".rstrip() + f"\n\n```text\n{of.format_help()}```\n")
    return "\n".join(lines)
