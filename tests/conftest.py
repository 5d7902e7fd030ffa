"""What the tests share: where the project is, a copy of it that a test may change, and fastMRI to compare with."""

import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line(
        'markers',
        "wheel: builds the wheel and installs it into a second environment (minutes); leave out with -m 'not wheel'",
    )
    config.addinivalue_line(
        'markers',
        "parity: compares with fastMRI 0.3, which pip fetches if it is not installed; leave out with -m 'not parity'",
    )


# files that take longest: they begin, so that no worker is left alone with one at the end
LONG = 'reuse methods resume requests request_command identifiers package jobs any_network parity units'.split()


def pytest_collection_modifyitems(items):
    names = [f'test_{name}' for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def project_files():
    "Files of the project, relative to its root: what git tracks or would track; without git, all but what builds leave"
    git = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True
    )
    if git.returncode == 0:
        return [Path(f) for f in git.stdout.split('\0') if f and (ROOT / f).is_file()]
    skip = {'__pycache__', '.venv', 'build', 'dist', 'runs', 'data', '.ipynb_checkpoints'}
    files = (p.relative_to(ROOT) for p in ROOT.rglob('*') if p.is_file())
    return [f for f in files if not skip & set(f.parts) and not any(part.endswith('.egg-info') for part in f.parts)]


@pytest.fixture(autouse=True, scope='session')
def cache_of_the_index(tmp_path_factory):
    "Tests, and the commands that they start, leave the cache and the key of the person who runs them alone"
    os.environ['MRI_UNLEARN_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    os.environ['MRI_UNLEARN_KEY'] = str(tmp_path_factory.mktemp('key') / 'pseudonyms.key')


@pytest.fixture(scope='session')
def tiny_scans(tmp_path_factory):
    "The data set `tiny`, which takes seconds to simulate; no test may change it: copy it with `shutil.copytree`"
    from mri_unlearn.phantom.simulate import simulate_dataset

    folder = tmp_path_factory.mktemp('simulated') / 'tiny'
    simulate_dataset(folder, 'tiny', progress=False)
    return folder


@pytest.fixture
def project(tmp_path):
    "A copy of the project in a temporary folder"
    copy = tmp_path / 'project'
    for f in project_files():
        (copy / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / f, copy / f)
    return copy


@contextlib.contextmanager
def _as_a_process_is(cwd):
    "Another working folder, and the warnings that Python shows where nobody asked for more, as pytest does"
    before = os.getcwd()
    os.chdir(cwd or before)
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter('ignore', kind)
            yield
    finally:
        os.chdir(before)


def command_here(*argv, cwd=None):
    "What `mri_unlearn` says and how it ends, in this process: starting another one takes seconds"
    importlib.import_module('mri_unlearn.network.learner')  # what fastai says when it is imported is not the command's
    from mri_unlearn.cli import main

    words, out, err = [str(word) for word in argv], io.StringIO(), io.StringIO()
    with _as_a_process_is(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as e:
            status = e.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def _command(argv, cwd, environment, out, err, held):
    "In the new process: all that it and its workers print goes into two files"
    os.setsid()  # a group of its own, as where a shell has started it
    os.environ.update(environment)
    os.chdir(cwd)
    for path, number in ((out, 1), (err, 2)):
        where = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(where, number)
        os.close(where)
    from mri_unlearn.cli import main

    sys.exit(main(argv))


class Started:
    """`mri_unlearn` in a process of its own, which can be killed.
    It is forked from one that has imported the modules once and has computed nothing, so it need not import them."""

    def __init__(self, folder, *argv, cwd=None):
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload([f'mri_unlearn.{m}' for m in ('cli', 'experiment.study', 'audit.running')])
        self.files = [folder / f'said{len(list(folder.glob("said*")))}.{name}' for name in ('out', 'err')]
        self.held, held = context.Pipe(duplex=False)  # the new process has one end, and so have its workers
        place = str(cwd or os.getcwd()), dict(os.environ)
        given = [str(word) for word in argv], *place, *map(str, self.files), held
        self.process = context.Process(target=_command, args=given)
        self.process.start()
        held.close()

    @property
    def pid(self):
        "Of the process, and of its group"
        return self.process.pid

    def status(self):
        "Its exit status; None: it is at work"
        return self.process.exitcode

    def said(self):
        "What it has written to standard output and to standard error so far"
        return [path.read_text() if path.exists() else '' for path in self.files]

    def all_ended(self, timeout=60):
        "Whether it and all its workers have let go of the pipe, or do so in `timeout` seconds"
        return self.held.poll(timeout)

    def finish(self, timeout=600):
        "What it has said and how it has ended, once it has"
        self.process.join(timeout)
        assert self.status() is not None, 'the command goes on and on'
        return subprocess.CompletedProcess([], self.status(), *self.said())


FASTMRI = 'fastmri==0.3.0'


def fetch(folder):
    "Put fastMRI into `folder`, without Lightning, torchvision and torchmetrics: what is compared does not need them"
    command = [
        sys.executable,
        '-m',
        'pip',
        'install',
        '--quiet',
        '--no-deps',
        '--only-binary',
        ':all:',
        '--target',
        str(folder),
        FASTMRI,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.fail(
            f'pip did not get {FASTMRI} within 3 minutes; leave these tests out with -m "not parity"', pytrace=False
        )
    if done.returncode:
        pytest.fail(
            f'pip could not get {FASTMRI}, with which these tests compare; leave them out with -m "not parity". '
            f'pip said: {done.stderr.strip()[-300:]}',
            pytrace=False,
        )


class Statistics:
    "The two numbers that fastMRI's evaluate.py takes from the package runstats"

    def __init__(self):
        self.values = []

    def push(self, value):
        self.values.append(value)

    def mean(self):
        return sum(self.values) / len(self.values)

    def stddev(self):
        return (sum((v - self.mean()) ** 2 for v in self.values) / (len(self.values) - 1)) ** 0.5


@pytest.fixture(scope='session')
def fastmri(tmp_path_factory):
    "fastMRI's own functions and classes, version 0.3.0: the installed ones, or those of a copy for this test run"
    try:
        importlib.import_module('fastmri')
    except ImportError:
        folder = tmp_path_factory.mktemp('fastmri')
        fetch(folder)
        sys.path.append(str(folder))
    try:
        importlib.import_module('runstats')
    except ImportError:
        sys.modules['runstats'] = ModuleType('runstats')
        sys.modules['runstats'].Statistics = Statistics
    top, *modules = (
        importlib.import_module(f'fastmri{m}')
        for m in ('', '.data.subsample', '.data.transforms', '.data.mri_data', '.evaluate', '.models')
    )
    assert top.__version__ == '0.3.0', (
        f'these tests compare with fastMRI 0.3.0, installed is {top.__version__}: '
        'uninstall it, and the right one is fetched'
    )
    return SimpleNamespace(**{k: v for m in (top, *modules) for k, v in vars(m).items() if not k.startswith('_')})
