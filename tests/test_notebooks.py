"""Notebooks and modules say the same, and every notebook keeps the rules that make it readable."""

import ast
import filecmp
import importlib.util
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NBS = sorted(p.relative_to(ROOT) for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CHAPTERS = [p for p in NBS if re.match(r'\d\d[a-z]?_', p.name)]  # letters, as in fastai, where a number was taken
MODULES = {p.stem.partition('_')[2]: p.stem.partition('_')[0] for p in CHAPTERS}  # module -> number
# the floors of the house, from the ground up; the parts on one floor do not know each other
FLOORS = [
    {'signal', 'machinery'},
    {'data'},
    {'network', 'phantom'},
    {'unlearn', 'verdict'},
    {'show'},
    {'experiment'},
    {'audit'},
    {'command'},
    {'cli'},
    {'all'},
]
FLOOR = {part: i for i, parts in enumerate(FLOORS) for part in parts}
LARGEST = 300_000  # bytes of a notebook with its figures
LONGEST = 40  # lines of an exported cell, blank ones not counted


def module_of(path):
    "The module that a chapter exports"
    return path.stem.partition('_')[2]


def read(path):
    return nbformat.read(ROOT / path, as_version=4)


def nbdev(command, cwd):
    "Run one of nbdev's commands in `cwd`"
    code = f'from nbdev import cli, clean, doclinks; import sys; sys.argv = ["{command}"]; '
    code += {'nbdev_export': 'doclinks.nbdev_export()', 'nbdev_clean': 'clean.nbdev_clean()'}[command]
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def differences(folder, copy):
    "Names of the files that differ between the project's `folder` and that of the copy"

    def names(root):
        return {
            p.relative_to(root)
            for p in root.rglob('*')
            if p.is_file() and p.suffix in ('.py', '.ipynb') and '__pycache__' not in p.parts
        }

    both = sorted(names(ROOT / folder) | names(copy / folder))
    return [
        str(n)
        for n in both
        if not (ROOT / folder / n).exists()
        or not (copy / folder / n).exists()
        or not filecmp.cmp(ROOT / folder / n, copy / folder / n, shallow=False)
    ]


def test_modules_are_exported_from_the_notebooks(project):
    for module in (project / 'mri_unlearn').rglob('*.py'):
        if module.name != '__init__.py':
            module.unlink()  # a module without a notebook does not come back
    nbdev('nbdev_export', project)
    assert differences('mri_unlearn', project) == []


def test_notebooks_are_clean(project):
    nbdev('nbdev_clean', project)
    assert differences('nbs', project) == []


def test_these_two_notice_a_change(project):
    path = project / CHAPTERS[0]
    nb = nbformat.read(path, as_version=4)
    nb.metadata['widgets'] = {}
    nb.cells[-1].metadata['scrolled'] = True
    nb.cells.append(new_code_cell('#| export\ndef one_more(): return 1'))
    nbformat.write(nb, path)
    nbdev('nbdev_export', project)
    assert f'{module_of(CHAPTERS[0]).replace(".", "/")}.py' in differences('mri_unlearn', project)
    before = path.read_bytes()
    nbdev('nbdev_clean', project)
    assert path.read_bytes() != before


# Each check takes a notebook and returns what is wrong with it, so that it can be tried on notebooks that are wrong.


def imported(source):
    "Modules of this package that a cell imports, as 'part.module'"
    source = re.sub(r'^[ \t]*[%!].*$', '', source, flags=re.M)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f'mri_unlearn.{node.module or a.name}' for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f'{node.module}.{a.name}' for a in node.names]
        else:
            continue
        yield from {n.partition('.')[2] for n in names if n.startswith('mri_unlearn.')} & set(MODULES)


def code_cells(nb, exported=False):
    return [
        c.source for c in nb.cells if c.cell_type == 'code' and (not exported or re.match(r'#\|\s*export', c.source))
    ]


def wrong_order(nb, number):
    "Imports of a chapter that comes later"
    return [m for source in code_cells(nb) for m in imported(source) if MODULES[m] > number]


def wrong_floor(nb, part):
    "What a module imports from a part on its own floor or above"
    parts = {m: m.split('.')[0] for source in code_cells(nb, exported=True) for m in imported(source)}
    return [m for m, other in parts.items() if other != part and FLOOR[other] >= FLOOR[part]]


def wrong_opening(nb):
    "The first cell is a title and a one-sentence summary, the next one names the module"
    first, second = (c.source.strip() for c in nb.cells[:2])
    found = []
    if nb.cells[0].cell_type != 'markdown' or not re.match(r'# \S.*\n+> \S[^\n]+$', first):
        found.append('no `# Title` and `> summary` alone in the first cell')
    if not re.match(r'#\|\s*default_exp [\w.]+$', second):
        found.append('no `#| default_exp` in the second cell')
    return found


def wrong_end(nb):
    "The last cell exports, out of sight"
    last = nb.cells[-1].source
    return (
        []
        if re.match(r'#\|\s*hide', last) and 'nbdev_export()' in last
        else ['the last cell is not a hidden nbdev_export()']
    )


def wrong_cells(nb):
    "Exported cells that no reader takes in at one look"
    cells = [[line for line in source.split('\n') if line.strip()] for source in code_cells(nb, exported=True)]
    return [f'{len(lines)} lines: {lines[1]}' for lines in cells if len(lines) > LONGEST]


WIDGET = 'application/vnd.jupyter.widget-view+json'
FORBIDDEN = {
    'a path of some machine': r'(?<![\w.<:/])/(?:[\w.-]+/)+[\w.-]+|\b[A-Z]:\\+\w',
    'the address of an object': r'\b0x[0-9a-f]{6,}',
    'a warning': r'\b\w*Warning:',
    'a progress bar': r'\d(?:it/s|s/it)\b|█',
    'a traceback': r'Traceback \(most recent call last\)',
}


def wrong_outputs(nb):
    "What must not stand in an output that others read"
    found = []
    for i, cell in enumerate(nb.cells):
        for out in cell.get('outputs', []):
            if out.get('name') == 'stderr' or out.output_type == 'error':
                found.append(f'cell {i}: {out.get("name", "an error")}')
            if WIDGET in out.get('data', {}) and not nb.metadata.get('widgets'):
                found.append(f'cell {i}: a widget without its state: whoever reads the notebook sees nothing')
            shown = {**out.get('data', {}), 'text': out.get('text', '')}
            text = ''.join(str(v) for k, v in shown.items() if not k.startswith('image/'))
            found += [
                f'cell {i}: {what}: {m[0]}' for what, pattern in FORBIDDEN.items() for m in re.finditer(pattern, text)
            ][:1]
    return found


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_chapter(path):
    nb = read(path)
    part = module_of(path).split('.')[0]
    assert [
        *wrong_opening(nb),
        *wrong_order(nb, MODULES[module_of(path)]),
        *wrong_floor(nb, part),
        *wrong_end(nb),
        *wrong_cells(nb),
    ] == []


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_summary_is_the_docstring(path):
    summary = re.search(r'^> (.+)$', read(path).cells[0].source, flags=re.M)[1]
    module = ROOT / 'mri_unlearn' / f'{module_of(path).replace(".", "/")}.py'
    assert ast.get_docstring(ast.parse(module.read_text(encoding='utf-8'))).strip() == summary.strip()


@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_outputs_and_size(path):
    assert wrong_outputs(read(path)) == []
    assert (ROOT / path).stat().st_size <= LARGEST


def test_the_checks_notice_what_is_wrong():
    def out(text, name='stdout'):
        return new_output('stream', name=name, text=text)

    bad = new_notebook(
        cells=[
            new_markdown_cell('## No title'),
            new_code_cell('import os'),
            new_code_cell(
                '%matplotlib inline\nfrom mri_unlearn.show.plots import plot_trace\nimport mri_unlearn.signal.kspace'
            ),
            new_code_cell('#| export\nfrom mri_unlearn.show import plots\n' + 'x = 1\n' * 60),
        ]
    )
    assert len(wrong_opening(bad)) == 2 and wrong_end(bad) and wrong_cells(bad)
    assert wrong_order(bad, '00') == ['show.plots'] * 2 and wrong_order(bad, '99') == []
    assert (
        wrong_floor(bad, 'verdict') == wrong_floor(bad, 'data') == ['show.plots']
        and wrong_floor(bad, 'experiment') == wrong_floor(bad, 'show') == []
    )
    texts = [
        'wrote /some/where/x.h5',
        r'wrote C:\\some\\where',
        '<Thing object at 0x7f12ab34cd>',
        'x.py:3: UserWarning: no',
        '5/10 [00:01, 3.2it/s]',
    ]
    for text in texts:
        assert wrong_outputs(new_notebook(cells=[new_code_cell('x', outputs=[out(text)])])), text
    assert wrong_outputs(new_notebook(cells=[new_code_cell('x', outputs=[out('fine', 'stderr')])]))
    widget = new_output('display_data', data={WIDGET: {'model_id': 'a'}, 'text/plain': 'Box()'})
    assert wrong_outputs(new_notebook(cells=[new_code_cell('x', outputs=[widget])]))
    fine = 'PSNR 31.2 dB, 0x4 grid, runs/a/b/c, see https://example.org/a/b, </td></tr>, 1/f/2'
    assert wrong_outputs(new_notebook(cells=[new_code_cell('x', outputs=[out(fine)])])) == []


def public_names(path):
    "Names that a chapter exports, functions, classes and constants"
    for source in code_cells(read(path), exported=True):
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def test_no_public_name_has_two_meanings():
    "`from mri_unlearn.all import *` brings each name once; the commands, which are not part of it, may repeat one"
    where = {}
    for path in CHAPTERS:
        if FLOOR[module_of(path).split('.')[0]] < FLOOR['command']:
            for name in set(public_names(path)):
                where.setdefault(name, []).append(path.stem)
    assert {n: p for n, p in where.items() if len(p) > 1 and not n.startswith('_')} == {}


def comparer():
    "`.ci/nbdev_test.py`, which compares what a notebook prints with what it keeps"
    spec = importlib.util.spec_from_file_location('nbdev_test_and_compare', ROOT / '.ci' / 'nbdev_test.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_printed_and_kept_are_compared():
    difference = comparer().difference
    same = [
        ('took 3.1 s in /a/b/run', 'took 12 s in /tmp/c/d'),
        ('psnr 30.12 dB', 'psnr 30.13 dB'),
        ('a  b\n\nc', 'a b\nc'),
        ('torch 2.6.0', 'torch 2.13.0'),
        ('gap −0.12', 'gap −0.13'),
    ]
    other = [
        ('psnr 30.12', 'psnr 35.1'),
        ('8 of 8', '7 of 8'),
        ('a\nb', 'a'),
        ('a', 'a\nb'),
        ('gap −0.30', 'gap +0.30'),
        ('x', 'y'),
    ]
    for a, b in same:
        assert difference(a, b) == '', (a, b)
    for a, b in other:
        assert difference(a, b), (a, b)
    assert 'planted' in difference('network  psnr', 'network  psnr  planted')


def test_a_notebook_that_prints_something_else_fails(tmp_path):
    nb = new_notebook(
        cells=[new_code_cell('print("three methods")', outputs=[new_output('stream', text='two methods\n')])]
    )
    nb.metadata['kernelspec'] = {'name': 'python3', 'language': 'python', 'display_name': 'python3'}
    (tmp_path / 'settings.ini').write_text((ROOT / 'settings.ini').read_text())
    (tmp_path / 'nbs').mkdir()
    script, path = ROOT / '.ci' / 'nbdev_test.py', tmp_path / 'nbs' / 'a.ipynb'
    run = [sys.executable, script, '--path', path]
    nbformat.write(nb, path)
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "'two methods' → 'three methods'" in done.stderr, done.stderr
    nb.cells[0].outputs[0].text = 'three methods\n'
    nbformat.write(nb, path)
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_after_a_slow_cell_nothing_is_compared(tmp_path):
    sizes, slow = new_code_cell('rounds = 1'), new_code_cell('#| slow\nrounds = 9')
    show = new_code_cell('print(rounds)', outputs=[new_output('stream', text='9\n')])
    (tmp_path / 'settings.ini').write_text((ROOT / 'settings.ini').read_text())
    (tmp_path / 'nbs').mkdir()
    script, path = ROOT / '.ci' / 'nbdev_test.py', tmp_path / 'nbs' / 'a.ipynb'
    for cells, passes in (([sizes, slow, show], True), ([sizes, show], False), ([sizes, show, slow], False)):
        nb = new_notebook(cells=cells)
        nb.metadata['kernelspec'] = {'name': 'python3', 'language': 'python', 'display_name': 'python3'}
        nbformat.write(nb, path)
        done = subprocess.run([sys.executable, script, '--path', path], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == passes, done.stderr
