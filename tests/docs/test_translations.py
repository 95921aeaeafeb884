"""Each Chinese page has the headings, options, figures, code and links of its English page, section by section."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.docs_hooks import FENCE, anchor

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: Chinese page → its English page. On the site docs/index.zh.md includes README.zh-CN.md.
PAGES = {
    ROOT / "README.zh-CN.md": ROOT / "README.md",
    **{page: page.with_name(page.name.replace(".zh.md", ".md")) for page in sorted(DOCS.rglob("*.zh.md"))},
}
TRANSLATIONS = {english: chinese for chinese, english in PAGES.items()}
#: A comment of a shell, YAML or text block: all that may differ between the code of two pages.
COMMENT = re.compile(r"(^|\s)# .*$", re.MULTILINE)
#: The mark of a block of code that a test executes.
RUN = re.compile(r"<!-- run -->")
HEADING = re.compile(r"^(#+) (.+)$")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)|<(https?:[^>]+)>")
CODE = re.compile(r"`[^`\n]+`")
FIGURE = re.compile(r"\d[\d.,]*\d|\d")
#: A Chinese character or full-width punctuation.
CHINESE = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
#: One Chinese word per concept: other words for the same → the word that these pages use.
WORDS = {r"接收(?:方|者|器)|接受端": "接收端", r"规划(?:器|者)|计划器|调度器": "planner", r"(?<!播)种源|源实例": "种子"}
#: English words that a sentence may have in a row before it counts as not translated.
LONGEST_ENGLISH = 8

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass
class Section:
    """A heading with the text below it, up to the next heading: prose apart from its blocks of code."""

    level: int
    heading: str
    prose: str
    code: list[str]

    @property
    def rows(self) -> list[str]:
        """The rows of its tables."""
        return [line for line in self.prose.splitlines() if line.lstrip().startswith("|")]


def sections(page: Path) -> list[Section]:
    found = [Section(0, "", "", [])]
    for number, part in enumerate(FENCE.split(page.read_text(encoding="utf-8"))):
        if number % 2:
            found[-1].code.append(part)
            continue
        for line in part.splitlines():
            if heading := HEADING.match(line):
                found.append(Section(len(heading[1]), heading[2], "", []))
            found[-1].prose += line + "\n"
    return found


def pairs(page: Path) -> Iterator[tuple[Section, Section]]:
    """The sections of the English page, each with its translation."""
    yield from zip(sections(PAGES[page]), sections(page), strict=True)


def names(text: str) -> list[str]:
    """Code in a text: options, variables, commands, log lines."""
    return sorted({" ".join(name.split()) for name in CODE.findall(" ".join(text.split()))})


def figures(text: str) -> list[str]:
    """Numbers outside code and outside the targets of links."""
    return sorted(FIGURE.findall(CODE.sub("", LINK.sub("]", text))))


@each_page
def test_each_heading_has_its_level_and_place(page: Path) -> None:
    assert PAGES[page].exists(), "a translation of a page that is gone"
    assert [part.level for part in sections(page)] == [part.level for part in sections(PAGES[page])]


@each_page
def test_code_is_equal_but_for_comments(page: Path) -> None:
    for english, chinese in pairs(page):
        assert [COMMENT.sub(r"\1#", code) for code in chinese.code] == [
            COMMENT.sub(r"\1#", code) for code in english.code
        ], english.heading
        assert RUN.findall(chinese.prose) == RUN.findall(english.prose), english.heading


@each_page
def test_options_and_log_lines_stay_english(page: Path) -> None:
    for english, chinese in pairs(page):
        assert names(chinese.prose) == names(english.prose), english.heading


@each_page
def test_rows_have_the_same_names_and_figures_in_the_same_order(page: Path) -> None:
    for english, chinese in pairs(page):
        assert len(chinese.rows) == len(english.rows), english.heading
        for row, translated in zip(english.rows, chinese.rows, strict=True):
            assert [names(cell) for cell in cells(translated)] == [names(cell) for cell in cells(row)], row
            assert [figures(cell) for cell in cells(translated)] == [figures(cell) for cell in cells(row)], row


def cells(row: str) -> list[str]:
    return row.strip().strip("|").split(" | ")


@each_page
def test_figures_are_equal(page: Path) -> None:
    for english, chinese in pairs(page):
        assert figures(chinese.prose) == figures(english.prose), english.heading


@each_page
def test_links_lead_to_the_same_place_in_chinese_where_there_is_one(page: Path) -> None:
    for english, chinese in pairs(page):
        expected = sorted(in_chinese(*link.groups(""), PAGES[page], page) for link in LINK.finditer(english.prose))
        assert sorted(link[1] + link[2] if not link[3] else link[3] for link in filled(chinese)) == expected, (
            english.heading
        )


def filled(section: Section) -> list[tuple[str, str, str, str]]:
    return [(link[0], *link.groups("")) for link in LINK.finditer(section.prose)]  # type: ignore[misc]


def in_chinese(target: str, place: str, address: str, english: Path, chinese: Path) -> str:
    """A link of an English page as its translation has it: to a translation, and to the heading in the same place."""
    if address or target.startswith("http"):
        return address or target + place
    there = Path(os.path.normpath(english.parent / target)) if target else english
    if there == chinese:
        return os.path.relpath(english, chinese.parent)  # the link between the two languages
    if there not in TRANSLATIONS:
        return target + place
    translation = TRANSLATIONS[there]
    if place:
        headings = zip(sections(there), sections(translation), strict=True)
        place = "#" + {anchor(each.heading): anchor(other.heading) for each, other in headings}[place[1:]]
    return (os.path.relpath(translation, chinese.parent) if target else "") + place


@each_page
def test_every_paragraph_is_translated(page: Path) -> None:
    for part in sections(page):
        assert not part.heading or part.level == 1 or not english_words(part.heading), part.heading
        for sentence in re.split(r"\n\s*\n|\n(?=\s*(?:[-|]|\d+\.) )| \| |[\u3002\uff1b\uff1a]", part.prose):
            assert not english_words(sentence), sentence


def english_words(text: str) -> bool:
    """Whether a text is English prose: many Latin words outside code, without a Chinese character."""
    text = LINK.sub("]", CODE.sub("", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)))
    words = re.findall(r"[A-Za-z]{2,}", text)
    return len(words) > LONGEST_ENGLISH and not re.search(r"[\u4e00-\u9fff]", text)


@each_page
def test_github_shows_bold_text(page: Path) -> None:
    """It shows the asterisks instead if punctuation is before the last ones and a Chinese character after them."""
    text = "".join(FENCE.split(page.read_text(encoding="utf-8"))[::2])
    bold = re.findall(r"\*\*([^*]+)\*\*(.?)", CODE.sub("`", text))
    assert [words for words, after in bold if re.search(r"\W$", words) and re.match(r"\w", after)] == []


@each_page
def test_no_line_breaks_between_chinese_characters(page: Path) -> None:
    """Browsers show a line break as a space, which does not belong there."""
    text = "".join(FENCE.split(page.read_text(encoding="utf-8"))[::2])
    assert re.findall(rf".*{CHINESE}\n *{CHINESE}.*", text) == []


@each_page
def test_a_concept_has_one_word(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert {word: found for word, better in WORDS.items() if (found := re.findall(word, text))} == {}


def test_the_pages_of_a_first_start_are_translated() -> None:
    starts = {page for page in (DOCS / "quick-start").glob("*.md") if not page.name.endswith(".zh.md")}
    needed = {ROOT / "README.md", *starts, *(DOCS / f"{name}.md" for name in ("ascend", "options", "troubleshooting"))}
    assert needed - set(TRANSLATIONS) == set()


def test_a_reader_finds_the_other_language() -> None:
    for page, other in (("README.md", "README.zh-CN.md"), ("README.zh-CN.md", "README.md")):
        assert f"]({other})" in (ROOT / page).read_text(encoding="utf-8").split("\n## ")[0]
