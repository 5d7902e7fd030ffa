"""Controls of every attack, on networks that were really trained: who memorised four patients is found out, and who
never saw them is not; a network that is worse on them than any other is found out, too."""

import numpy as np
import pandas as pd
import pytest
from fastai.callback.training import GradientClip

from mri_unlearn.data.loaders import recon_dls
from mri_unlearn.experiment.exposure import Knowledge, patient_rows, unseen_surprises
from mri_unlearn.experiment.protocol import run_protocol
from mri_unlearn.experiment.purge import purgeable
from mri_unlearn.experiment.settings import prepare
from mri_unlearn.machinery.disk import DataError, file_digest
from mri_unlearn.network.learner import SkipValidation, recon_learner
from mri_unlearn.network.weights import new_unet
from mri_unlearn.phantom.simulate import simulate_dataset
from mri_unlearn.signal.masks import mask_func
from mri_unlearn.unlearn.core import unlearn
from mri_unlearn.verdict.privacy import STATISTICS, patient_table, population_attack
from mri_unlearn.verdict.shadows import attack_worth, centred, left_out_ratios, shadow_halves
from mri_unlearn.verdict.traces import measure_traces

MASK = mask_func('equispaced', [0.08], [4])
ORACLES = [f'oracle_s{i}' for i in range(4)]
SHADOWS = 8
METHODS = dict(ga_ft=3e-3, nl_ft=3e-3)  # method -> learning rate


def trained(rows, seed, steps, network=None, lr=3e-3):
    "A small U-Net after so many steps on some scans"
    network = new_unet(seed, chans=4, num_pool_layers=2) if network is None else network
    dls = recon_dls(rows, rows.head(1), MASK, bs=2, seed=seed)
    learn = recon_learner(dls, network, cbs=[SkipValidation(), GradientClip(0.5)])
    with learn.no_bar(), learn.no_logging():
        learn.fit(max(1, steps // len(dls.train)), lr)
    return network.eval()


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Knees of twenty patients, four of them to be forgotten, ten of them never seen"
    size = dict(patients=dict(knee=(10, 10)), slices=2, recon=(48, 48), coils=1)
    index = simulate_dataset(tmp_path_factory.mktemp('knees'), 'tiny', progress=False, **size)
    index = index.groupby('patient_id').head(1).reset_index(drop=True)
    four = index.patient_id.isin(sorted(index.patient_id)[:4])
    split = np.where(index.folder.str.endswith('val'), 'forget_test', np.where(four, 'forget_train', 'retain_train'))
    return index.assign(split=split)


def forgot(network, scans, method, lr):
    "What a method makes of a network, with so much of it that it is too much"
    train = scans[scans.split.str.endswith('train')]
    learn = recon_learner(recon_dls(train, train.head(1), MASK, bs=2), network)
    return unlearn(learn, train, method, rounds=2, steps=15, bs=4, lr=lr).model


@pytest.fixture(scope='module')
def networks(scans):
    "Four Oracles, one more of them, the Original, what ascent makes of it, one that saw four patients alone; shadows"
    forget, retain = (scans[scans.split == f'{side}_train'] for side in ('forget', 'retain'))
    found = {name: trained(retain, i, 120) for i, name in enumerate([*ORACLES, 'another'])}
    found['original'] = trained(scans[scans.split.str.endswith('train')], 9, 200)
    for method, lr in METHODS.items():
        found[method] = forgot(found['original'], scans, method, lr)
    found['four'] = trained(forget, 8, 300)
    halves = shadow_halves(scans[scans.split.str.endswith('train')].groupby('patient_id').organ.first(), SHADOWS)
    for k in halves:
        found[f'shadow_{k}'] = trained(scans[scans.patient_id.isin(halves.index[halves[k]])], 20 + k, 100)
    return found, halves


@pytest.fixture(scope='module')
def traces(networks, scans):
    return measure_traces(networks[0], scans, MASK, masks=2, original='original')


def test_overfitted_on_four_patients_is_found_out(traces):
    found = population_attack(traces, 'four', ORACLES)
    assert found.auc >= 0.9 and found.word == 'found' and found.low > 0.5 and found.members == 4
    assert population_attack(traces, 'original', ORACLES).lead > 0


@pytest.mark.parametrize('statistic', ['error_db', 'added_db', 'changed_db'])
def test_second_oracle_passes(traces, statistic):
    found = population_attack(traces, 'another', ORACLES, statistic)
    assert not found.word.startswith('found') and found.low < 0.5 < found.high


@pytest.mark.parametrize('network', ['four', 'original'])
def test_halves_of_patients_whom_nobody_saw_are_alike(traces, network):
    never = traces[traces.split == 'forget_test']
    half = never.patient_id.isin(sorted(never.patient_id.unique())[::2])
    relabelled = never.assign(split=np.where(half, 'forget_train', 'forget_test'))
    found = population_attack(relabelled, network, ORACLES)
    assert found.low < 0.5 < found.high and found.members == found.others == 5


def test_over_forgotten_is_found_on_the_other_side(traces):
    found = {s: population_attack(traces, 'ga_ft', ORACLES, s) for s in STATISTICS}
    assert found['error_db'].word == 'found by being worse' and found['error_db'].auc < 0.5
    assert found['added_db'].word == found['changed_db'].word == 'found'  # without a target; with both networks


def test_noisy_labels_leave_a_mark_that_no_oracle_has(traces):
    assert any(population_attack(traces, 'nl_ft', ORACLES, s).word.startswith('found') for s in STATISTICS)


def test_single_patients(traces, networks):
    table = patient_table(traces)
    names, halves = [f'shadow_{k}' for k in networks[1]], networks[1]
    who = table.index.get_level_values('patient')
    inside = pd.DataFrame({f'shadow_{k}': who.isin(halves.index[halves[k]]) for k in halves}, index=table.index)
    scores = centred(-table)
    train = table.index.get_level_values('split').str.endswith('train')
    worth = attack_worth(left_out_ratios(scores[names], inside)[train], inside[train])
    known = Knowledge(scores, table, inside, names, unseen_surprises(scores[names], inside))
    rows = {n: patient_rows(known, n).set_index('split').loc['forget_train'] for n in ('four', 'another', *METHODS)}
    assert worth['auc'] > 0.6  # so the attack can find somebody
    assert rows['four'].flagged.sum() >= 2 and (rows['four'].surprise > 0).all()
    assert not rows['another'].flagged.any()
    assert rows['ga_ft'].flagged.any() and rows['ga_ft'].surprise[rows['ga_ft'].flagged].max() < 0


SMALL = dict(epochs=1, rounds=1, steps=1, chans=2, pools=1, oracle_seeds=3, methods=('sub_ft',), study=())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run with data of a user that was attacked after it was done; its files before that"
    folder = tmp_path_factory.mktemp('attacked')
    simulate_dataset(folder / 'data', 'tiny', progress=False)
    about = dict(out=folder / 'run', data=folder / 'data', show=False, jobs=1, **SMALL)
    run_protocol('tiny', **about)
    before = {p: file_digest(p) for p in (folder / 'run').rglob('*') if p.is_file() and p.suffix in ('.csv', '.pt')}
    run_protocol('tiny', shadows=2, **about)
    return folder / 'run', before, about


def test_attacks_can_be_added_to_a_run_that_is_done(run):
    folder, before, _ = run
    assert before == {p: file_digest(p) for p in before}  # tables and networks are as they were
    assert (folder / 'privacy.csv').is_file() and 'Would an attacker find them?' in (folder / 'report.html').read_text()
    assert '--privacy' not in (folder / 'report.html').read_text()


def test_nobody_is_named_in_the_bank(run):
    folder, _, _ = run
    texts = [p.read_text() for p in folder.rglob('*') if p.suffix in ('.csv', '.json', '.html') and p.is_file()]
    assert len(list(folder.glob('shadows/*/stages/*.csv'))) >= 2
    for name in ('k0001', 'b0001', 'file1000001', 'multicoil_train'):
        assert not any(name in text for text in texts), name


def test_a_bank_is_not_trained_again(run):
    folder, _, about = run
    models = {p: p.stat().st_mtime_ns for p in folder.glob('shadows/*/models/*.pt')}
    assert len(models) == 2
    run_protocol('tiny', shadows=2, **about | dict(attacked=('sub_ft',)))
    assert models == {p: p.stat().st_mtime_ns for p in folder.glob('shadows/*/models/*.pt')}


def test_shadows_come_in_pairs():
    with pytest.raises(DataError, match='an even number, found 3'):
        prepare('tiny', dict(shadows=3))


def test_weights_of_shadows_can_be_purged(run):
    folder, _, _ = run
    parts, foreign = purgeable(folder)
    assert {'shadows'} <= {part.name for part in parts} and not [p for p in foreign if 'shadows' in p.parts]
