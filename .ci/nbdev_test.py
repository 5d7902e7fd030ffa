"""nbdev_test that also compares: a notebook passes if it runs, and if what it prints is what stands in its file.

    python .ci/nbdev_test.py [options of nbdev_test]

Compared is text: what cells print, and the text of tables that they show; pictures are not. Seconds, sizes in memory,
paths, addresses and versions are masked, for they differ from machine to machine. Numbers with a decimal point may
differ by a twentieth, for training carries the rounding of a processor into the digits; all else must be the same.
Each notebook has a process of its own: what one registers, the next one does not see.

A tutorial that takes minutes sets its sizes twice: for a short form, and in a cell with `#| slow`, which nbdev_test
leaves out, for the form that is kept. What follows such a cell is run and not compared.
"""

import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nbdev.test
from execnb.shell import CaptureShell

MASKS = [
    (re.compile(r'\x1b\[[0-9;]*m'), ''),
    (re.compile(r'(?<![\w.])(?:/[\w.+-]+){2,}'), 'PATH'),
    (re.compile(r'\b0x[0-9a-f]{6,}\b'), 'ADDRESS'),
    (re.compile(r'\b(person|scan|study|place)-[0-9a-f]{6,16}\b'), r'\1-PSEUDONYM'),
    (re.compile(r'\b(?=[a-f]*\d)[0-9a-f]{16}\b'), 'DIGEST'),
    (re.compile(r'\b\d+(\.\d+)? ?(s|ms|µs|seconds?|min|h|GiB|MiB|GB|MB|kB)\b(?![\w/])'), r'TIME-OR-SIZE'),
    (re.compile(r'\b\d+\.\d+\.\d+[\w.+]*'), 'VERSION'),
    (re.compile(r'[ \t]+'), ' '),
    (re.compile(r'-{3,}'), '---'),
]
NUMBER = re.compile(r'[-+−]?\d+\.\d*(?:e[-+]?\d+)?')
PRELOADED = (
    'torch sklearn.model_selection plum fastprogress.fastprogress matplotlib.figure pandas scipy.optimize h5py'.split()
)
# not fastai itself: its import changes how tables are shown, which is then as in the notebook that imports it
NEAR, SMALL = 0.05, 0.02  # relative and absolute difference of numbers that counts as none


def plain(html):
    "The words of an HTML table, a cell a line"
    return re.sub(r'<style.*?</style>|<[^>]*>', '\n', html, flags=re.S)


def text_of(cell):
    """What a cell printed, then what it showed, as text; without what it drew, and without what it wrote to stderr.

    Printed first, for Jupyter keeps the order of the two and nbdev's shell does not.
    """
    printed, showed = [], []
    for out in cell.get('outputs', []):
        data = {kind: ''.join(value) for kind, value in out.get('data', {}).items() if kind.startswith('text/')}
        drawn = any(kind.startswith('image/') for kind in out.get('data', {}))
        if drawn or data.get('text/plain', '').startswith('<Figure') or out.get('name') == 'stderr':
            continue
        shown = (
            plain(data['text/html']) if 'text/html' in data else data.get('text/markdown', data.get('text/plain', ''))
        )
        text = ''.join(out.get('text', ''))
        (printed if text else showed).append(text or shown)
    return '\n'.join(p.strip('\n') for p in printed + showed if p.strip())


def masked(text):
    "`text` without what differs between machines, line by line"
    for pattern, by in MASKS:
        text = pattern.sub(by, text)
    return [line.strip() for line in text.split('\n') if line.strip()]


def same_line(a, b):
    "Whether two masked lines say the same, numbers with a decimal point within their tolerance"
    if a == b:
        return True
    if NUMBER.sub('#', a) != NUMBER.sub('#', b):
        return False
    pairs = zip(*([float(n.replace('−', '-')) for n in NUMBER.findall(t)] for t in (a, b)))
    return all(abs(x - y) <= SMALL + NEAR * max(abs(x), abs(y)) for x, y in pairs)


def difference(kept, printed):
    "The first line in which two texts differ, as 'kept → printed'; empty where they are the same"
    kept, printed = masked(kept), masked(printed)
    for a, b in zip(kept, printed):
        if not same_line(a, b):
            return f'{a!r} → {b!r}'
    if len(kept) != len(printed):
        more = (kept + printed)[min(len(kept), len(printed))] if len(kept) > len(printed) else printed[len(kept)]
        return f'{len(kept)} lines → {len(printed)} lines, from {more!r} on'
    return ''


run_notebook, run_all = nbdev.test.test_nb, CaptureShell.run_all


def run_and_keep(shell, nb, *args, **kwargs):
    "`CaptureShell.run_all`, which notes what stood in the cells before"
    shell.before = [(cell, text_of(cell)) for cell in nb.cells if cell.cell_type == 'code']
    run_and_keep.last = shell
    return run_all(shell, nb, *args, **kwargs)


def test_nb(fn, **kwargs):
    "nbdev's `test_nb`, then the comparison"
    CaptureShell.run_all, run_and_keep.last = run_and_keep, None
    passed, seconds = run_notebook(fn, **kwargs)
    if not passed or run_and_keep.last is None:
        return passed, seconds
    skipped = re.compile(r'^#\|\s*(eval:\s*false|export)', re.M)
    for cell, kept in run_and_keep.last.before:
        if 'slow' in (getattr(cell, 'directives_', None) or {}):
            break  # the rest of the notebook is kept as it came out of the long form, and ran in the short one
        if skipped.search(cell.source) or 'nbdev_export(' in cell.source:
            continue
        found = difference(kept, text_of(cell))
        if found:
            first = next(line for line in cell.source.split('\n') if line.strip() and not line.startswith('#|'))
            where = f'{fn.name}: cell {cell.get("id", "")} ({first[:60]!r})'
            sys.stderr.write(f'{where} prints something else than is kept in the notebook:\n    {found}\n')
            sys.stderr.write('    execute the notebook, look at what has changed, and save it\n')
            passed = False
    return passed, seconds


def as_usual():
    "In a notebook, processes are started as the system does it, not as this one was"
    multiprocessing.set_start_method(None, force=True)


def one_process_each(function, items, n_workers, pause=0, **kwargs):
    """fastcore's `parallel` as nbdev calls it, with a new process for every item.

    Each is forked from one that has loaded the libraries and nothing of this package: that saves seconds a notebook.
    """
    call = partial(function, **kwargs)
    if n_workers < 1:
        return [call(item) for item in items]
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(n_workers, context, as_usual, max_tasks_per_child=1) as pool:
        return list(pool.map(call, items[::-1]))[::-1]  # the last ones, tutorials, take longest: they begin


if __name__ == '__main__':
    # by its own name, for a notebook that is executed in a worker takes the name `__main__`
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import nbdev_test as by_name

    nbdev.test.test_nb, nbdev.test.parallel = by_name.test_nb, by_name.one_process_each
    nbdev.test.nbdev_test()
