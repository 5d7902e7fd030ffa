"""The command: bad input gives one clear line, a status other than 0, and harms nothing."""

import re
import resource
import shutil
import subprocess
import sys
from functools import partial

import h5py
import numpy as np
import pytest
from conftest import command_here

from mri_unlearn.network.weights import new_unet, save_weights

KNEE = "organ == 'knee'"


@pytest.fixture(scope='module')
def scans(tiny_scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp('scans') / 'data'
    shutil.copytree(tiny_scans, folder)
    save_weights(new_unet(0, chans=4, num_pool_layers=2), folder.parent / 'net.pt')
    return folder


def process(*argv, **kwargs):
    "The command in a process of its own, as a shell starts it"
    return subprocess.run(
        [sys.executable, '-m', 'mri_unlearn.cli', *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def fails(contains, *argv, run=command_here):
    p = run(*argv)
    assert p.returncode == 1, (p.returncode, p.stderr)
    assert 'Traceback' not in p.stderr
    lines = p.stderr.strip().splitlines()
    said = [line for line in lines if not re.search(r'\d+%', line) and line.strip()]  # but for progress bars
    assert len(said) == 1 and said[0].startswith('error: ') and contains in said[0], p.stderr
    assert 'fault of the program' not in said[0]
    return p


def damage(scans, tmp_path, how):
    "A copy of the folder in which the first file was handed to `how`"
    copy = tmp_path / 'data'
    shutil.copytree(scans, copy)
    path = sorted(copy.rglob('*.h5'))[0]
    how(path)
    return copy, path


def drop_kspace(path):
    with h5py.File(path, 'r+') as f:
        del f['kspace']


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def flip_shape(path):
    with h5py.File(path, 'r+') as f:
        del f['kspace']
        f['kspace'] = np.zeros((2, 8), np.complex64)


def no_header(path):
    with h5py.File(path, 'r+') as f:
        del f['ismrmrd_header']


@pytest.mark.parametrize(
    'how, says', [(drop_kspace, 'kspace'), (cut, ''), (flip_shape, 'kspace'), (no_header, 'ismrmrd_header')]
)
@pytest.mark.parametrize('argv', [['index'], ['evaluate'], ['protocol', '--preset', 'tiny']])
def test_damaged_file(scans, tmp_path, how, says, argv):
    copy, path = damage(scans, tmp_path, how)
    out = ['--out', tmp_path / 'run'] if argv[0] == 'protocol' else []
    p = fails(path.name, *argv, '--strict', '--data', copy, *out)
    assert says in p.stderr
    assert not (tmp_path / 'run').exists()


def test_a_damaged_file_is_left_out_and_named(scans, tmp_path):
    copy, path = damage(scans, tmp_path, cut)
    n = len(list(copy.rglob('*.h5')))
    for argv, rows in ((['index'], n - 1), (['evaluate', '--zero-filled', '--out', tmp_path / 'scores.csv'], n - 1)):
        p = process(*argv, '--data', copy)
        assert p.returncode == 0, p.stderr
        assert p.stderr.startswith('warning: ') and path.name in p.stderr and f'of {n} files' in p.stderr
        assert path.name not in p.stdout
    assert len(p.stdout) and (tmp_path / 'scores.csv').read_text().count('\n') == rows + 1
    for f in copy.rglob('*.h5'):
        cut(f)  # nothing is left: an error
    fails(str(n), 'index', '--data', copy)


def test_missing_and_empty_folder(tmp_path):
    fails('nowhere', 'index', '--data', tmp_path / 'nowhere')
    fails(tmp_path.name, 'index', '--data', tmp_path)


def unlearn_fails(says, scans, out, query, *more):
    "`unlearn` of this request, with the network beside the scans, ends with one clear error"
    fails(says, 'unlearn', '--data', scans, '--model', scans.parent / 'net.pt', '--out', out, '--forget', query, *more)


@pytest.mark.parametrize(
    'query, says',
    [("organ == 'liver'", 'none'), ('slices > 0', 'all'), ('colour == 1', 'colour'), ('organ ==', 'organ ==')],
)
def test_requests_that_cannot_be_meant(scans, tmp_path, query, says):
    unlearn_fails(says, scans, tmp_path / 'x.pt', query)
    assert not (tmp_path / 'x.pt').exists()


@pytest.mark.parametrize(
    'extra, says',
    [
        (['--retain-fraction', '0'], 'fraction'),
        (['--retain-fraction', '1.5'], 'fraction'),
        (['--method', 'hope'], "'hope'"),
    ],
)
def test_bad_settings(scans, tmp_path, extra, says):
    unlearn_fails(says, scans, tmp_path / 'x.pt', KNEE, *extra)


def test_results_survive_a_failure(scans, tmp_path):
    "A command that fails leaves the result of an earlier one as it was"
    out = tmp_path / 'x.pt'
    out.write_bytes(b'earlier')
    fails(
        "'hope'",
        'unlearn',
        '--data',
        scans,
        '--model',
        scans.parent / 'net.pt',
        '--out',
        out,
        '--forget',
        KNEE,
        '--method',
        'hope',
    )
    assert out.read_bytes() == b'earlier'


def full_disk():
    "In the child: no file may grow beyond 40 kB, which is what a full disk looks like from inside"
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


@pytest.mark.parametrize(
    'argv, result',
    [
        (['simulate', '--preset', 'tiny'], 'scans'),
        (['train', '--epochs', '1', '--chans', '8', '--pools', '2'], 'net.pt'),
        (['unlearn', '--forget', KNEE, '--rounds', '1', '--steps', '1', '--method', 'sub_ft'], 'net.pt'),
        (['reconstruct', '--batch-size', '2'], 'predictions'),
        (['protocol', '--preset', 'tiny', '--epochs', '1'], 'run'),
    ],
)
def test_full_disk(scans, tmp_path, argv, result):
    data = [] if argv[0] == 'simulate' else ['--data', scans]
    model = []
    if argv[0] in ('unlearn', 'reconstruct'):
        save_weights(new_unet(0, chans=8, num_pool_layers=2), tmp_path / 'in.pt')
        model = ['--model', tmp_path / 'in.pt']
    full = partial(process, preexec_fn=full_disk)
    fails('could not write', *argv, *data, *model, '--out', tmp_path / result, run=full)
    whole = (
        'in.pt',
        'simulation.json',
        'config.json',
        'volumes.csv',
        'reconstruction.json',
        '.lock',
        '.private',
    )  # written before the disk was full
    left = [p for p in tmp_path.rglob('*') if p.is_file() and p.name not in whole]
    assert not left, 'a partial file stayed'


def test_traceback_only_when_asked_for(tmp_path):
    assert 'Traceback' in process('index', '--data', tmp_path / 'nowhere', '--debug').stderr
    assert 'Traceback' in process('--debug', 'index', '--data', tmp_path / 'nowhere').stderr
    fails('nowhere', 'index', '--data', tmp_path / 'nowhere', run=process)


def test_help_and_version():
    assert process('--help').returncode == 0
    assert process('--version').stdout.strip()
    assert process('fly').returncode == 2
