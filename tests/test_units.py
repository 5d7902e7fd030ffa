"""Multiplying all data by 1e-4 changes no table: nothing in the program knows the unit of the images.

A factor of 2**-13 (1.2e-4) changes no digit of a floating-point number but its exponent, so there everything must be
equal to the last bit. With 1e-4 each number is rounded anew, and a training carries rounding on; gradient ascent most
of all."""

import shutil

import h5py
import numpy as np
import pandas as pd
import pytest

from mri_unlearn.experiment.settings import PAPER
from mri_unlearn.experiment.protocol import run_protocol
from mri_unlearn.phantom.simulate import simulate_dataset

TRIED = (*PAPER, 'proxy', 'retrain')

FACTORS = {'one': 1.0, 'binary': 2.0**-13, 'decimal': 1e-4}
FEW = dict(methods=('ga_l1_ft', 'nl_ft', 'proxy'))
ROUNDED = dict(methods=('full_ft', 'ga', 'ga_l1_ft', 'nl_ft', 'proxy', 'retrain'))
RUNS = {
    'one': ('one', dict(loss='l1')),
    'binary': ('binary', dict(loss='l1')),
    'decimal': ('decimal', dict(loss='l1', **ROUNDED)),
    'one_ssim': ('one', dict(loss='ssim', **FEW)),
    'binary_ssim': ('binary', dict(loss='ssim', **FEW)),
    'one_varnet': ('one', dict(model='varnet', cascades=1, **FEW)),
    'binary_varnet': ('binary', dict(model='varnet', cascades=1, **FEW)),
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Name of a run -> (summary, table of volumes)"
    folder, out = tmp_path_factory.mktemp('units'), {}
    simulate_dataset(folder / 'one', 'tiny', slices=2, coils=2, progress=False)
    for name, factor in FACTORS.items():
        if name != 'one':
            shutil.copytree(folder / 'one', folder / name)
        for path in (folder / name).rglob('*.h5') if name != 'one' else ():
            with h5py.File(path, 'r+') as f:
                for d in ('kspace', 'reconstruction_rss'):
                    f[d][...] = f[d][...] * np.float32(factor)
                for a in ('max', 'norm'):
                    f.attrs[a] = f.attrs[a] * factor
    for name, (data, settings) in RUNS.items():
        summary = run_protocol(
            'tiny',
            folder / f'run_{name}',
            data=folder / data,
            show=False,
            epochs=1,
            rounds=1,
            study_fractions=(),
            **dict(methods=TRIED) | settings,
        )
        out[name] = summary, pd.read_csv(folder / f'run_{name}' / 'volumes.csv')
    return out


@pytest.fixture(scope='module')
def rounded(runs):
    "Summaries in the unit of the simulation and in another one, of the networks that both have"
    one, other = runs['one'][0], runs['decimal'][0]
    one = one[one.method.fillna('').isin(other.method.fillna(''))].reset_index(drop=True)
    assert list(one.method.dropna().unique()) == list(other.method.dropna().unique())
    assert set(other.method.dropna()) >= set(ROUNDED['methods'])
    return one, other.reset_index(drop=True)


@pytest.mark.parametrize('name', ['binary', 'decimal'])
def test_the_data_really_differ(runs, name):
    np.testing.assert_allclose(runs[name][1]['max'] / runs['one'][1]['max'], FACTORS[name], rtol=1e-5)


@pytest.mark.parametrize('loss', ['', '_ssim', '_varnet'])
def test_equal_to_the_last_bit(runs, loss):
    one, other = (runs[n + loss][0].drop(columns=['seconds', 'seconds_ratio']) for n in ('one', 'binary'))
    assert set(one.method.fillna('')) == {*(FEW['methods'] if loss else TRIED), 'noise', ''}
    pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.parametrize(
    'column', ['retain_psnr', 'forget_psnr', 'gap_retain_db', 'gap_forget_db', 'agree_retain_db', 'agree_forget_db']
)
def test_same_decibels(rounded, column):
    one, other = rounded
    assert list(one.method) == list(other.method)
    far = np.where(
        one.method == 'retrain', 0.5, 0.1
    )  # trained from nothing, that is, from nothing but rounding onwards
    assert (np.abs(other[column] - one[column]) <= far).all(), pd.DataFrame(
        dict(method=one.method, one=one[column], other=other[column])
    )


def test_same_ssim_cost_and_flags(rounded):
    one, other = rounded
    for c in ('retain_ssim', 'forget_ssim'):
        np.testing.assert_allclose(other[c], one[c], atol=1e-2)
    assert list(one.cost_ratio.fillna(0)) == list(other.cost_ratio.fillna(0))
    assert list(one.flag) == list(other.flag)
