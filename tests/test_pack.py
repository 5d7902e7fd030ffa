"""`mri_unlearn pack`: the same scans, bit for bit, through all that reads them."""

import contextlib
import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from mri_unlearn.cli import main
from mri_unlearn.data.files import read_item
from mri_unlearn.data.loaders import ReconDL
from mri_unlearn.data.slices import SliceDataset
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.phantom.simulate import simulate_dataset
from mri_unlearn.signal.masks import mask_func

FILTERS = ['none', 'gzip', *['lz4', 'zstd'] * bool(find_spec('hdf5plugin'))]


def command(*words):
    "Exit status, output and errors of the command, in this process"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def without_the_extra(folder, *words):
    "The same in a process in which hdf5plugin cannot be imported"
    (folder / 'hdf5plugin.py').write_text('raise ImportError("as if it were not installed")')
    path = os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, '-m', 'mri_unlearn.cli', *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': path},
    )
    return done.returncode, done.stdout, done.stderr


def hide(path, mask):
    "Make a file one of a test set: no target, zeros where the mask says nothing was measured"
    with h5py.File(path, 'r+') as f:
        f['kspace'][:] = np.where(mask, f['kspace'][:], 0)
        f['mask'] = mask
        del f['reconstruction_rss']


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Simulated volumes: as they are, zero at the sides, with a mask, compressed"
    root = tmp_path_factory.mktemp('data') / 'scans'
    paths = list(simulate_dataset(root, preset='tiny', seed=0, progress=False).path)
    with h5py.File(paths[0], 'r+') as f:
        f['kspace'][..., :9], f['kspace'][..., -7:] = 0, 0
    with h5py.File(paths[1], 'r+') as f:
        width = f['kspace'].shape[-1]
    hide(paths[1], np.arange(width) % 3 == 0)
    with h5py.File(paths[2], 'r+') as f:
        k = f['kspace'][:]
        del f['kspace']
        f.create_dataset('kspace', data=k, compression='gzip', shuffle=True)  # as h5py chooses chunks: across slices
    return root


def index(root):
    return index_volumes(root, cache=False)


@pytest.fixture(scope='module', params=FILTERS)
def packed(request, scans, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    status, said, _ = command('pack', scans, '--out', out, '--filter', request.param)
    assert status == 0 and 'compared to the last bit' in said and f'packed ({request.param})' in said
    return out / 'scans'


def test_every_bit_is_there(scans, packed):
    old, new = index(scans), index(packed)
    pd.testing.assert_frame_equal(old.drop(columns='path'), new.drop(columns='path'), check_exact=True)
    for a, b, slices in zip(old.path, new.path, old.slices):
        for s in range(slices):
            x, y = read_item(a, s), read_item(b, s)
            assert x.kspace.numpy().tobytes() == y.kspace.numpy().tobytes()
            assert all(p is q is None or torch.equal(p, q) for p, q in zip(x[1:], y[1:]))
        with h5py.File(a) as f, h5py.File(b) as g:
            assert {n for n in f if n != 'kspace'} == {n for n in g if not n.startswith('kspace')}
            assert {**f.attrs}.keys() <= {**g.attrs}.keys()
            ds = g['kspace_lines'] if 'kspace_lines' in g else g['kspace']
            assert ds.chunks == (1, *ds.shape[1:])  # a chunk a slice


def test_unmeasured_columns_are_left_out(scans, packed):
    sizes = {p.name: (p.stat().st_size, q.stat().st_size) for p, q in zip(*map(files, (scans, packed)))}
    old = index(scans)
    before, after = sizes[old.fname[1]]
    assert after < 0.6 * before  # two thirds of its columns were hidden, its header was not
    with h5py.File(index(packed).path[0]) as f:
        assert f['kspace_lines'].shape[-1] == old.cols[0] - 16 == f['kspace_columns'][:].sum()
        assert 'kspace' not in f  # no other program takes the lines for the whole


def files(root):
    return sorted(Path(root).rglob('*.h5'))


@pytest.mark.parametrize('input', ['image', 'kspace'])
def test_batches_are_the_same(scans, packed, input):
    def batches(root):
        data = SliceDataset(index(root), mask_func('equispaced', 0.08, 4), input=input)
        return list(ReconDL(data, bs=2, device='cpu'))

    for a, b in zip(batches(scans), batches(packed), strict=True):
        assert all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b))


def test_commands_take_packed_files(scans, packed, tmp_path):
    for root in (scans, packed):
        out = tmp_path / root.parent.name
        assert command('evaluate', '--zero-filled', '--data', root, '--out', f'{out}.csv')[0] == 0
        assert command('reconstruct', '--zero-filled', '--data', root, '--out', out)[0] == 0
    (a, b) = (pd.read_csv(tmp_path / f'{root.parent.name}.csv') for root in (scans, packed))
    numbers = a.select_dtypes('number').columns
    assert len(a) and a[numbers].equals(b[numbers])


def test_it_goes_on_and_spares_what_is_there(scans, tmp_path):
    first = files(scans)[:2]
    assert command('pack', *first, '--out', tmp_path, '--filter', 'none')[0] == 0
    times = [p.stat().st_mtime_ns for p in files(tmp_path)]
    status, said, _ = command('pack', *files(scans)[:3], '--out', tmp_path, '--filter', 'none')
    assert status == 0 and '1 files written, 2 were there' in said
    assert [p.stat().st_mtime_ns for p in files(tmp_path)][:2] == times


def test_what_it_refuses(scans, tmp_path):
    before = {p: p.read_bytes() for p in files(scans)}
    for out in (scans, scans / 'deeper', scans.parent):  # the last: copies would go where the sources are
        status, _, said = command('pack', scans, '--out', out, '--filter', 'none')
        assert status == 1 and 'error: ' in said and 'Choose' in said, said
    assert command('pack', tmp_path / 'nothing', '--out', tmp_path / 'out')[0] == 1
    (tmp_path / 'bad.h5').write_bytes(b'no scan')
    status, _, said = command(
        'pack', tmp_path / 'bad.h5', files(scans)[0], '--out', tmp_path / 'out', '--filter', 'none'
    )
    assert status == 1 and 'left out' in said and 'bad.h5' in said and len(files(tmp_path / 'out')) == 1
    assert {p: p.read_bytes() for p in files(scans)} == before


def test_without_the_extra(scans, tmp_path):
    one = files(scans)[0]
    status, said, errors = without_the_extra(tmp_path, 'pack', one, '--out', tmp_path / 'plain')
    assert status == 0 and 'packed (none)' in said and 'mri_unlearn[pack]' in errors
    if 'lz4' in FILTERS:
        assert command('pack', one, '--out', tmp_path / 'lz4', '--filter', 'lz4')[0] == 0
        status, said, errors = without_the_extra(tmp_path, 'index', '--data', tmp_path / 'lz4', '--no-cache')
        assert status == 1 and 'filter 32001' in errors and 'mri_unlearn[pack]' in errors
