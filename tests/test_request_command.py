"""A letter, from the command line to the record: carried out, killed, locked, verified, chained, undone and refused."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import jsonschema
import pytest
from conftest import Started
from test_identifiers import WORD, leaks, rename
from test_request_safety import files, here

from mri_unlearn.audit.job import Job
from mri_unlearn.audit.page import _again
from mri_unlearn.audit.record import add_entry, last_entry, read_record, record_schema
from mri_unlearn.command.options import OptionParser
from mri_unlearn.command.request import add_commands, job_asked
from mri_unlearn.data.loaders import recon_dls
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.network.learner import SkipValidation, recon_learner
from mri_unlearn.network.lineage import forgotten_by
from mri_unlearn.network.weights import load_network, new_unet, save_weights
from mri_unlearn.phantom.simulate import simulate_dataset

PEOPLE = dict(brain=(4, 3), knee=(4, 3))
OWN = """
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, chans=6):
        super().__init__()
        layers = [nn.Conv2d(1, chans, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(chans, chans, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(chans, 1, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class Halves(Plain):
    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.ones(1))

    def forward(self, x):
        if x.shape[-1] % 32 or x.shape[-2] % 32:
            raise ValueError('five halves do not fit')
        return super().forward(x)


class Empty(nn.Module):
    pass
"""


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Scans whose patients and files have telling names, and a network that was trained on them for a moment"
    folder = tmp_path_factory.mktemp('home')
    about = dict(slices=2, recon=48, coils=2, workers=1, progress=False)
    simulate_dataset(folder / 'plain', 'small', seed=5, patients=PEOPLE, **about)
    index = index_volumes(folder / 'plain', cache=False)
    for i, row in enumerate(index.itertuples()):
        to = folder / 'scans' / row.folder / f'{WORD}_{i:02d}_{row.organ}.h5'
        rename(folder / 'plain' / row.folder / row.fname, f'{WORD}-{row.patient_id}', to)
    index = index_volumes(folder / 'scans', cache=False)
    train = index[index.folder.str.endswith('train')]
    dls = recon_dls(train, train.head(1), bs=1, seed=0, device='cpu')
    learn = recon_learner(dls, new_unet(0, chans=6), cbs=SkipValidation())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(5, 2e-3)
    save_weights(learn.model, folder / 'net.pt')
    save_weights(new_unet(0, chans=2, num_pool_layers=1), folder / 'small.pt')
    (folder / 'ours.py').write_text(OWN)
    return folder


def patient(number, organ='k'):
    return f'{WORD}-{organ}{number:04d}'


def asked(number=3, out='requests/one', *more):
    "Words of a check"
    return [
        'request',
        'check',
        '--model',
        'net.pt',
        '--data',
        'scans',
        '--retain-fraction',
        '0.5',
        '--out',
        out,
        *more,
    ] + (['--forget', f"patient_id == '{patient(number)}'"] if number else [])


@pytest.fixture(scope='module')
def one(home):
    "A request, carried out by processes of their own; what they printed"
    said = []
    for words in (asked(3, 'requests/one', '--reason', f'letter of {patient(3)}'), ['request', 'run', 'requests/one']):
        p = Started(home, *words, cwd=home).finish(timeout=300)
        assert 'error' not in p.stderr and 'Traceback' not in p.stderr, p.stderr
        said.append((p.returncode, p.stdout))
    return said


def test_from_the_letter_to_the_record(home, one):
    (checked, plan), (status, done) = one
    assert checked == 0 and status in (0, 3, 4, 5)
    assert 'matched: 2 scans of 1 person, 2 of them in training' in plan and 'level to end at: memory' in plan
    record = read_record(home / 'requests/one')
    jsonschema.validate(record, record_schema())
    assert [e['verb'] for e in record['entries']] == ['check', 'run']
    assert record['entries'][-1]['verdict']['status'] == status and record['entries'][-1]['state'] == 'unlearned'
    assert (home / 'requests/one/report.html').is_file()
    before, after = (load_network(home / 'requests/one' / name) for name in ('before.pt', 'unlearned.pt'))
    assert not forgotten_by(before) and forgotten_by(after)[0].record == record['entries'][0]['digest']


def test_nobody_is_named_in_what_is_left_or_printed(home, one):
    assert leaks(home / 'requests') == []
    assert not any(WORD in text for _, text in one)


def test_with_identifiers_names_are_found(home):
    status, out, err = here(home, *asked(3, 'named/one', '--identifiers'))
    assert status == 0, err
    assert 'record.json' in ' '.join(leaks(home / 'named')) and WORD in out


def test_what_is_left_is_for_its_owner_alone(home, one):
    modes = {p.stat().st_mode & 0o077 for p in (home / 'requests/one').rglob('*') if p.is_file()}
    assert modes == {0} and (home / 'requests/one').stat().st_mode & 0o077 == 0


def test_a_run_that_is_done_is_not_done_again(home, one):
    before = files(home / 'requests/one')
    assert here(home, 'request', 'run', 'requests/one')[0] == one[1][0]
    after = files(home / 'requests/one')
    assert {p.name for p in after if before.get(p) != after[p]} <= {'report.html', 'request.png'}


def test_somebody_else_verifies_it(home, one, tmp_path):
    status, out, err = here(home, 'request', 'verify', 'requests/one')
    assert status == one[1][0], err
    assert 'as recorded: weights: the same to the last bit' in out and 'NOT' not in out
    copy = tmp_path / 'copy'
    shutil.copytree(home / 'requests/one', copy)
    shutil.copy(copy / 'before.pt', copy / 'unlearned.pt')
    status, out, _ = here(home, 'request', 'verify', copy, '--no-replay')
    assert status == 1 and 'NOT as recorded: unlearned.pt' in out


def test_killed_anywhere_it_goes_on_and_ends_the_same(home, one):
    "The weights after a run that was killed three times are those of one that was not"
    assert here(home, *asked(3, 'requests/killed'))[0] == 0
    folder, give_up = home / 'requests/killed', time.time() + 120
    for left in ('record.json', 'before.pt', 'done.json'):  # while it unlearns, between what it writes, while it scores
        p = Started(home, 'request', 'run', folder, cwd=home)
        time.sleep(0.5)
        while not (folder / left).exists():
            assert p.status() is None and time.time() < give_up, (left, p.said())
            time.sleep(0.02)
        assert p.status() is None, p.said()
        os.kill(p.pid, signal.SIGKILL)
        assert p.finish().returncode == -signal.SIGKILL
        read_record(folder)
    assert here(home, 'request', 'run', 'requests/killed')[0] == one[1][0]
    ends = [last_entry(read_record(home / 'requests' / name), 'run') for name in ('one', 'killed')]
    assert ends[0]['weights'] == ends[1]['weights'] and not list((home / 'requests/killed').glob('.*part*'))


def test_one_process_at_a_time(home, one):
    held = 'import sys, time; from mri_unlearn.machinery.private import locked\nwith locked("requests/one"):\n'
    held += '    print("held", flush=True); time.sleep(60)'
    p = subprocess.Popen([sys.executable, '-c', held], cwd=home, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'held\n'
        status, _, err = here(home, 'request', 'verify', 'requests/one')
        assert status == 1 and 'at work in this folder' in err
    finally:
        p.kill()
        p.wait()
    assert here(home, 'request', 'verify', 'requests/one', '--no-replay')[0] == one[1][0]


def test_a_second_letter_does_not_bring_the_first_back(home, one):
    words = ['request', 'check', '--model', 'requests/one/unlearned.pt', '--data', 'scans', '--out', 'requests/two']
    status, out, err = here(home, *words, '--forget', f"patient_id == '{patient(4)}'")
    assert status == 0 and 'was made to forget 1 person before' in out, err
    assert here(home, 'request', 'run', 'requests/two')[0] in (0, 3, 4, 5)
    first, second = (read_record(home / 'requests' / name) for name in ('one', 'two'))
    assert second['entries'][0]['follows'] in {e['digest'] for e in first['entries']}
    gone = first['entries'][0]['matched']['scans']
    assert not set(gone) & {line.split(',')[0] for line in (home / 'requests/two/scores.csv').read_text().splitlines()}
    again = ['--forget', f"patient_id == '{patient(3)}'"]
    status, _, err = here(home, *words[:-1], 'requests/again', *again)
    assert status == 1 and 'made to forget them before' in err


def test_unlearn_knows_the_first_letter_too(home, one):
    words = ['unlearn', '--model', 'requests/one/unlearned.pt', '--data', 'scans', '--method', 'sub_ft', '--steps', '1']
    words += ['--retain-fraction', '1', '--forget', f"patient_id == '{patient(4)}'", '--out', 'after.pt']
    status, _, err = here(home, *words)
    assert status == 0 and 'made to forget them before' in err
    assert [len(entry.people) for entry in forgotten_by(load_network(home / 'after.pt'))] == [1, 1]
    record = (home / 'after.json').read_text()
    assert WORD not in record and json.loads(record)['request']['query'].startswith('patient_id == ')


def test_several_queries_are_united(home):
    more = ['--forget', f"patient_id == '{patient(1)}'", '--forget', f"patient_id == '{patient(2)}'"]
    status, out, err = here(home, *asked(None, 'requests/several', *more))
    assert status == 0 and 'of 2 people' in out, err


def test_a_list_of_studies(home, tmp_path):
    scans = tmp_path / 'scans'
    shutil.copytree(home / 'scans', scans)
    for i, path in enumerate(sorted(scans.rglob('*.h5'))):
        with h5py.File(path, 'r+') as f:
            study = f'<studyInformation><studyInstanceUID>1.2.840.{i}</studyInstanceUID>'
            xml = f['ismrmrd_header'][()].replace(b'<studyInformation>', study.encode())
            del f['ismrmrd_header']
            f['ismrmrd_header'] = xml
    index = index_volumes(scans, cache=False)
    row = index[index.folder.str.endswith('train')].iloc[0]
    studies = index.study[index.patient_id == row.patient_id]
    (tmp_path / 'letter.csv').write_text('StudyInstanceUID\n' + '\n'.join([*studies, '1.2.840.999']) + '\n')
    words = ['request', 'check', '--model', 'net.pt', '--data', scans, '--forget-list', tmp_path / 'letter.csv']
    status, out, err = here(home, *words, '--out', tmp_path / 'asked')
    assert status == 0 and f'({len(studies) + 1} names in the list)' in out, err
    assert 'match nothing: study: study-' in out and '1.2.840' not in out


def test_undo_and_finalise(home, one, tmp_path):
    folder = home / 'requests/undone'
    shutil.copytree(home / 'requests/one', folder)
    places = ['--model', 'net.pt', '--data', 'scans']
    assert here(home, 'request', 'undo', folder)[0] == 0
    assert not (folder / 'unlearned.pt').exists() and (folder / 'before.pt').is_file()
    assert here(home, 'request', 'finalise', folder, *places)[0] == 1
    other = home / 'requests/final'
    shutil.copytree(home / 'requests/one', other)
    status, out, err = here(home, 'request', 'finalise', other, *places)
    assert (
        status == 0 and 'deleted: before.pt' in out and 'left, and not deleted here: file of the network before' in out
    )
    assert not (other / 'before.pt').exists()
    jsonschema.validate(read_record(other), record_schema())
    assert here(home, 'request', 'undo', other)[0] == here(home, 'request', 'run', other)[0] == 1
    assert here(home, 'request', 'verify', other, '--data', 'scans')[0] in (0, 3, 4, 5)
    assert here(home, 'report', other)[0] == 0


def test_a_network_of_ones_own(home, monkeypatch):
    monkeypatch.syspath_prepend(str(home))
    import ours

    save_weights(ours.Halves(), home / 'own.pt')
    words = [
        'request',
        'check',
        '--model',
        'own.pt',
        '--network',
        'ours:Halves',
        '--multiple',
        '32',
        '--data',
        'scans',
        '--retain-fraction',
        '0.5',
    ]
    status, out, err = here(home, *words, '--out', 'requests/own', '--forget', f"patient_id == '{patient(3)}'")
    idle = 'these weights never move, for the answer does not depend on them: idle'
    assert status == 0 and err.count(idle) == 1 and 'has changed nothing' not in err, err
    status, out, err = here(home, 'request', 'run', 'requests/own')
    assert status in (0, 3, 4, 5) and 'state: unlearned' in out and err.count(idle) == 1, err
    assert idle in (home / 'requests/own/report.html').read_text()
    assert here(home, 'request', 'verify', 'requests/own')[0] == status
    record = read_record(home / 'requests/own')['entries'][0]
    assert record['network']['kind'] == 'Halves' and record['job']['network'] == 'ours:Halves'
    assert record['job']['multiple'] == 32


USUAL = Job('net.pt', ('scans',))
ODD = dict(network='ours:Plain', arguments={'chans': 5, 'word': "it's"}, takes='complex image + mask', gives='kspace')
ODD |= dict(multiple=16, settings=dict(level=2.5, part='decoder'), rounds=2, lr=0.000123456789, clip=None, batch_size=2)
ODD |= dict(mask='random', division='none', allow_mixed=True, strict=True, organ='knee', device='cpu', seed=7)


@pytest.mark.parametrize('query', ["patient_id == 'k0003'", 'patient_id == "k0003"', "site == '`a` $b'"])
@pytest.mark.parametrize('job', [USUAL, replace(USUAL, **ODD)])
def test_what_the_page_says_repeats_the_request(job, query):
    parser = OptionParser()
    add_commands(parser.add_subparsers())
    words = shlex.split(_again(dict(job=job.public(), asked=dict(query=query))).partition(' && ')[0])[1:]
    for option, value in (('--model', job.model), ('--data', *job.data)):
        words[words.index(option) + 1] = value
    args = parser.parse_args(words)
    assert job_asked(args) == job and args.forget == [query]


def test_oracles_decide(home, tmp_path):
    for seed in (1, 2, 3):
        save_weights(new_unet(seed, chans=6), home / f'oracle{seed}.pt')  # that never learnt anything
    oracles = [word for seed in (1, 2, 3) for word in ('--oracle', f'oracle{seed}.pt')]
    assert here(home, *asked(3, 'requests/oracles', '--method', 'sub_ft', *oracles))[0] == 0
    status, out, err = here(home, 'request', 'run', 'requests/oracles')
    assert status == 4 and 'against the Oracles: ' in out and 'under-forgotten' in out, (out, err)


BAD = {  # what is wrong -> words, what the one line says
    'nobody of that name': (asked(99, 'bad/x'), 'matches none of the'),
    'everybody': (asked(None, 'bad/x', '--forget', 'slices > 0'), 'matches all'),
    'only strangers': (asked(None, 'bad/x', '--forget', "folder == 'multicoil_val'"), 'none of it is for training'),
    'half a patient': (
        asked(None, 'bad/x', '--forget', "acquisition == 'CORPD_FBK'"),
        'some of the volumes but not all',
    ),
    'code for a query': (asked(None, 'bad/x', '--forget', "__import__('os').system('id')"), 'cannot be called'),
    'no such column': (asked(None, 'bad/x', '--forget', "pateint_id == 'a'"), 'patient_id'),
    'an open quote': (asked(None, 'bad/x', '--forget', "patient_id == 'a"), 'not closed'),
    'a date that is none': (asked(3, 'bad/x', '--received', 'yesterday'), 'the date of the letter'),
    'a letter from the future': (asked(3, 'bad/x', '--received', '2999-01-01'), 'the date of the letter'),
    'no list': (asked(None, 'bad/x', '--forget-list', 'none.csv'), 'none.csv'),
    'a folder for a list': (asked(None, 'bad/x', '--forget-list', 'scans'), 'cannot be read'),
    'weights for a list': (asked(None, 'bad/x', '--forget-list', 'net.pt'), 'net.pt'),
    'a script for a list': (asked(None, 'bad/x', '--forget-list', 'ours.py'), 'none of its'),
    'no such method': (asked(3, 'bad/x', '--method', 'poxy'), 'proxy'),
    'a setting of another method': (asked(3, 'bad/x', '--set', 'lam=1'), 'lam'),
    'a level for a method that takes none': (asked(3, 'bad/x', '--method', 'nl_ft', '--level', '3'), 'level'),
    'a device that is not there': (asked(3, 'bad/x', '--device', 'cuda:99'), 'is not there'),
    'scans for the folder': (asked(3, 'scans'), 'holds the scans'),
    'a file for the folder': (asked(3, 'net.pt'), 'is no folder'),
    'a folder with other files': (asked(3, '.'), 'of no request'),
    'the key within the folder': (asked(3, 'bad/x', '--key', 'bad/x/my.key'), 'keep it elsewhere'),
    'a key that is none': (asked(3, 'bad/x', '--key', 'ours.py'), 'no key of pseudonyms'),
    'a child that is not there': (asked(3, 'bad/x', '--child', 'gone.pt'), 'gone.pt'),
    'an Oracle that is not there': (asked(3, 'bad/x', '--oracle', 'none.pt'), 'none.pt'),
    'an Oracle of another size': (
        asked(3, 'bad/x', '--oracle', 'small.pt'),
        'small.pt: is no UNet of the size of net.pt',
    ),
    'an Oracle that is the network': (asked(3, 'bad/x', '--oracle', 'net.pt'), 'never saw the scans'),
    'arguments without a network': (asked(3, 'bad/x', '--network-args', '{"chans": 3}'), 'goes with --network'),
    'a multiple without a network': (asked(3, 'bad/x', '--multiple', '16'), '--multiple goes with --network'),
    'a factory that is not there': (asked(3, 'bad/x', '--network', 'ours:Nothing'), 'Nothing'),
    'a module that is not there': (asked(3, 'bad/x', '--network', 'theirs:Net'), 'theirs'),
    'a network without weights': (asked(3, 'bad/x', '--network', 'ours:Empty'), 'none of the 0 weights'),
    'weights of another network': (asked(3, 'bad/x', '--network', 'ours:Plain'), 'net.pt'),
    'a run of nothing': (['request', 'run', 'nowhere'], 'holds no record.json'),
    'a run of scans': (['request', 'run', 'scans'], 'holds no record.json'),
    'verify before run': (['request', 'verify', 'requests/several'], 'nothing to verify'),
    'undo before run': (['request', 'undo', 'requests/several'], 'nothing to undo'),
    'finalise before run': (['request', 'finalise', 'requests/several'], 'only what is carried out'),
    'a check of what is carried out': (asked(3), 'was carried out'),
    'a report of nothing': (['report', 'scans'], 'scans'),
}
OTHER = {  # argparse reports these
    'two kinds of letters': (asked(3, 'bad/x', '--forget-list', 'a.csv'), 'not allowed with'),
    'no letter': (asked(None, 'bad/x'), 'required'),
    'no verb': (['request'], 'VERB'),
    'another verb': (['request', 'delete', 'x'], 'invalid choice'),
    'passes below zero': (asked(3, 'bad/x', '--passes', '-1'), 'passes'),
    'JSON that is none': (asked(3, 'bad/x', '--network', 'ours:Plain', '--network-args', '{chans}'), 'JSON'),
}


@pytest.mark.parametrize('what', [*BAD, *OTHER])
def test_bad_input_gets_one_line_and_nothing_is_lost(home, one, what, monkeypatch):
    monkeypatch.syspath_prepend(str(home))
    if not (home / 'requests/several').is_dir():
        test_several_queries_are_united(home)
    words, says = {**BAD, **OTHER}[what]
    before = files(home)
    status, out, err = here(home, *words)
    lines = [line for line in err.strip().splitlines() if line.startswith('error')]
    assert status == (2 if what in OTHER else 1) and len(lines) == 1 and says in lines[0], (status, out, err)
    assert 'fault of the program' not in err and out == ''
    assert {p: raw for p, raw in files(home).items() if p in before} == before
    assert not [p for p in home.rglob('*') if p.name == 'record.json' and p not in before]


def test_changed_scans_and_edited_records_are_found(home, one, tmp_path):
    folder = home / 'requests/changed'
    assert here(home, *asked(3, folder))[0] == 0
    scan = sorted((home / 'scans').rglob('*_val/*.h5'))[0]
    os.rename(scan, tmp_path / scan.name)
    try:
        status, _, err = here(home, 'request', 'run', folder)
        assert status == 1 and 'have changed since the check' in err
    finally:
        os.rename(tmp_path / scan.name, scan)
    with h5py.File(scan, 'r+') as f:
        middle = f['kspace'].shape[0] // 2
        was = f['kspace'][middle]
        f['kspace'][middle] = was * 2
    try:
        status, _, err = here(home, 'request', 'run', folder)
        assert status == 1 and 'have changed since the check' in err
    finally:
        with h5py.File(scan, 'r+') as f:
            f['kspace'][middle] = was
    text = (folder / 'record.json').read_text()
    (folder / 'record.json').write_text(text.replace('"volumes": 2', '"volumes": 3'))
    status, _, err = here(home, 'request', 'run', folder)
    assert status == 1 and 'is not as it was written' in err


COMMON = 'verb at state previous digest'.split()  # of every entry


def test_undo_and_finalise_delete_nothing_where_the_other_file_is_gone(home, one, tmp_path):
    before, after = 'before.pt', 'unlearned.pt'
    for verb, name, other in (('undo', before, None), ('undo', before, after), ('finalise', after, before)):
        folder = tmp_path / f'{verb}{bool(other)}'
        shutil.copytree(home / 'requests/one', folder)
        (folder / name).unlink()
        if other:
            shutil.copy(folder / other, folder / name)
        was = files(folder)
        places = ['--model', 'net.pt', '--data', 'scans'] if verb == 'finalise' else []
        status, _, err = here(home, 'request', verb, folder, *places)
        assert status == 1 and name in err and 'put' in err, err
        assert files(folder) == was, (verb, name)
    shutil.copytree(home / 'requests/one', folder := tmp_path / 'record')
    shutil.rmtree(home / 'requests/exchanged', ignore_errors=True)
    assert here(home, *asked(2, 'requests/exchanged'))[0] == 0
    record = read_record(home / 'requests/exchanged')
    (folder / 'record.json').unlink()
    add_entry(folder, 'check', 'unlearned', **{k: v for k, v in record['entries'][0].items() if k not in COMMON})
    was = files(folder)
    status, _, err = here(home, 'request', 'undo', folder)
    assert status == 1 and 'is of another request' in err and files(folder) == was


def test_a_list_says_on_which_line_a_name_is_and_contradicts_itself_nowhere(home, tmp_path):
    (tmp_path / 'letter.csv').write_text(f'Patient ID;day\r\n# ward 3\r\n{patient(2)};1\r\n{patient(77)};2\r\n')
    status, out, err = here(home, *asked(None, 'requests/lines', '--forget-list', tmp_path / 'letter.csv'))
    assert status == 0 and '(1 names' not in out and '(2 names' in out and WORD not in out, (out, err)
    assert re.search(r'match nothing: person: person-[0-9a-f]{16} \(line 4\)\n', out), out
    assert 'has changed nothing' not in err
    index = index_volumes(home / 'scans')
    fname = index.fname[index.patient_id == patient(1)].iloc[0]
    (tmp_path / 'letter.csv').write_text(f'patient,file\n{patient(2)},{fname}\n')
    status, _, err = here(home, *asked(None, 'bad/x', '--forget-list', tmp_path / 'letter.csv'))
    assert status == 1 and 'line 2 names a patient, and a file of another one' in err


def test_a_reason_names_nobody_in_capitals_either(home):
    status, *_ = here(home, *asked(3, 'requests/reason', '--reason', f'see {patient(3).upper()}, {patient(2).title()}'))
    assert status == 0
    assert WORD.lower() not in (home / 'requests/reason/record.json').read_text().lower()
