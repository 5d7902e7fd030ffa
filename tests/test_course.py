"""What makes a folder of notebooks a course: openings, predictions, pictures, lengths, and ways that lead on."""

import re

import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_notebooks import CHAPTERS, NBS, read

from conftest import ROOT

OPENING = (
    r'\*\*Question\.\*\* [^\n]+\?\n+'
    r'\*\*You will learn\*\* [^\n]+\.\n+'
    r'\*\*(\d+) minutes\.\*\* (Course|Reference|Tutorial): [^\n]+\.$'
)
PREDICT = r'(?:^|\n\n)\*\*Predict, then run\.\*\* .+\?'
FOLDED = r'<details>\s*<summary>{}</summary>\n\n.+?\n\n</details>'
NEXT = r'\]\((?:\.\./)?(?:tutorials/)?[\w.]+\.ipynb'
WORDS = 250  # in a Markdown cell
TUTORIALS = [p for p in NBS if p.parent.name == 'tutorials']
LOOKED_UP = {'results.ipynb', 'trials.ipynb', 'glossary.ipynb'}  # tables to look things up in: nothing to predict


def opening(nb):
    "The match of the three lines with which a chapter opens, or None"
    for cell in nb.cells[1:4]:
        if cell.cell_type == 'markdown':
            return re.match(OPENING, cell.source.strip())
    return None


def wrong_prediction(nb):
    "A question, the cell that answers it, and the answer in words, folded"
    cells = [cell for cell in nb.cells if not re.match(r'#\|\s*hide', cell.source)]
    found = False
    for asked, run, answer in zip(cells, cells[1:], cells[2:]):
        if re.search(PREDICT, asked.source, flags=re.S):
            if run.cell_type != 'code' or not re.search(FOLDED.format('Answer'), answer.source, flags=re.S):
                return [f'a prediction without code and a folded answer after it: {asked.source[:60]}']
            found = True
    return [] if found else ['nothing to predict']


def has_picture(nb):
    drawn = any('image/png' in out.get('data', {}) for cell in nb.cells for out in cell.get('outputs', []))
    said = any(
        re.search(r'!\[|\*\*No picture:\*\* \w', cell.source) for cell in nb.cells if cell.cell_type == 'markdown'
    )
    return drawn or said


def wrong_course(nb):
    "What keeps a notebook from being a chapter of a course"
    prose = [cell.source for cell in nb.cells if cell.cell_type == 'markdown']
    found = [f'{len(p.split())} words: {p[:50]}' for p in prose if len(p.split()) > WORDS]
    if not opening(nb):
        found.append('no three lines of opening: question, what is learnt, minutes and kind')
    if not has_picture(nb):
        found.append('neither a picture nor a reason why not')
    if not re.search(NEXT, prose[-1]):
        found.append('the last words lead nowhere')
    return found


@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_course(path):
    nb = read(path)
    if path.name == 'index.ipynb':  # the README: it opens otherwise
        assert [c for c in nb.cells if c.cell_type == 'markdown' and len(c.source.split()) > WORDS] == []
        return
    assert wrong_course(nb) + ([] if path.name in LOOKED_UP else wrong_prediction(nb)) == []


@pytest.mark.parametrize('path', [p for p in TUTORIALS if p.name not in LOOKED_UP], ids=lambda p: p.stem)
def test_tutorial_has_an_exercise_and_about_as_much_prose_as_code(path):
    nb = read(path)
    text = '\n'.join(cell.source for cell in nb.cells if cell.cell_type == 'markdown')
    assert path.name == 'quickstart.ipynb' or (
        '**Exercise.**' in text and re.search(FOLDED.format('Solution'), text, flags=re.S)
    )
    kinds = [cell.cell_type for cell in nb.cells if not re.match(r'#\|\s*hide', cell.source)]
    assert 0.5 <= kinds.count('markdown') / kinds.count('code') <= 2


def test_the_sidebar_has_every_notebook_once_and_reference_apart():
    sidebar = yaml.safe_load((ROOT / 'nbs' / 'sidebar.yml').read_text(encoding='utf-8'))
    first, *sections = sidebar['website']['sidebar']['contents']
    listed = {s['section']: s['contents'] for s in sections}
    assert sorted([first, *sum(listed.values(), [])]) == sorted(str(p.relative_to('nbs')) for p in NBS)
    kinds = {p.name: m[2] for p in CHAPTERS if (m := opening(read(p)))}
    assert set(listed['Reference']) == {name for name, kind in kinds.items() if kind == 'Reference'}


def test_these_checks_notice_what_is_wrong():
    three = (
        '**Question.** Why?\n\n**You will learn** how it is done.\n\n'
        '**5 minutes.** Course: the tests of odd cases may be skipped.'
    )
    predict = '**Predict, then run.** Is two more than one?'
    answer = '<details><summary>Answer</summary>\n\nIt is.\n\n</details>'
    png = new_output('display_data', data={'image/png': 'abc'})
    good = [
        new_markdown_cell('# A\n\n> b'),
        new_markdown_cell(three),
        new_markdown_cell(predict),
        new_code_cell('2 > 1', outputs=[png]),
        new_markdown_cell(answer),
        new_markdown_cell('Next: [masks](05_signal.masks.ipynb).'),
    ]
    nb = new_notebook(cells=good)
    assert wrong_course(nb) + wrong_prediction(nb) == []
    for i, instead in ((1, '**Question.** Why?'), (5, 'The end.'), (4, 'word ' * 251)):
        cells = [*good[:i], new_markdown_cell(instead), *good[i + 1 :]]
        assert wrong_course(new_notebook(cells=cells)), instead
    assert wrong_course(new_notebook(cells=[*good[:3], new_code_cell('2 > 1'), *good[4:]]))
    assert wrong_prediction(new_notebook(cells=good[:4] + good[5:]))
    assert wrong_prediction(new_notebook(cells=good[:2] + good[5:]))
