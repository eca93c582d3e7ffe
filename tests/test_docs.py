"""What the documents point to: files and headings. ``make docs`` runs this alone."""

import re

import pytest
from conftest import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/*/docs/*.md")]
LINK = re.compile(r"""\]\(<?([^)\s>]+)|<(?:img|source|a)\b[^>]*?(?:src|srcset|href)=["']([^"'\s]+)""")
CODE = re.compile(r"^(```|~~~).*?^\1|^ {4,}\S.*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(path):
    """The names that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ +(.+?) *#*$", re.sub(r"^(```|~~~).*?^\1", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h).lower()).replace(" ", "-") for h in headings}


def dead_links(path):
    """Relative links of a document that lead to no file or to no heading of one."""
    targets = ["".join(found) for found in LINK.findall(CODE.sub("", path.read_text()))]
    dead = []
    for target in targets:
        if re.match(r"[a-z]+:", target):  # another host's
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A heading, `quoted`\n")
    (tmp_path / "page.md").write_text(
        "[good](other.md#a-heading-quoted) [gone](no.md) [no heading](other.md#b) ![picture](no.png) `[code](no.md)`\n"
        '```\n[code](no.md)\n```\n<img src="none.svg"> [far](https://doi.org/10.1) [own](#top)\n'
    )
    assert dead_links(tmp_path / "page.md") == ["no.md", "other.md#b", "no.png", "none.svg", "#top"]
