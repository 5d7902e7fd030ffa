"""Requests, settings, names of files and odd data, as the command meets them: nothing is run, replaced or obeyed."""

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys

import h5py
import pytest

from mri_unlearn.cli import main
from mri_unlearn.network.weights import new_unet, save_weights
from mri_unlearn.phantom.simulate import simulate_dataset

COMMAND = [sys.executable, '-m', 'mri_unlearn.cli']
KNEE = "organ == 'knee'"


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with scans and a network"
    importlib.import_module('mri_unlearn.network.learner')  # what fastai says when it is imported is not the command's
    folder = tmp_path_factory.mktemp('home')
    simulate_dataset(folder / 'scans', 'tiny', patients=(2, 2), slices=1, coils=2, progress=False)
    save_weights(new_unet(0, chans=2, num_pool_layers=1), folder / 'net.pt')
    return folder


def command(home, *argv, **kwargs):
    how = dict(capture_output=True, text=True, timeout=120, cwd=home) | kwargs
    return subprocess.run([*COMMAND, *map(str, argv)], **how)


def here(home, *argv):
    "Status, output and error output of a command in this process, which is quicker"
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(home)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    finally:
        os.chdir(before)
    return status, out.getvalue(), err.getvalue()


def files(home):
    return {p: p.read_bytes() for p in home.rglob('*') if p.is_file()}


def fails(says, home, *argv, status=1):
    "The command ends with one clear line, and every file is as it was"
    before = files(home)
    ended, _, err = here(home, *argv)
    assert ended == status, (ended, err)
    assert len(err.splitlines()) == 1 and err.startswith('error: ') and says in err, err
    assert 'fault of the program' not in err and len(err) < 3_000
    assert files(home) == before


UNLEARN = ['unlearn', '--data', 'scans', '--model', 'net.pt', '--out', 'out.pt', '--method', 'sub_ft']


@pytest.mark.parametrize(
    'query, says',
    [
        ("@pd.io.common.os.system('touch owned')", "cannot hold '@'"),
        ("organ.apply('to_csv', 'owned')", 'cannot be called'),
        ('slices > 10**10**10', "cannot hold '*'"),
        ("fname.str.match('((a+)+)+$')", 'cannot be called'),
        ('patient_id == 7', "write '7'"),
        ('(' * 50_000, 'nested more than'),
        ("organ == 'Knee'", "did you mean 'knee'?"),
        ("organ == '\udcff'", 'surrogates not allowed'),
    ],
)
def test_a_request_is_never_run(home, query, says):
    fails(says, home, *UNLEARN, '--forget', query)
    assert not (home / 'owned').exists()


@pytest.mark.parametrize(
    'given, says',
    [
        ([*UNLEARN, '--forget', KNEE, '--seed', 10**20], '--seed: expected a whole number'),
        ([*UNLEARN, '--forget', KNEE, '--workers', -1], '--workers: expected'),
        ([*UNLEARN, '--forget', KNEE, '--workers', 100_000], '--workers: expected'),
        ([*UNLEARN, '--forget', KNEE, '--lr', 'nan'], '--lr: expected'),
        ([*UNLEARN, '--forget', KNEE, '--acceleration', 0], '--acceleration: expected'),
        ([*UNLEARN, '--forget', KNEE, '--center-fraction', 0], '--center-fraction: expected'),
        ([*UNLEARN, '--forget', KNEE, '--batch-size', '9' * 5_000], '--batch-size: expected'),
        (['train', '--data', 'scans', '--out', 'x.pt', '--forget', KNEE], 'unrecognized arguments: --forget'),
        (['index', '--data', ''], 'found none'),
        (['simulate', '--out', ''], 'found none'),
        (
            [*UNLEARN, '--forget', "patient_id == 'k0001'", '--forget', "patient_id == 'k0002'"],
            '--forget: is given twice',
        ),
        ([*UNLEARN, '--out', 'other.pt', '--forget', KNEE], '--out: is given twice'),
        (['train', '--data', 'scans', '--out', 'x.pt', '--only', KNEE, '--only', KNEE], '--only: is given twice'),
        (['train', '--data', 'scans', '--out', 'x.pt', '--only', ''], '--only: expected text'),
        (['evaluate', '--data', 'scans', '--zero-filled', '--forget', ''], '--forget: expected text'),
        (['index', '--data', 'scans', '--organ', ''], '--organ: expected text'),
        (['simulate', '--out', 'x', '--preset', ''], '--preset: expected text'),
        (['methods', ''], 'name: expected text'),
    ],
)
def test_options_out_of_range(home, given, says):
    fails(says, home, *given, status=2)


@pytest.mark.parametrize(
    'given, says',
    [
        ([*UNLEARN[:-2], '--forget', KNEE, '--method', 'nl_ft', '--set', 'lam=nan'], 'lam must be a number'),
        ([*UNLEARN[:-2], '--forget', KNEE, '--set', f'mix={"[" * 500}{"]" * 500}'], 'mix must be a number'),
        (['train', '--data', 'scans', '--out', 'x.pt', '--chans', 1_000_000], 'choose fewer chans'),
        (['protocol', '--preset', 'tiny', '--dry-run', '--method-settings', 'deep.json'], 'deep.json: expected'),
        (['protocol', '--preset', 'tiny', '--dry-run', '--method-settings', 'nan.json'], 'lam must be a number'),
        (['protocol', '--preset', 'tiny', '--dry-run', '--retain-fraction', 'nan'], 'fraction must be a number'),
        (['protocol', '--preset', 'tiny', '--dry-run', '--methods', 'ga', 'ga'], "methods holds 'ga' twice"),
        (['protocol', '--preset', 'tiny', '--dry-run', '--organ', 'knee'], '--organ goes with --data'),
        (['simulate', '--out', 'x', '--val-fraction', '0'], '--val-fraction goes with --from-images'),
    ],
)
def test_settings_out_of_range(home, given, says):
    (home / 'deep.json').write_text('[' * 100_000)
    (home / 'nan.json').write_text('{"nl_ft": {"lam": NaN}}')
    fails(says, home, *given)


def test_an_output_takes_nobodys_place(home):
    scan = next((home / 'scans').rglob('*.h5'))
    (home / 'link.pt').symlink_to('net.pt')
    (home / 'full').mkdir(exist_ok=True)
    (home / 'full' / 'thesis.tex').write_text('mine')
    train = ['train', '--data', 'scans', '--chans', '2', '--out']
    forget = ['--forget', KNEE]
    for says, argv in (
        ('would be lost', [*train, scan]),
        ('is read by this command', [*train[:2], scan, *train[3:], scan]),
        ('a device, a pipe', [*train, os.devnull]),
        ('cannot be written to', [*train, 'x' * 253 + '.pt']),
        ('no text in UTF-8', [*train, 'net\udcff.pt']),
        ('would be lost', ['index', '--data', 'scans', '--csv', scan]),
        ('would be lost', ['index', '--data', 'scans', '--csv', 'net.pt']),
        ('is read by this command', ['unlearn', '--data', 'scans', '--model', 'net.pt', '--out', 'link.pt', *forget]),
        ('is read by this command', ['evaluate', '--data', 'scans', '--model', 'net.pt', '--out', 'net.pt']),
        ('is read by this command', ['reconstruct', '--data', 'scans', '--model', 'net.pt', '--out', 'scans']),
        ('is read by this command', ['protocol', '--preset', 'tiny', '--data', 'scans', '--out', 'scans']),
        ('holds thesis.tex', ['simulate', '--preset', 'tiny', '--out', 'full']),
        ('is no folder', ['protocol', '--preset', 'tiny', '--out', 'net.pt']),
    ):
        fails(says, home, *argv)


def test_what_files_say_is_not_obeyed(home, tmp_path):
    "An escape, a line break and a mark of writing direction in the identity of a patient and in a name"
    shutil.copytree(home / 'scans', tmp_path / 'scans')
    path = next((tmp_path / 'scans').rglob('*.h5'))
    with h5py.File(path, 'r+') as f:
        f.attrs['patient_id'] = 'k\x1b[2J\nx\u202e'
    (tmp_path / 'scans' / 'file\x1b[2J.h5').write_bytes(b'not HDF5')
    status, out, err = here(tmp_path, 'index', '--data', 'scans')
    assert status == 0 and not {'\x1b', '\u202e'} & set(out + err)
    assert r'k\x1b[2J\nx' in out and r'file\x1b[2J.h5' in err
    status, out, err = here(tmp_path, 'index', '--data', 'scans', '--strict')
    assert status == 1 and '\x1b' not in err and len(err.splitlines()) == 1


def test_letters_that_a_terminal_lacks(home, tmp_path):
    (tmp_path / 'größe').symlink_to(home / 'scans')
    plain = os.environ | dict(PYTHONIOENCODING='ascii')
    p = command(tmp_path, 'reconstruct', '--data', 'größe', '--zero-filled', '--out', 'größer', env=plain)
    assert p.returncode == 0 and r'gr\xf6\xdfer' in p.stdout, p.stderr


def test_standard_output_that_takes_nothing(home):
    with open('/dev/full', 'w') as full:
        p = command(home, 'index', '--data', 'scans', capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert p.returncode == 1 and p.stderr.splitlines() == [
        'error: standard output: No space left on device; it does not hold all results'
    ]
    for words in (['index', '--data', 'scans'], ['methods']):
        gone, reading = os.pipe()
        os.close(gone)  # the reader went away
        with os.fdopen(reading, 'w') as pipe:
            p = command(home, *words, capture_output=False, stdout=pipe, stderr=subprocess.PIPE)
        assert (p.returncode, p.stderr) == (1, '')


def test_a_mixed_request_names_the_option_that_lets_it(home, tmp_path):
    simulate_dataset(tmp_path / 'scans', 'tiny', slices=1, coils=2, progress=False)
    shutil.copy(home / 'net.pt', tmp_path)
    cut = ['--forget', "acquisition == 'CORPDFS_FBK'", '--dry-run']
    fails('--allow-mixed', tmp_path, *UNLEARN, *cut)
    status, out, err = here(tmp_path, *UNLEARN, *cut, '--allow-mixed')
    assert status == 0, err


def test_a_value_that_no_volume_has_is_named(home):
    status, out, err = here(home, *UNLEARN, '--forget', "patient_id in ['k0001', 'K0002']", '--dry-run')
    assert status == 0, err
    assert "no volume has patient_id 'K0002' (did you mean 'k0002'?)" in err
