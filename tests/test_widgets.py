"""The explorers in a real browser: JupyterLab, its menu, a slider moved by keyboard, and what changes on the screen.

Needs JupyterLab, playwright, and a Chromium on the path (Debian: apt-get install --no-install-recommends chromium
fonts-dejavu-core); without them the tests are skipped.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

MOVE = 5.0  # seconds from the key to the new caption, at most: some tenths as a rule, more on a busy machine
CELLS = 'from mri_unlearn.show.sliders import explore_undersampling', 'explore_undersampling()'


def chromium():
    "Path of a Chromium, or the tests are skipped"
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not found:
        pytest.skip('no chromium on the path: apt-get install --no-install-recommends chromium fonts-dejavu-core')
    return found


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def write_notebook(path, cells):
    "A notebook that names its kernel: without that, Lab asks for one and waits"
    nb = new_notebook(cells=[new_code_cell(source) for source in cells])
    nb.metadata['kernelspec'] = {'name': 'python3', 'language': 'python', 'display_name': 'python3'}
    nbformat.write(nb, path)


def surroundings(home):
    "Everything that Jupyter, IPython, matplotlib and the browser read and write lies below `home`"
    places = {
        name: str(home / name.lower())
        for name in 'JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR IPYTHONDIR MPLCONFIGDIR'.split()
    }
    places |= dict(HOME=str(home), XDG_CONFIG_HOME=str(home / 'config'), XDG_CACHE_HOME=str(home / 'cache'))
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return os.environ | places | dict(PYTHONPATH=paths, OMP_NUM_THREADS='1')


def stop(process):
    "End a server and its kernels, which share its group"
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
    process.wait(timeout=5)


@contextmanager
def lab(folder, home):
    "Address of a JupyterLab that serves `folder` on this machine only, and is gone afterwards"
    port = free_port()
    options = dict(ip='127.0.0.1', port=port, port_retries=0, open_browser=False, allow_root=True, root_dir=folder)
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--expose-app-in-browser']
    command += [f'--ServerApp.{name}={value}' for name, value in options.items()]
    command += [
        '--IdentityProvider.token=',
        '--ServerApp.password=',
        '--LabApp.news_url=None',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
    ]
    with open(home / 'log', 'wb') as log:
        process = subprocess.Popen(
            command, cwd=folder, env=surroundings(home), stdout=log, stderr=log, start_new_session=True
        )
    try:
        address = f'http://127.0.0.1:{port}/lab'
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (home / 'log').read_text()[-2000:]
                time.sleep(0.25)
        else:
            pytest.fail((home / 'log').read_text()[-2000:])
        yield address
    finally:
        stop(process)


@contextmanager
def page(address, home, size=(1400, 1200)):
    "A page of a headless browser that shows a notebook; the browser is gone afterwards"
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install playwright')
    with api.sync_playwright() as p:
        about = dict(executable_path=chromium(), env=surroundings(home), args=['--no-sandbox', '--disable-gpu'])
        browser = p.chromium.launch(**about)
        try:
            tab = browser.new_page(viewport=dict(width=size[0], height=size[1]))
            tab.set_default_timeout(120_000)  # a busy machine
            tab.goto(address)
            yield tab
        finally:
            browser.close()


def run_all_cells(tab):
    tab.get_by_text('| Idle').wait_for()  # what is asked of a kernel that is still starting is lost
    tab.get_by_role('menuitem', name='Run', exact=True).click()
    tab.get_by_role('menuitem', name='Run All Cells', exact=True).click()


def wait_for_change(read, before, most=MOVE):
    "Seconds until `read()` gives something else than `before`"
    start = time.perf_counter()
    while read() == before:
        if time.perf_counter() - start > most:
            pytest.fail(f'nothing has changed for {most} s: {before}')
        time.sleep(0.01)
    return time.perf_counter() - start


def test_a_slider_moves_caption_and_picture_in_a_browser(tmp_path):
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed: pip install jupyterlab')
    pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install playwright')
    chromium()
    folder, home = tmp_path / 'notebooks', tmp_path / 'home'
    folder.mkdir(), home.mkdir()
    write_notebook(folder / 'sliders.ipynb', CELLS)
    with lab(folder, home) as address, page(f'{address}/tree/sliders.ipynb', home) as tab:
        caption, picture = tab.get_by_role('status').filter(has_text='asked for R'), tab.locator('img.widget-image')
        tab.locator('.jp-Notebook .jp-Cell').first.wait_for()
        run_all_cells(tab)
        picture.wait_for()
        slider = tab.get_by_role('slider').first
        said, shown = caption.inner_text(), picture.get_attribute('src')
        assert 'asked for R = 4,' in said
        slider.focus()
        slider.press('ArrowRight')
        took = wait_for_change(caption.inner_text, said)
        assert 'asked for R = 5,' in caption.inner_text()
        wait_for_change(lambda: picture.get_attribute('src'), shown)
        print(f'a move took {1000 * took:.0f} ms')
        said = caption.inner_text()
        slider.press('Home')  # R = 1: every line is measured
        wait_for_change(caption.inner_text, said)
        assert '128 of 128 lines' in caption.inner_text()
    with pytest.raises(OSError):  # nothing is left running
        urllib.request.urlopen(address, timeout=2)
