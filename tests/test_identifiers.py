"""A run with data of a user names nobody: every byte and every name that it leaves is searched."""

import base64
import gzip
import io
import json
import re
import shutil
import stat
import zipfile
import zlib
from urllib.parse import quote

import h5py
import pandas as pd
import pytest
from conftest import Started

from mri_unlearn.cli import main
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.experiment.protocol import run_protocol
from mri_unlearn.experiment.purge import purge_run, purgeable
from mri_unlearn.experiment.study import run_requests
from mri_unlearn.machinery.disk import DataError
from mri_unlearn.machinery.private import locked
from mri_unlearn.phantom.simulate import simulate_dataset
from mri_unlearn.show.view import RunView, run_picture

WORD = 'CANARY'  # a part of every name
PATIENT = WORD + '-7731^{}DOE'  # DICOM writes names so
FEW = dict(epochs=1, rounds=1, steps=2, oracle_seeds=2, study_fractions=(), third=0, jobs=1)
FEW |= dict(methods=('sub_ft', 'proxy'), hallucination=('sub_ft',), limit_volumes=3, unchecked=True, show=False)


def encodings(word):
    "The bytes in which a word may stand"
    text = word.encode()
    plain = [text, text.lower(), text.hex().encode(), word.encode('utf-16-le'), word.encode('utf-16-be')]
    plain += [''.join(f'%{c:02x}' for c in text).encode(), quote(word).encode()]
    inner = [base64.b64encode(b'x' * i + text)[(4 * i + 2) // 3 : (4 * (len(text) + i)) // 3 - 1] for i in range(3)]
    return list(dict.fromkeys(plain + inner))


def chunks(png):
    "The contents of the chunks of a PNG that hold text or a profile"
    at = 8
    while at < len(png):
        size, kind = int.from_bytes(png[at : at + 4], 'big'), png[at + 4 : at + 8]
        if kind in (b'tEXt', b'zTXt', b'iTXt', b'iCCP', b'eXIf'):
            yield png[at + 8 : at + 8 + size]
        at += 12 + size


def layers(raw):
    "Bytes as they stand, and what is packed in them"
    yield raw
    if raw[:2] == b'\x1f\x8b':
        yield from layers(gzip.decompress(raw))
    elif raw[:2] == b'PK':
        with zipfile.ZipFile(io.BytesIO(raw)) as packed:
            for name in packed.namelist():
                yield name.encode()
                yield from layers(packed.read(name))
    elif raw[:8] == b'\x89PNG\r\n\x1a\n':
        for chunk in chunks(raw):
            for start in (m.end() for m in re.finditer(b'\0', chunk)):
                try:
                    yield zlib.decompress(chunk[start:])
                except zlib.error:
                    pass


def leaks(folder):
    "Where a canary sings below a folder: paths, by name or by what they hold"
    wanted = re.compile(b'|'.join(map(re.escape, encodings(WORD))), re.IGNORECASE)
    found = []
    for path in sorted(folder.rglob('*')):
        name = path.relative_to(folder).as_posix()
        raw = list(layers(path.read_bytes())) if path.is_file() else []
        if any(wanted.search(part) for part in [name.encode(), *raw]):
            found.append(name)
    return found


@pytest.mark.parametrize('pack', [bytes, gzip.compress, lambda b: b.decode().encode('utf-16-le'), base64.b64encode])
def test_the_search_finds_what_is_there(tmp_path, pack):
    (tmp_path / 'a').write_bytes(pack(b'of CANARY-7731'))
    assert leaks(tmp_path) == ['a']


def rename(path, patient, to):
    "Give a scan to a patient, in its attributes and in its header, and put it elsewhere"
    with h5py.File(path, 'r+') as f:
        f.attrs['patient_id'] = patient
        xml = re.sub(rb'(<patientID>)[^<]*', rb'\g<1>' + patient.encode(), f['ismrmrd_header'][()])
        del f['ismrmrd_header']
        f['ismrmrd_header'] = xml
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Scans whose folders, files, attributes and headers name people; one of them is cut short"
    root = tmp_path_factory.mktemp('data') / f'{WORD}ROOT of scans'
    few = dict(patients=dict(brain=(3, 1), knee=(2, 1)), slices=2, extras=True, progress=False)
    simulate_dataset(root / 'plain', 'tiny', 0, **few)
    index = index_volumes(root / 'plain', cache=False)
    names = {p: PATIENT.format(chr(65 + i)) for i, p in enumerate(sorted(set(index.patient_id)))}
    for i, row in enumerate(index.itertuples()):
        place = root / 'all' / row.folder / f'{WORD}WARD {i % 2}' / f'{WORD}FILE_{i:02d} {row.fname}'
        rename(root / 'plain' / row.folder / row.fname, names[row.patient_id], place)
    (place.parent / f'{WORD}BROKEN.h5').write_bytes(b'\x89HDF\r\n\x1a\n and no more')
    return root / 'all'


def request(scans):
    "A training patient who asks, in words that name him and his file"
    index = index_volumes(scans, cache=False)
    row = index[index.path.str.contains('_train') & index.organ.eq('brain')].iloc[0]
    return dict(query=f'patient_id == {row.patient_id!r}', reason=f'{row.patient_id} withdrew {row.fname}')


@pytest.fixture(scope='module')
def runs(scans, tmp_path_factory):
    "The run of the command, and the same with the names in it"
    folder, asked = tmp_path_factory.mktemp('runs'), request(scans)
    words = ['--preset', 'tiny', '--data', str(scans), '--forget', asked['query'], '--reason', asked['reason']]
    words += '--epochs 1 --rounds 1 --steps 2 --oracle-seeds 2 --jobs 1 --limit-volumes 3 --unchecked'.split()
    words += '--methods sub_ft proxy --hallucination sub_ft --study-fractions'.split()
    done = Started(folder, 'protocol', *words, '--out', folder / 'veiled').finish()
    assert done.returncode == 0, done.stderr
    run_protocol('tiny', folder / 'named', scans, identifiers=True, forgotten_pictures=True, **FEW, **asked)
    return folder, done, words


def test_no_byte_of_a_run_names_anybody(runs):
    folder, done, _ = runs
    assert leaks(folder / 'veiled') == []
    assert WORD not in done.stdout
    assert f'{WORD}BROKEN.h5' in done.stderr  # who sits there must know which file to mend


def test_the_same_search_finds_names_where_they_are_asked_for(runs):
    found = leaks(runs[0] / 'named')
    assert {'config.json', 'volumes.csv', 'results.csv', 'agreement.csv', 'report.html'} <= set(found)
    assert any(name.startswith('stages/null_') for name in found) and any('oracle_s0/' in name for name in found)


def test_the_numbers_are_those_of_the_run_with_names(runs):
    folder = runs[0]
    names = sorted(path.relative_to(folder / 'named') for path in (folder / 'named').glob('**/*.csv'))
    for name in (n for n in names if n.parts[0] not in ('stages',)):
        one, two = (pd.read_csv(folder / run / name) for run in ('veiled', 'named'))
        columns = [c for c in one.select_dtypes('number') if 'seconds' not in c]
        pd.testing.assert_frame_equal(one[columns], two[columns], check_exact=True, obj=str(name))


def test_a_report_that_is_written_again_and_a_plan_name_nobody(runs, capsys, tmp_path):
    folder, _, words = runs
    assert main(['report', str(folder / 'veiled')]) == 0
    assert leaks(folder / 'veiled') == []
    assert main(['protocol', *words, '--dry-run', '--out', str(folder / 'veiled')]) == 0
    plan = capsys.readouterr().out
    assert WORD not in plan and 'person-' in plan
    assert main(['protocol', *words, '--dry-run', '--identifiers', '--out', str(tmp_path / 'none')]) == 0
    assert PATIENT.format('A')[:6] in capsys.readouterr().out


def test_nobody_else_may_read_it(runs):
    folder = runs[0] / 'veiled'
    modes = {p.relative_to(folder).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob('*') if p.is_file()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


def test_of_forgotten_people_scores_stay_and_no_image(runs):
    folder, volumes = runs[0] / 'veiled', pd.read_csv(runs[0] / 'veiled' / 'volumes.csv')
    forgotten = set(volumes.fname[volumes.split == 'forget_train'])
    left = {path.stem for path in folder.rglob('*.h5')}
    assert forgotten and not forgotten & left and left & set(volumes.fname[volumes.split == 'retain_test'])
    assert not list(folder.glob('figures/*_forget.png')) and list(folder.glob('figures/*_retain.png'))
    assert 'There is no picture of what is to be forgotten' in (folder / 'report.html').read_text()
    assert [name for part in json.loads((folder / 'purged.json').read_text())['removed'] for name in part['files']]
    assert list((runs[0] / 'named').glob('figures/*_forget.png'))


def test_it_goes_on_with_its_key_and_with_no_other(runs, scans, tmp_path):
    folder, asked = runs[0] / 'veiled', request(scans)
    models = {p: p.stat().st_mtime_ns for p in folder.rglob('*.pt')}
    run_protocol('tiny', folder, scans, **FEW, **asked)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*.pt')} == models
    assert leaks(folder) == []
    for how, said in (
        (dict(key=tmp_path / 'another.key'), 'name its own with --key'),
        (dict(identifiers=True), 'leave the option out'),
    ):
        with pytest.raises(DataError, match=said):
            run_protocol('tiny', folder, scans, **FEW, **asked, **how)
    with pytest.raises(DataError, match='go on so'):
        run_protocol('tiny', runs[0] / 'named', scans, **FEW, **asked)
    with pytest.raises(DataError, match='keep it elsewhere'):
        run_protocol('tiny', folder, scans, key=folder / 'a.key', **FEW, **asked)


def test_a_second_process_is_turned_away(runs, scans):
    with locked(runs[0] / 'veiled'), pytest.raises(DataError, match='another run is at work in this folder'):
        run_protocol('tiny', runs[0] / 'veiled', scans, **FEW, **request(scans))


def test_scans_are_looked_at_with_the_data_beside_the_run(runs, scans, tmp_path):
    with pytest.raises(DataError, match='data=FOLDER'):
        RunView(runs[0] / 'veiled')
    with pytest.raises(DataError, match='cannot be read'):
        RunView(runs[0] / 'veiled', scans, tmp_path / 'none.key')
    veiled, named = RunView(runs[0] / 'veiled', scans), RunView(runs[0] / 'named')
    name = next(name for name in veiled.volumes if veiled.volumes[name]['split'] == 'retain_test')
    pictures = [run_picture(view, volume) for view, volume in ((veiled, name), (named, veiled.scan(name)['fname']))]
    assert pictures[0][0] == pictures[1][0] and WORD not in pictures[0][1] and WORD in pictures[1][1]


def test_a_study_of_several_requests_names_nobody(scans, tmp_path, capsys):
    asked, file = request(scans), tmp_path / 'asked.txt'
    file.write_text(f'{asked["query"]} | {asked["reason"]}\n', encoding='utf-8')
    few = FEW | dict(methods=('sub_ft',), hallucination=())
    for _ in range(2):
        table = run_requests(file, 'tiny', tmp_path / 'study', scans, **few)
    assert leaks(tmp_path / 'study') == [] and 'person-' in table['query'][0]


def test_what_a_run_need_not_keep_goes_and_the_run_stays_finished(runs, scans, tmp_path):
    run = shutil.copytree(runs[0] / 'veiled', tmp_path / 'run')
    names = {part.name for part in purgeable(run)[0]}
    assert {'images of the Oracles', 'networks of the planted structure', 'scans with a planted structure'} == names
    size, foreign = purge_run(run)
    assert size > 0 and not foreign and not list(run.rglob('*.h5')) and list((run / 'models').glob('*.pt'))
    before = {p: p.read_bytes() for p in run.glob('*.csv') if p.name not in ('summary.csv', 'work.csv')}
    run_protocol('tiny', run, scans, **FEW, **request(scans))
    assert before == {p: p.read_bytes() for p in before}
    assert not list(run.rglob('*.h5')) and leaks(run) == []
