"""A run in two processes is a run in one, to the last bit.

With the planted arm, the third organ and several seeds, which `tiny` leaves out.
"""

import pandas as pd
import pytest
import torch

from mri_unlearn.experiment.protocol import run_protocol
from mri_unlearn.machinery.workers import processes

FEW = dict(
    epochs=1,
    rounds=1,
    steps=2,
    oracle_seeds=2,
    methods=('sub_ft', 'nl_ft', 'proxy'),
    study=('proxy',),
    study_fractions=(1.0,),
    unlearn_seeds=2,
    hallucination=('nl_ft', 'proxy'),
    third=2,
    limit_volumes=4,
    chans=4,
    pools=2,
    method_settings={'nl_ft': {'lr': 5e-4, 'lam': 0.1}},
)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Folder of a run by number of processes"
    folder, threads = tmp_path_factory.mktemp('jobs'), torch.get_num_threads()
    torch.set_num_threads(processes())  # one a network, as is usual: sums depend on it in their last bits
    try:
        for n in (1, 2):
            run_protocol('tiny', folder / str(n), show=False, jobs=n, **FEW)
    finally:
        torch.set_num_threads(threads)
    return {n: folder / str(n) for n in (1, 2)}


@pytest.mark.parametrize(
    'name',
    [
        'results',
        'agreement',
        'verdicts',
        'hallucination',
        'planted',
        'null_energy',
        'third',
        'over_seeds',
        'trace',
        'collateral',
    ],
)
def test_same_tables(runs, name):
    one, two = ((r / f'{name}.csv').read_bytes() for r in runs.values())
    assert one.count(b'\n') > 1 and one == two


def test_what_the_planted_arm_found_is_in_the_tables(runs):
    h = pd.read_csv(runs[2] / 'hallucination.csv').fillna({'method': ''}).set_index(['model', 'method', 'seed'])
    judged = {
        ('original', '', 0),
        ('oracle', '', 0),
        ('oracle', '', 1),
        ('unlearned', 'nl_ft', 0),
        ('unlearned', 'proxy', 0),
    }
    assert set(h[h.planted_rate.notna()].index) == judged
    assert set(h[h.null_forget.notna()].index) == judged | {('zero_filled', '', 0), ('target', '', 0)}
    s = pd.read_csv(runs[2] / 'summary.csv')
    assert s[s.model == 'original'].planted_rate.notna().all() and s[s.model == 'unlearned'].gap_third_db.notna().all()
    text = (runs[2] / 'report.html').read_text()
    assert 'Planted' in text and 'Over seeds' in text


def test_seeds_draw_other_retain_volumes(runs):
    w = pd.read_csv(runs[2] / 'results.csv')
    u = w[(w.method == 'sub_ft')].pivot_table(index='volume', columns='seed', values='psnr')
    assert list(u.columns) == [0, 1] and (u[0] != u[1]).all()


def test_a_finished_run_is_not_done_again(runs):
    before = {p: p.stat().st_mtime_ns for p in runs[2].rglob('*.pt')}
    run_protocol('tiny', runs[2], show=False, **FEW)
    assert before == {p: p.stat().st_mtime_ns for p in runs[2].rglob('*.pt')}
