"""Networks are trained once and shared by runs: taken where all that decides them is the same, and never otherwise."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import h5py
import pandas as pd
import pytest
import torch
from conftest import Started, command_here

from mri_unlearn.data.people import Veil
from mri_unlearn.experiment import reuse
from mri_unlearn.experiment.networks import train_network
from mri_unlearn.experiment.protocol import run_protocol
from mri_unlearn.experiment.records import Run
from mri_unlearn.experiment.reuse import KeptNetworks, train_or_take
from mri_unlearn.experiment.runs import load_splits
from mri_unlearn.experiment.settings import prepare
from mri_unlearn.experiment.study import dry_run_requests, run_requests
from mri_unlearn.experiment.tuning import tune
from mri_unlearn.machinery.disk import DataError, read_json
from mri_unlearn.phantom.simulate import simulate_dataset
from mri_unlearn.verdict.names import NetworkName

SMALL = dict(epochs=1, rounds=1, steps=2, methods=('sub_ft',), study=(), chans=4, pools=2)
FEW = SMALL | dict(show=False, jobs=1)
ARGS = '--preset tiny --epochs 1 --rounds 1 --steps 2 --methods sub_ft --study-fractions --jobs 1'.split()
NETWORKS = {'original', 'oracle_s0', 'oracle_s1', 'forget_only'}
ORIGINAL = NetworkName('original')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A folder with data, a run that has trained its networks, and these networks"
    folder = tmp_path_factory.mktemp('whole')
    people = dict(brain=(2, 2), knee=(3, 2))
    simulate_dataset(folder / 'data', 'tiny', 0, patients=people, coils=2, extras=True, progress=False)
    run_protocol('tiny', folder / 'first', folder / 'data', reuse=folder / 'kept', **FEW)
    return folder


@pytest.fixture
def kept(whole, tmp_path):
    "A copy of the networks that a test may change"
    return shutil.copytree(whole / 'kept', tmp_path / 'kept')


def start(out, whole, kept, **more):
    return run_protocol('tiny', out, whole / 'data', reuse=kept, **FEW | more)


def reused(out):
    return set(read_json(out / 'config.json').get('reused', ()))


def tables(run):
    "The tables of a run, without the seconds that its own work took"
    paths = sorted(p for p in run.glob('[a-z]*.csv') if p.name not in ('summary.csv', 'work.csv'))
    found = {p.name: p.read_bytes() for p in paths}
    for name in ('summary.csv', 'work.csv'):
        table = pd.read_csv(run / name)
        clock = [column for column in table if column.startswith('seconds')]
        found[name] = table.assign(**{c: table[c].where(table.model != 'unlearned') for c in clock}).to_csv()
    return found


def entries(kept):
    return sorted(p for p in kept.iterdir() if p.is_dir())


def entry_of(out, kept, stage='original'):
    return kept / read_json(out / 'config.json')['kept'][stage]


def settings_of(**more):
    return prepare('tiny', SMALL | more)


def key_of(whole, veil=None, threads=1, devices=None, network=ORIGINAL, data=None, **more):
    "The name under which a network is kept"
    settings = settings_of(**more)
    splits = load_splits(None, settings, data or whole / 'data', False)
    networks = KeptNetworks(whole / 'kept', veil, devices, threads)
    return networks.place(networks.record(settings, splits, network)).name


def test_a_run_takes_what_another_has_trained(whole, kept, tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError('nothing is to be trained')

    monkeypatch.setattr(reuse, 'train_network', never)
    start(tmp_path / 'second', whole, kept)
    assert reused(tmp_path / 'second') == NETWORKS and reused(whole / 'first') == set()
    assert tables(tmp_path / 'second') == tables(whole / 'first')
    assert (tmp_path / 'second' / 'results.csv').read_bytes() == (whole / 'first' / 'results.csv').read_bytes()
    for stage in NETWORKS:
        one, two = (Run(folder) for folder in (whole / 'first', tmp_path / 'second'))
        assert one.model(stage).read_bytes() == two.model(stage).read_bytes()
        assert one.read(stage) | dict(reused=entry_of(whole / 'first', kept, stage).name) == two.read(stage)
    timing, page = read_json(tmp_path / 'second' / 'timing.json'), (tmp_path / 'second' / 'report.html').read_text()
    assert set(timing['reused']) == NETWORKS and 'Not trained in this run' in page and str(kept) not in page
    assert 'Not trained in this run' not in (whole / 'first' / 'report.html').read_text()


def test_a_run_without_the_folder_has_the_same_tables(whole, tmp_path):
    run_protocol('tiny', tmp_path / 'alone', whole / 'data', **FEW)
    same = {n: t for n, t in tables(whole / 'first').items() if n not in ('summary.csv', 'work.csv')}
    assert {n: t for n, t in tables(tmp_path / 'alone').items() if n in same} == same
    assert not {'reused', 'kept'} & set(read_json(tmp_path / 'alone' / 'config.json'))


def test_another_request_takes_the_original(whole, kept, tmp_path):
    before = len(entries(kept))
    start(tmp_path / 'patient', whole, kept, query="patient_id == 'k0001'")
    assert reused(tmp_path / 'patient') == {'original'} and len(entries(kept)) == before + 2
    start(tmp_path / 'again', whole, kept, query="patient_id == 'k0001'", methods=('ga',))
    assert reused(tmp_path / 'again') == {'original', 'oracle_s0', 'oracle_s1'}  # of another method, too


def test_other_scans_under_the_same_names_are_other_networks(whole, tmp_path):
    data = shutil.copytree(whole / 'data', tmp_path / 'data')
    assert key_of(whole, data=data) == key_of(whole)  # wherever they lie
    scan = next(data.rglob('k0001*.h5'), None) or sorted(data.rglob('*train*/*.h5'))[-1]
    with h5py.File(scan, 'r+') as f:
        f['kspace'][...] *= 1.01
    assert key_of(whole, data=data) != key_of(whole)


def test_another_name_of_a_file_is_another_mask(whole, tmp_path):
    data = shutil.copytree(whole / 'data', tmp_path / 'data')
    scan = sorted(data.rglob('*train*/*.h5'))[0]
    scan.rename(scan.with_name('a' + scan.name))
    assert key_of(whole, data=data) != key_of(whole)


@pytest.mark.parametrize('more', [dict(epochs=2), dict(seed=5), dict(lr=1e-3), dict(acceleration=8), dict(chans=6)])
def test_other_settings_are_other_networks(whole, more):
    assert key_of(whole, **more) != key_of(whole)


def test_what_decides_nothing_changes_nothing(whole):
    same = dict(methods=('ga',), rounds=3, oracle_seeds=4, reason='x', query="patient_id == 'k0001'")
    veil = Veil.with_key()
    assert key_of(whole, veil, **same) == key_of(whole, veil) == entry_of(whole / 'first', whole / 'kept').name
    assert key_of(whole, veil) != key_of(whole)


def test_another_program_or_machine_makes_other_networks(whole, tmp_path, monkeypatch):
    own = key_of(whole)
    assert key_of(whole, threads=3) != own and key_of(whole, veil=Veil.with_key(tmp_path / 'key')) != own
    with monkeypatch.context() as other:
        other.setattr(torch, '__version__', '1.0')
        assert key_of(whole) != own
    with monkeypatch.context() as other:
        other.setattr(reuse, '_device_kind', lambda device: 'another')
        assert key_of(whole) != own
    with monkeypatch.context() as other:
        other.setattr(reuse, 'training_code', lambda: 'another')
        assert key_of(whole) != own
    assert key_of(whole) == own


def test_the_program_counts_where_it_decides(tmp_path):
    package = shutil.copytree(Path(reuse.__file__).parent.parent, tmp_path / 'copy')
    one = reuse.training_code(package)

    def after(name, old, new):
        reuse.training_code.cache_clear()
        path = package / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return reuse.training_code(package)

    assert one == reuse.training_code()
    assert after('show/page.py', 'What it cost', 'What it took') == one
    assert after('network/unet.py', '"""fastMRI', '"""This is fastMRI') == one
    assert after('network/unet.py', '0.2', '0.3') != one


@pytest.mark.parametrize('name', ['models/network.pt', 'stages/network.json', 'config.json'])
def test_an_edited_network_is_refused(whole, kept, tmp_path, name):
    path = entry_of(whole / 'first', kept) / name
    text = path.read_bytes()
    path.write_bytes(text.replace(b'1', b'2') if name.endswith('json') else text[:-1] + bytes([text[-1] ^ 1]))
    with pytest.raises(DataError) as e:
        start(tmp_path / 'second', whole, kept)
    assert str(entry_of(whole / 'first', kept)) in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path / 'second' / 'models' / 'original.pt').exists()


@pytest.fixture
def one_network(whole, kept):
    "The Original that is kept, its run, and what asks for it"
    run = Run(whole / 'first', veil=Veil.with_key())
    networks = KeptNetworks(kept, run.veil, threads=run.threads)
    splits = load_splits(None, settings_of(), whole / 'data', False)
    return SimpleNamespace(
        entry=entry_of(run.out, kept), run=run, networks=networks, about=(settings_of(), splits, ORIGINAL)
    )


@pytest.mark.parametrize('name', ['models/network.pt', 'stages/network.json', 'config.json'])
def test_a_network_that_is_not_whole_is_made_whole(one_network, tmp_path, name):
    one, other = one_network, Run(tmp_path / 'run')
    whole = (one.entry / 'models' / 'network.pt').read_bytes()
    (one.entry / name).unlink()
    assert one.networks.take(other, *one.about) is False and not other.done('original')
    one.networks.put(one.run, *one.about)
    assert one.networks.take(other, *one.about) is True
    assert other.model('original').read_bytes() == whole and other.done('original')


def _killed_while_writing(first, kept, settings, splits):
    def half(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

    reuse.shutil.copyfile = half
    KeptNetworks(kept).put(Run(first), settings, splits, ORIGINAL)


def test_a_run_that_is_killed_while_it_writes(whole, tmp_path):
    settings, kept = settings_of(), tmp_path / 'kept'
    splits = load_splits(None, settings, whole / 'data', False)
    KeptNetworks(kept).claim_folder()
    process = multiprocessing.get_context('fork').Process(
        target=_killed_while_writing, args=(whole / 'first', kept, settings, splits)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(kept.glob('*/models/.*'))) == 1
    assert KeptNetworks(kept).take(Run(tmp_path / 'run'), settings, splits, ORIGINAL) is False
    KeptNetworks(kept).put(Run(whole / 'first'), settings, splits, ORIGINAL)
    assert KeptNetworks(kept).take(Run(tmp_path / 'run'), settings, splits, ORIGINAL) is True
    assert not list(kept.glob('*/models/.*'))


def test_two_runs_at_once(whole, tmp_path):
    kept, outs = tmp_path / 'kept', [tmp_path / 'one', tmp_path / 'two']
    said = [tmp_path / 'says' / out.name for out in outs]
    for folder in said:
        folder.mkdir(parents=True)
    given = ['--data', whole / 'data', '--identifiers', '--reuse', kept]
    both = [Started(folder, 'protocol', '--out', out, *given, *ARGS) for folder, out in zip(said, outs)]
    for run in both:
        done = run.finish(timeout=300)
        assert done.returncode == 0, done.stderr
    assert outs[0].joinpath('results.csv').read_bytes() == outs[1].joinpath('results.csv').read_bytes()
    assert len(entries(kept)) == len(NETWORKS) and not list(kept.glob('*/*/.*part*'))
    for entry in entries(kept):
        Run(entry).check('network')
    assert command_here('protocol', '--out', tmp_path / 'three', *given, *ARGS).returncode == 0
    assert reused(tmp_path / 'three') == NETWORKS


def test_a_training_that_another_program_began_is_not_kept(whole, tmp_path, monkeypatch):
    settings, silent = settings_of(epochs=2), type('', (), dict(say=print, step=lambda self, n: None))()
    splits = load_splits(None, settings, whole / 'data', False)

    class Killed(Exception):
        "What ends the training after its first epoch"

    def one_epoch(run, settings, *more):
        train_network(run, settings, *more)
        run.record('original').unlink()
        run.model('original').rename(run.state('original'))
        raise Killed

    def whole_training(run, settings, *more):
        run.state('original').unlink()
        train_network(run, settings, *more)

    for other, count in ((False, 1), (True, 0)):
        run, networks = Run(tmp_path / f'run{count}'), KeptNetworks(tmp_path / f'kept{count}', threads=1)
        networks.claim_folder()
        with monkeypatch.context() as first:
            first.setattr(reuse, 'train_network', one_epoch)
            with pytest.raises(Killed):
                train_or_take(networks, run, settings, ORIGINAL, splits, silent)
        if other:
            networks = KeptNetworks(tmp_path / f'kept{count}', threads=2)
        with monkeypatch.context() as then:
            then.setattr(reuse, 'train_network', whole_training)
            train_or_take(networks, run, settings, ORIGINAL, splits, silent)
        assert run.done('original') and len(entries(networks.folder)) == count
        assert not list(run.out.glob('stages/*.begun'))


def test_a_folder_of_anything_else_is_refused(whole, tmp_path):
    for folder, words in ((whole / 'data', 'holds'), (tmp_path / 'run', 'own'), (tmp_path / 'run' / 'x', 'own')):
        with pytest.raises(DataError, match=words):
            start(tmp_path / 'run', whole, folder)
        assert not (tmp_path / 'run').exists()


def test_a_folder_that_cannot_be_written_to_ends_no_run(one_network):
    shutil.rmtree(one_network.entry)
    one_network.entry.write_text('in the way')
    with pytest.warns(UserWarning, match='trained and not kept'):
        one_network.networks.put(one_network.run, *one_network.about)


def test_a_dry_run_says_what_is_at_hand(whole, kept, tmp_path):
    line = ['protocol', '--data', whole / 'data', '--identifiers', '--dry-run', *ARGS]
    none = command_here(*line, '--reuse', tmp_path / 'nothing').stdout
    assert 'networks at hand in the folder of --reuse: 0' in none and not (tmp_path / 'nothing').exists()
    assert 'at hand' not in command_here(*line).stdout
    shared = tmp_path / 'shared'
    assert command_here('protocol', '--out', tmp_path / 'run', *line[1:4], '--reuse', shared, *ARGS).returncode == 0
    some = command_here(*line, '--reuse', shared)
    assert 'networks at hand in the folder of --reuse: 4' in some.stdout, some.stderr
    row = next(text.split() for text in some.stdout.splitlines() if text.split()[:1] == ['oracle_s0'])
    assert row[2:4] == ['0', '0']
    simulated = command_here('protocol', '--dry-run', '--out', tmp_path / 'new', '--reuse', shared, *ARGS).stdout
    assert 'known once the data are simulated' in simulated


def test_a_study_takes_and_gives(whole, tmp_path):
    file, kept = tmp_path / 'requests.txt', tmp_path / 'kept'
    file.write_text("patient_id == 'k0001'\npatient_id == 'k0002'\n")
    about = FEW | dict(data=whole / 'data', reuse=kept)
    run_requests(file, 'tiny', tmp_path / 'one', **about)
    assert len(entries(kept)) == 5  # one Original, two Oracles of each
    plan = {k: v for k, v in about.items() if k != 'show'}
    planned, alone = (dry_run_requests(file, 'tiny', **plan | dict(reuse=r))[0] for r in (kept, None))
    assert planned.shared.tolist() == [3, 3] and alone.shared.tolist() == [0, 1]
    assert (alone.networks - planned.networks).tolist() == [3, 2]
    table = run_requests(file, 'tiny', tmp_path / 'two', **about)
    assert len(table) and all(len(reused(p.parent)) == 3 for p in (tmp_path / 'two').glob('*/config.json'))
    for one in (tmp_path / 'one').glob('*/results.csv'):
        assert one.read_bytes() == (tmp_path / 'two' / one.parent.name / 'results.csv').read_bytes()


def test_a_rehearsal_takes_and_gives(tmp_path):
    trials = dict(sub_ft=[dict(lr=1e-3)])
    few = {k: v for k, v in FEW.items() if k not in ('methods', 'study')}
    one, two = (tune(tmp_path / n, 'tiny', trials=trials, reuse=tmp_path / 'kept', **few) for n in ('one', 'two'))
    pd.testing.assert_frame_equal(one, two)
    assert reused(tmp_path / 'two') == {'original', 'oracle_s0', 'oracle_s1'} and reused(tmp_path / 'one') == set()


def test_the_planted_arm_and_shadows_take_and_give(whole, tmp_path):
    more = dict(hallucination=('sub_ft',), shadows=2, attacked=('sub_ft',), oracle_seeds=1)
    for name in ('one', 'two'):
        start(tmp_path / name, whole, tmp_path / 'kept', **more)
    found = reused(tmp_path / 'two')
    assert {'planted: original', 'planted: oracle_s0', 'shadows: shadow_00', 'shadows: shadow_01'} < found
    for name in ('results.csv', 'privacy.csv', 'planted.csv', 'hallucination.csv'):
        one, two = (tmp_path / folder / name for folder in ('one', 'two'))
        assert one.exists() == two.exists() and (not one.exists() or one.read_bytes() == two.read_bytes())
    assert (tmp_path / 'one' / 'privacy.csv').exists()


def test_networks_can_be_purged(whole, kept, tmp_path):
    (kept / 'mine.txt').write_text('not of a run')
    listed = command_here('purge', kept)
    assert 'networks for later runs (16 files)' in listed.stdout and 'mine.txt' in listed.stdout, listed.stderr
    assert len(entries(kept)) == 4  # nothing was removed
    assert command_here('purge', kept, '--yes').returncode == 0
    assert sorted(p.name for p in kept.iterdir() if p.name[0] != '.') == ['kept.json', 'mine.txt', 'purged.json']
    start(tmp_path / 'second', whole, kept)
    assert reused(tmp_path / 'second') == set() and len(entries(kept)) == 4
    assert 'purge that one, too' in command_here('purge', tmp_path / 'second').stdout


def test_networks_that_have_seen_a_person_can_be_purged(whole, kept):
    brain = entry_of(whole / 'first', kept, 'oracle_s0')
    names = {name for entry in entries(kept) for name in read_json(entry / 'config.json')['people']}
    assert all(name.startswith('person-') for name in names)
    said = command_here('purge', kept, '--patient', 'K0001', '--yes')
    assert said.returncode == 0 and brain.is_dir(), said.stderr
    assert set(entries(kept)) == {brain, entry_of(whole / 'first', kept, 'oracle_s1')}
    assert 'nothing to remove' in command_here('purge', kept, '--patient', 'k0001').stdout
    wrong = command_here('purge', kept, '--patient', 'b0001', '--key', kept.parent / 'none.key')
    assert wrong.returncode and 'none.key' in wrong.stderr and brain.is_dir()
    Veil.with_key(kept.parent / 'other.key')
    wrong = command_here('purge', kept, '--patient', 'b0001', '--key', kept.parent / 'other.key')
    assert wrong.returncode and '--key' in wrong.stderr and brain.is_dir()
    config = read_json(brain / 'config.json')
    (brain / 'config.json').write_text(json.dumps(config | dict(people=[])))
    assert 'was edited' in command_here('purge', kept, '--patient', 'b0001').stderr


def test_no_name_is_written(whole):
    for path in (p for p in (whole / 'kept').rglob('*') if p.is_file()):
        text = str(path.relative_to(whole)).encode() + path.read_bytes()
        for scan in (whole / 'data').rglob('*.h5'):
            assert scan.stem.encode() not in text and scan.stem[:5].encode() not in text, path
    assert (whole / 'kept').stat().st_mode & 0o077 == 0


def test_the_key_of_the_pseudonyms_lies_elsewhere(whole, tmp_path):
    with pytest.raises(DataError, match='keep it elsewhere'):
        start(tmp_path / 'run', whole, tmp_path / 'kept', key=tmp_path / 'kept' / 'key')


def test_help_says_it():
    for command in ('protocol', 'tune'):
        said = ' '.join(command_here(command, '--help').stdout.split())
        assert '--reuse DIR' in said and 'runs/networks' in said
    assert '--patient' in command_here('purge', '--help').stdout
