"""What the documents point to, and how long their sentences are. ``make docs`` runs this alone."""

import re
from types import SimpleNamespace

import pytest
from conftest import ROOT

from monai_morse.__main__ import build_parser
from tools import site
from tools.experiments import read_experiments

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


MANUAL = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PROSE = [*MANUAL, *sorted(ROOT.glob("bundles/*/docs/README.md"))]
LONGEST, USUAL = 35, 25  # words


def sentences(text):
    """A document's sentences outside code, tables, headings and pictures; a link counts by its text, code as one word."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if re.match(r" {4,}(?![-*] )\S", block):
            continue
        lines = [line.strip() for line in block.splitlines() if not re.match(r"\s*(\||#|:::|!\[|<)", line)]
        plain = re.sub(r"\[((?:[^]\[]|\[[^]]*\])*)\]\([^)]*\)", r"\1", " ".join(lines))
        yield from re.split(r"(?<=[.!?])[)*_]*\s+", re.sub(r"`[^`]*`", "code", plain))


def words(sentence):
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_is_long(path):
    assert [f"{words(s)} words: {s}" for s in sentences(path.read_text()) if words(s) > LONGEST] == []


def test_most_sentences_are_short():
    all_of_them = [s for path in PROSE for s in sentences(path.read_text()) if words(s)]
    long = [f"{words(s)} words: {s}" for s in all_of_them if words(s) > USUAL]
    assert len(long) < len(all_of_them) / 10, "\n".join(long)


def test_the_notes_of_experiments_are_held_to_the_same():
    texts = [text for e in read_experiments().values() for text in (e.question, e.setting, e.note)]
    assert [s for text in texts for s in sentences(text) if words(s) > LONGEST] == []


def test_long_sentences_are_found():
    code, heading, cells = f"    {'code ' * 40}", f"# {'heading ' * 40}", f"| {'cell ' * 40}|"
    page = f"{heading}\n\n{code}\n\n{cells}\n\nTwo words. And {'more ' * 40}[here and](there.md) `a b c`.\n"
    assert [words(s) for s in sentences(page) if words(s)] == [2, 44]


def test_the_site_has_every_document_in_its_navigation():
    """MkDocs says so, too, in ``make docs``."""
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert [p.name for p in MANUAL[1:] if str(p.relative_to(ROOT / "docs")) not in navigation] == []


@pytest.mark.parametrize(
    "place, link, moved",
    [
        ("results.md", "[runs](../results/slices_1mm.csv.gz)", "[runs](experiments/slices_1mm.md)"),
        ("experiments/slices_2mm_folds.md", "[fold 0](slices_2mm.csv.gz)", "[fold 0](slices_2mm.md)"),
        ("index.md", "[the `cost`](docs/cost.md#on-a-gpu)", "[the `cost`](cost.md#on-a-gpu)"),
        ("index.md", "![a](docs/figures/overview.png)", "![a](figures/overview.png)"),
        ("choose.md", "[it](../bundles/synapse_ct_morse/docs/README.md#data)", "[it](bundles/synapse_ct_morse.md#data)"),
        ("bundles/synapse_ct_morse.md", "[c](../../../docs/cost.md)", "[c](../cost.md)"),
        ("cost_details.md", "[`a tool`](../tools/literal.py)", "`a tool`"),
        ("paper.md", "[far](https://doi.org/10.1) [own](#top)", "[far](https://doi.org/10.1) [own](#top)"),
        ("paper.md", "```\n[code](no.md)\n```", "```\n[code](no.md)\n```"),
    ],
)
def test_the_site_follows_links_as_github_does(place, link, moved):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=place))
    assert site.on_page_markdown(f"{link}\n", page) == f"{moved}\n"


def test_the_command_line_page_has_every_command():
    page = (ROOT / "docs" / "command_line.md").read_text()
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    assert [name for name in commands if f"| `{name}` |" not in page] == []
    assert [name for name in commands if f"usage: monai-morse {name}" not in site.options()] == []


def test_pages_are_as_short_as_they_are_meant():
    limits = {"README.md": 140, "docs/quickstart.md": 80, "docs/choose.md": 60, "docs/results.md": 150, "docs/cost.md": 80}
    assert [name for name, lines in limits.items() if (ROOT / name).read_text().count("\n") > lines] == []
