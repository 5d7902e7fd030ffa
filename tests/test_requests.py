"""Requests other than organs, from start to report, and many of them in one study."""

import argparse
import json
import os
import shutil
import signal
import time

import pandas as pd
import pytest
from conftest import Started, command_here

from mri_unlearn.command.options import add_data, splits_of
from mri_unlearn.experiment import networks
from mri_unlearn.experiment.protocol import run_protocol
from mri_unlearn.experiment.requests import folder_name
from mri_unlearn.experiment.study import run_requests
from mri_unlearn.machinery.disk import DataError

FEW = dict(epochs=1, oracle_seeds=2, rounds=1, steps=2, methods=('sub_ft',), study=())
ARGS = '--preset tiny --epochs 1 --oracle-seeds 2 --rounds 1 --steps 2 --methods sub_ft --study-fractions'.split()
PATIENT, SITE, BRAIN = "patient_id == 'k0003'", "site == 'north'", "organ == 'brain'"
MIXED, TWO, HELD_OUT = "acquisition == 'AXT2'", "patient_id in ['k0001', 'b0001']", "patient_id == 'k5001'"
REQUESTS = f"""# what was asked

{PATIENT} | withdrew
{SITE}
  {MIXED}
{TWO} | both | by letter
{BRAIN}
{HELD_OUT}
"""


def command(out, file, *more):
    return ['protocol', '--requests', file, '--out', out, *ARGS, *more]


def tables(folder):
    "All tables of a run or a study without what the clock and the place say"
    clock = ['path', 'seconds', 'seconds_ratio', 'train_loss']
    paths = [p for p in sorted(folder.rglob('*.csv')) if p.parent.name != 'data']
    return {str(p.relative_to(folder)): pd.read_csv(p).drop(columns=clock, errors='ignore') for p in paths}


def same(one, two):
    one, two = tables(one), tables(two)
    assert len(one) > 5 and set(one) == set(two)
    for name, table in one.items():
        pd.testing.assert_frame_equal(table, two[name], check_exact=True, obj=name)


@pytest.fixture(scope='module')
def data(tiny_scans, tmp_path_factory):
    "A folder of scans"
    return shutil.copytree(tiny_scans, tmp_path_factory.mktemp('scans') / 'data')


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp('study')
    (folder / 'requests.txt').write_text(REQUESTS, encoding='utf-8')
    run = command(folder / 'out', folder / 'requests.txt', '--allow-mixed')
    done = Started(folder, *run).finish(timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / 'out', done.stdout


def rows_of(study, query):
    table = pd.read_csv(study[0] / 'requests.csv')
    return table[table['query'] == query]


def test_a_row_for_each_request_and_network(study):
    table = pd.read_csv(study[0] / 'requests.csv')
    counts = table.groupby('query', sort=False).size().to_dict()
    assert counts == {PATIENT: 2, SITE: 2, MIXED: 2, TWO: 2, BRAIN: 2, HELD_OUT: 1}
    assert table.reason.dropna().unique().tolist() == ['withdrew', 'both | by letter']
    patients = table.drop_duplicates('query').set_index('query').patients.to_dict()
    assert patients == {PATIENT: 1, SITE: 4, MIXED: 2, TWO: 2, BRAIN: 3, HELD_OUT: 0}
    ran = table[table['query'] != HELD_OUT]
    assert (
        ran[['level_oracle_db', 'gap_retain_db', 'gap_forget_db', 'agree_above_floor_db', 'cost_ratio']]
        .notna()
        .all(axis=None)
    )
    assert ran.gap_strangers_db.isna().equals(ran['query'].eq(BRAIN))  # nobody else has a brain
    assert rows_of(study, HELD_OUT).verdict.item().startswith('nothing to forget')
    assert not (study[0] / folder_name(HELD_OUT)).exists()


def test_the_table_and_the_page_lead_to_the_reports(study):
    page, text = (study[0] / 'index.html').read_text(), (study[0] / 'requests.md').read_text()
    for query in (PATIENT, SITE, MIXED, TWO, BRAIN):
        assert f'href="{folder_name(query)}/report.html"' in page and query in text
        assert (study[0] / folder_name(query) / 'report.html').is_file()
    assert text in study[1] and 'index.html' in study[1]
    assert '| – |' in text and 'nothing to forget' in text


def test_one_original_and_one_data_set_for_all(study):
    runs = [study[0] / folder_name(query) for query in (PATIENT, SITE, MIXED, TWO, BRAIN)]
    assert len({(run / 'models' / 'original.pt').read_bytes() for run in runs}) == 1
    records = [json.loads((run / 'stages' / 'original.json').read_text()) for run in runs]
    assert [r.get('taken_from') for r in records] == [None, *[runs[0].name] * 4]
    assert len({(run / 'models' / 'oracle_s0.pt').read_bytes() for run in runs}) == 5
    assert [p.relative_to(study[0]).parts[0] for p in study[0].rglob('multicoil_train')] == ['data']


def test_a_run_of_a_study_is_the_run_alone(study, tmp_path):
    run_protocol('tiny', tmp_path / 'alone', show=False, query=MIXED, allow_mixed=True, jobs=1, **FEW)
    same(tmp_path / 'alone', study[0] / folder_name(MIXED))


def test_who_is_trained_on_little_is_not_trained(study):
    for query, alone in ((PATIENT, False), (TWO, False), (MIXED, False), (SITE, True), (BRAIN, True)):
        run = study[0] / folder_name(query)
        assert (run / 'models' / 'forget_only.pt').exists() == alone
        assert ('No network was trained on' in (run / 'report.html').read_text()) != alone


def test_sides_are_called_by_what_was_asked(study):
    names = {
        q: set(pd.read_csv(study[0] / folder_name(q) / 'matrix.csv').tested_on) for q in (PATIENT, SITE, MIXED, BRAIN)
    }
    assert names[PATIENT] == {'k0003', 'everyone else'} and names[SITE] == {'north', 'other sites'}
    assert names[MIXED] == {'AXT2', 'other acquisitions'} and names[BRAIN] == {'brain', 'knee'}


def test_a_cut_through_people_is_said(study):
    page = (study[0] / folder_name(MIXED) / 'report.html').read_text()
    assert 'nobody stands on two sides' not in page and 'of 2 patients it names some volumes and not all' in page
    config = json.loads((study[0] / folder_name(MIXED) / 'config.json').read_text())
    assert config['settings']['allow_mixed'] is config['request']['allow_mixed'] is True


def leveled(learner):
    "A method that says what it aims at"

    def learn(*args, **kwargs):
        found = learner(*args, **kwargs)
        found.level_record = dict(kind='memory', now=3.2, aim=2.1, low=1.9, high=2.4, source='estimated by a pair')
        return found

    return learn


@pytest.fixture(scope='module')
def patient(tmp_path_factory):
    "One patient must go: with a planted structure, a third organ, three Oracles and a method that estimates a level"
    out = tmp_path_factory.mktemp('patient') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, 'unlearned_learner', leveled(networks.unlearned_learner))
        more = dict(oracle_seeds=3, third=2, hallucination=('sub_ft',), query=PATIENT, reason='withdrew')
        run_protocol('tiny', out, show=False, jobs=1, **FEW | more)
    return out


def test_one_patient_is_never_at_the_oracle(patient):
    verdicts, summary = pd.read_csv(patient / 'verdicts.csv'), pd.read_csv(patient / 'summary.csv')
    assert set(verdicts.forget_split) == {'forget_train'} and set(verdicts.patients_forget) == {1}
    assert not verdicts.passes_forget.any() and not verdicts.verdict.str.contains('at the oracle').any()
    assert verdicts.p_seeds_forget.notna().all()
    said = verdicts.verdict.str.contains(r'1 patient|over-forgotten|under-forgotten')
    assert said.all() and verdicts.note.str.contains('1 patient, so no test over patients').all()
    assert verdicts.low_forget_db.isna().all() and summary.gap_strangers_db.notna().all()


def test_scans_of_the_same_kind_are_scored(patient):
    results = pd.read_csv(patient / 'results.csv')
    knees = results[results.organ == 'knee'].groupby('split').volume.nunique().to_dict()
    assert knees == {'retain_train': 2, 'retain_test': 2, 'forget_train': 2}
    agreement = pd.read_csv(patient / 'agreement.csv')
    assert set(agreement.split) == {'retain_test', 'forget_train'}
    assert pd.read_csv(patient / 'collateral.csv').query("by == 'organ'").group.unique().tolist() == ['brain', 'knee']


def test_the_level_reaches_the_report(patient):
    levels = pd.read_csv(patient / 'levels.csv')
    assert levels.method.tolist() == ['sub_ft'] and levels.aim_db.tolist() == [2.1]
    assert levels[['reached_db', 'oracle_db']].notna().all(axis=None)
    results = pd.read_csv(patient / 'results.csv').query("split == 'forget_train'").groupby('model').psnr.mean()
    assert levels.oracle_db.item() == pytest.approx(results.oracle - results.zero_filled)
    page = (patient / 'report.html').read_text()
    assert 'The level aimed at' in page and 'estimated by a pair' in page and '+1.9 to +2.4' in page


def test_the_report_of_a_patient_does_not_speak_of_tests_that_were_not_made(patient):
    page = (patient / 'report.html').read_text()
    for said in (
        '1 patient on the side to be forgotten',
        'could not\nbe asked',
        'Strangers of the same kind',
        'forgotten training slice',
    ):
        assert said in page, said
    for never in ('which never saw their like', 'forget test slice', 'No network was shown to be better'):
        assert never not in page, never
    assert 'strangers gap, dB' in (patient / 'table.md').read_text()
    assert (patient / 'hallucination.csv').is_file() and pd.read_csv(patient / 'third.csv').gap_third_db.notna().all()


def test_a_cut_through_people_has_to_be_allowed(data, tmp_path):
    with pytest.raises(DataError, match='--allow-mixed'):
        run_protocol('tiny', tmp_path / 'run', data, show=False, query=MIXED, **FEW)
    parser = argparse.ArgumentParser()
    add_data(parser, forget=True)
    args = ['--data', str(data), '--forget', MIXED]
    with pytest.raises(DataError, match='--allow-mixed'):
        splits_of(parser.parse_args(args))
    splits = splits_of(parser.parse_args([*args, '--allow-mixed']))
    assert splits.split.str.startswith('forget').equals(splits.acquisition == 'AXT2')


BAD = {
    "organ = 'knee'": 'expected a query such as',
    'the knees': 'expected a query such as',
    "hospital == 'north'": 'not defined',
    "site == 'nroth' | gone": 'matches none',
    "acquisition == 'AXT2'": '--allow-mixed',
    PATIENT: 'that of line 2 again',
}


@pytest.mark.parametrize('line', BAD)
def test_a_bad_line_is_named_before_anything_is_trained(data, tmp_path, line):
    file = tmp_path / 'requests.txt'
    file.write_text(f'# good\n{PATIENT}\n\n{line}\n', encoding='utf-8')
    with pytest.raises(DataError) as error:
        run_requests(file, 'tiny', tmp_path / 'out', data, show=False, jobs=1, **FEW)
    assert f'{file}, line 4: ' in str(error.value) and BAD[line] in str(error.value)
    assert not list(tmp_path.rglob('*.pt')) and not list(tmp_path.rglob('volumes.csv'))


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    file = tmp_path / 'requests.txt'
    file.write_text('knees\n', encoding='utf-8')
    for more, words in (((), 'line 1: expected'), (('--forget', BRAIN), 'leave --forget and --reason out')):
        done = command_here(*command(tmp_path / 'out', file, *more))
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_the_plan_lists_all_requests(tmp_path):
    file = tmp_path / 'requests.txt'
    file.write_text(REQUESTS, encoding='utf-8')
    done = command_here(*command(tmp_path / 'out', file, '--allow-mixed', '--dry-run'))
    assert done.returncode == 0, done.stderr
    lines = {
        q: next(line for line in done.stdout.splitlines() if q in line) for q in (PATIENT, SITE, MIXED, TWO, BRAIN)
    }
    assert lines[SITE].split()[-6:-2] != lines[PATIENT].split()[-6:-2] and 'nothing to forget' in done.stdout
    assert not (tmp_path / 'out').exists()


def kill_when(process, out, pattern):
    give_up = time.time() + 120
    while not list(out.glob(pattern)):
        assert process.status() is None and time.time() < give_up, f'{pattern} did not appear: {process.said()}'
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.finish().returncode == -signal.SIGKILL


def test_killed_and_started_again(study, tmp_path):
    file, out = tmp_path / 'requests.txt', tmp_path / 'out'
    file.write_text(f'{PATIENT} | withdrew\n{SITE}\n', encoding='utf-8')
    first, second = folder_name(PATIENT), folder_name(SITE)
    for pattern in ('data/multicoil_train/*.h5', f'{first}/models/original.pt', f'{second}/models/oracle_s0.pt'):
        kill_when(Started(tmp_path, *command(out, file, '--allow-mixed', '--jobs', '1')), out, pattern)
    assert (out / 'requests.csv').is_file() and (out / first / 'report.html').is_file()  # the first was finished
    assert not (out / second / 'report.html').exists()
    file.write_text(REQUESTS.replace(TWO, '# ').replace(BRAIN, '# ').replace(MIXED, '# '), encoding='utf-8')  # and more
    done = Started(tmp_path, *command(out, file, '--allow-mixed')).finish()
    assert done.returncode == 0, done.stderr
    for name in (first, second):
        same(out / name, study[0] / name)
    found, wanted = (pd.read_csv(o / 'requests.csv') for o in (out, study[0]))
    wanted = wanted[wanted['query'].isin([PATIENT, SITE, HELD_OUT])].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, wanted, check_exact=True, check_dtype=False)
    assert not list(out.rglob('*.part*')) and not list(out.rglob('*.state.pt'))


def test_a_study_and_a_run_do_not_share_a_folder(study, tmp_path):
    file = tmp_path / 'requests.txt'
    file.write_text(REQUESTS, encoding='utf-8')
    copy = tmp_path / 'run'
    shutil.copytree(study[0] / folder_name(PATIENT), copy)
    with pytest.raises(DataError, match='holds a single run'):
        run_requests(file, 'tiny', copy, show=False, allow_mixed=True, **FEW)
    with pytest.raises(DataError, match='epochs: 1 → 2'):
        run_requests(file, 'tiny', study[0], show=False, allow_mixed=True, **FEW | dict(epochs=2))
