"""A run folder is believed as far as its files are its own: what is gone is made again, what is foreign is refused."""

import json
import os
import shutil
import warnings

import h5py
import pandas as pd
import pytest

from mri_unlearn.cli import main
from mri_unlearn.experiment.protocol import run_protocol
from mri_unlearn.machinery.disk import DataError, data_digest, file_digest
from mri_unlearn.phantom.simulate import simulate_dataset

FEW = dict(epochs=1, rounds=1, steps=2, methods=('sub_ft',), study=(), chans=4, pools=2, show=False, jobs=1)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A finished run, and the folder of its data"
    folder = tmp_path_factory.mktemp('whole')
    people = dict(brain=(2, 2), knee=(3, 2))
    simulate_dataset(folder / 'data', 'tiny', 0, patients=people, coils=2, progress=False)
    run_protocol('tiny', folder / 'run', folder / 'data', **FEW)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    "A copy of the run that a test may change"
    return shutil.copytree(whole / 'run', tmp_path / 'run')


@pytest.fixture
def data(whole, tmp_path):
    "The folder of the data, which is as it was once the test is over"
    kept = shutil.copytree(whole / 'data', tmp_path / 'kept')
    yield whole / 'data'
    shutil.rmtree(whole / 'data')
    shutil.move(kept, whole / 'data')


def tables(run):
    "The tables of a run, without what the clock has put into them"
    paths = sorted(p for p in run.glob('[a-z]*.csv') if p.name not in ('summary.csv', 'work.csv'))
    return {p.name: p.read_bytes() for p in paths}


def start(run, whole):
    return run_protocol('tiny', run, whole / 'data', **FEW)


def refused(run, whole, *words):
    "Starting again is refused with these words, in one line, and nothing is changed"
    before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
    with pytest.raises(DataError) as e:
        start(run, whole)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert '\n' not in str(e.value)
    assert before == {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}


@pytest.mark.parametrize(
    'gone',
    [
        ['stages/oracle_s0.scores.csv'],
        ['stages/oracle_s1.agree.csv', 'stages/score_oracle_s1.json'],
        ['models/oracle_s0.pt'],
        ['models/original.pt', 'stages/unlearned_sub_ft_50pc_s0.trace.csv'],
        ['volumes.csv', 'summary.csv'],
    ],
    ids=lambda gone: gone[0].split('/')[-1],
)
def test_what_is_gone_is_made_again(run, whole, gone):
    for name in gone:
        (run / name).unlink()
    summary = start(run, whole)
    assert (summary.model == 'oracle').sum() == 2
    assert tables(run) == tables(whole / 'run')


def test_images_of_an_oracle_that_are_gone_are_made_again(run, whole):
    image = next((run / 'stages' / 'oracle_s0').glob('*.h5'))
    image.unlink()
    start(run, whole)
    assert image.is_file() and tables(run) == tables(whole / 'run')


@pytest.mark.parametrize(
    'ours, theirs',
    [
        ('models/original.pt', 'models/oracle_s0.pt'),
        ('stages/oracle_s0.scores.csv', 'stages/oracle_s1.scores.csv'),
        ('stages/score_original.json', 'stages/score_oracle_s0.json'),
    ],
)
def test_files_that_are_not_its_own_are_refused(run, whole, ours, theirs):
    shutil.copyfile(run / theirs, run / ours)
    refused(run, whole, ours, 'delete it')


def test_a_stage_of_another_run_is_refused(run, whole):
    path = run / 'stages' / 'score_original.json'
    record = json.loads(path.read_text()) | dict(run='another')
    record.pop('digest')
    path.write_text(json.dumps(record | dict(digest=data_digest(record))))
    refused(run, whole, 'score_original.json', 'belongs to another run')


def test_a_table_that_no_stage_has_left_is_refused(run, whole):
    shutil.copyfile(run / 'stages' / 'oracle_s0.scores.csv', run / 'stages' / 'oracle_s7.scores.csv')
    refused(run, whole, 'oracle_s7.scores.csv', 'no stage of this run')


def test_a_stage_that_this_run_has_not_is_refused(run, whole):
    scores = run / 'stages' / 'oracle_s7.scores.csv'
    shutil.copyfile(run / 'stages' / 'oracle_s0.scores.csv', scores)
    record = dict(run='another', stage='score_oracle_s7', files={'stages/oracle_s7.scores.csv': file_digest(scores)})
    (run / 'stages' / 'score_oracle_s7.json').write_text(
        json.dumps(record | dict(needs={}, digest=data_digest(record)))
    )
    refused(run, whole, 'score_oracle_s7.json')


@pytest.mark.parametrize(
    'name, text, words',
    [
        ('config.json', '{"settings": [1], "data": "simulated"}', 'holds a run with other settings'),
        ('stages/original.json', '{"files": [3]}', 'original.json: damaged, files is [3]; delete it'),
        ('stages/original.json', '{"needs": 3}', 'original.json: damaged, needs is 3; delete it'),
    ],
)
def test_a_record_that_holds_something_else_is_refused(run, whole, name, text, words):
    (run / name).write_text(text)
    refused(run, whole, words)


@pytest.mark.parametrize('text', ['{}', '{"run": 1, "files": [1], "absent": 2}', '[]'])
def test_a_seal_that_holds_something_else_is_made_again(run, whole, text, capsys):
    (run / 'sealed.json').write_text(text)
    assert main(['report', str(run)]) == 1
    assert 'sealed.json: damaged' in capsys.readouterr().err
    start(run, whole)
    assert main(['report', str(run)]) == 0


def test_what_was_edited_in_the_list_of_volumes_is_put_right(run, whole):
    volumes = pd.read_csv(run / 'volumes.csv', dtype=str, keep_default_na=False)
    volumes.assign(rows='9', max='1.0').to_csv(run / 'volumes.csv', index=False)
    start(run, whole)
    assert tables(run) == tables(whole / 'run')


@pytest.mark.parametrize('column', ['organ', 'patient_id', 'acquisition', 'site'])
def test_what_tables_say_of_a_volume_does_not_change(run, whole, column):
    volumes = pd.read_csv(run / 'volumes.csv', dtype=str, keep_default_na=False)
    volumes.loc[0, column] = 'other'
    volumes.to_csv(run / 'volumes.csv', index=False)
    refused(run, whole, f'has the {column}', "and had 'other'")


def test_a_network_that_comes_out_the_same_is_the_same(run, whole):
    "Only what is gone is made again, not what rests on it"
    others = {p: p.stat().st_mtime_ns for p in (run / 'stages').glob('score_*.json')}
    weights = (run / 'models' / 'original.pt').read_bytes()
    (run / 'models' / 'original.pt').unlink()
    start(run, whole)
    assert (run / 'models' / 'original.pt').read_bytes() == weights
    assert others == {p: p.stat().st_mtime_ns for p in others}


@pytest.mark.parametrize('name', ['stages/oracle_s0.scores.csv', 'stages/oracle_s0.json', 'volumes.csv'])
def test_a_file_that_was_cut_is_refused(run, whole, name):
    text = (run / name).read_text()
    (run / name).write_text(text[: len(text) // 2])
    refused(run, whole, name.split('/')[-1])


@pytest.mark.parametrize('name', ['results.csv', 'verdicts.csv', 'summary.csv', 'figures/verdicts.png'])
def test_the_report_is_not_written_from_a_file_that_was_cut(run, whole, name, capsys):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: content.index(b'\n', len(content) // 2) + 1])
    before = (run / 'report.html').read_bytes()
    assert main(['report', str(run)]) == 1
    said = capsys.readouterr().err
    assert name in said and 'start the run again' in said and len(said.strip().splitlines()) == 1
    assert (run / 'report.html').read_bytes() == before
    start(run, whole)
    assert main(['report', str(run)]) == 0 and tables(run) == tables(whole / 'run')


def test_a_table_that_this_run_has_not_is_not_reported(run, capsys):
    (run / 'third.csv').write_text((run / 'verdicts.csv').read_text())
    assert main(['report', str(run)]) == 1
    assert 'third.csv: this run has no such table' in capsys.readouterr().err


@pytest.mark.parametrize('part', ['request', 'settings', 'both'])
def test_another_request_cannot_be_written_over_a_run(run, whole, part, capsys):
    config = json.loads((run / 'config.json').read_text())
    for name in ('request', 'settings') if part == 'both' else (part,):
        config[name]['query'] = "organ == 'brain'"
    (run / 'config.json').write_text(json.dumps(config))
    assert main(['report', str(run)]) == 1
    assert 'config.json: ' in capsys.readouterr().err
    refused(run, whole, 'config.json' if part == 'request' else 'query')


def test_half_files_are_nobodys(run, whole):
    for name in ('figures/.gap_plane.part12345.png', 'stages/.oracle_s0.scores.part1.csv', '.summary.part77.csv'):
        (run / name).touch()
    (run / 'figures' / '.trace.part5.png').mkdir()
    start(run, whole)
    assert main(['report', str(run)]) == 0 and tables(run) == tables(whole / 'run')


@pytest.mark.parametrize('name', ['config.json', 'volumes.csv', 'results.csv', 'sealed.json'])
def test_a_pipe_is_not_waited_for(run, whole, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    refused(run, whole, name)


def test_a_run_of_an_older_version_goes_on(run, whole, capsys):
    (run / 'sealed.json').unlink()
    config = json.loads((run / 'config.json').read_text())
    for name in ('digest', 'threads'):
        config.pop(name)
    config['data'].pop('content')
    (run / 'config.json').write_text(json.dumps(config))
    for path in (run / 'stages').glob('*.json'):
        record = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: v for k, v in record.items() if k not in ('run', 'stage', 'files', 'needs', 'digest')})
        )
    pd.read_csv(run / 'volumes.csv').drop(columns='content').to_csv(run / 'volumes.csv', index=False)
    assert main(['report', str(run)]) == 0
    assert capsys.readouterr().err.count('older version') == 1
    (run / 'stages' / 'score_oracle_s0.json').unlink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        start(run, whole)
    assert sum('older version' in str(w.message) and 'config.json' in str(w.message) for w in said) == 1
    old, new = (pd.read_csv(r / 'results.csv') for r in (run, whole / 'run'))
    pd.testing.assert_frame_equal(old, new)


def keep_times(path, change):
    "Change a file so that size and time of change stay"
    before = path.stat()
    change(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def two_of(data, part):
    return sorted((data / part).glob('*.h5'))[:2]


def test_files_that_were_exchanged_are_found_out(run, whole, data):
    one, two = two_of(data, 'multicoil_train')
    spare = one.with_suffix('.spare')
    one.rename(spare), two.rename(one), spare.rename(two)
    refused(run, whole, f'{one.name} holds another scan; and 1 more', 'put the files back')


def test_a_test_file_that_was_replaced_is_found_out(run, whole, data):
    one, two = two_of(data, 'multicoil_val')
    shutil.copyfile(two, one)
    refused(run, whole, one.name)


def test_a_file_that_was_given_to_another_patient_is_found_out(run, whole, data):
    one, _ = two_of(data, 'multicoil_train')

    def give(path):
        with h5py.File(path, 'a') as f:
            f.attrs.modify('patient_id', f.attrs['patient_id'][:-1] + 'z')

    keep_times(one, give)
    refused(run, whole, one.name)
    (run / 'volumes.csv').unlink()  # and it cannot be talked out of it
    refused(run, whole, 'changed since this run began')


def test_a_file_that_stopped_a_run_can_be_left_out(tmp_path, data, capsys):
    "Nothing was made of the data yet, so the run begins anew without it; once something was, it does not"
    bad = two_of(data, 'multicoil_train')[-1]
    with h5py.File(bad, 'a') as f:
        f['kspace'][0] = float('nan')  # not the slice in the middle, which is looked at
    with pytest.raises(Exception, match=f'{bad.name}.*not finite|{bad.name}.*NaN'):
        run_protocol('tiny', tmp_path / 'run', data, **FEW)
    assert not list((tmp_path / 'run' / 'stages').iterdir())
    bad.unlink()
    with pytest.warns(UserWarning, match='begins anew'):
        run_protocol('tiny', tmp_path / 'run', data, **FEW)
    assert bad.name not in pd.read_csv(tmp_path / 'run' / 'volumes.csv').fname.tolist()
    two_of(data, 'multicoil_train')[0].unlink()
    with pytest.raises(DataError, match='is gone'):
        run_protocol('tiny', tmp_path / 'run', data, **FEW)
