"""A protocol run that is killed again and again, and started again, ends with the tables of one that was left alone."""

import os
import shutil
import signal
import time

import pandas as pd
import pytest
from conftest import Started, command_here

ARGS = '--preset tiny --epochs 1 --methods sub_ft nl_ft'.split()
# what must exist before the next blow falls: while simulating, training, unlearning, scoring, and drawing
KILLS = [
    'data/multicoil_train/*.h5',
    'data/multicoil_val/*.h5',
    'models/oracle_s0.pt',
    'stages/unlearned_sub_ft_50pc_s0.json',
    'stages/oracle_s0/*.h5',
    'stages/original.scores.csv',
    'summary.csv',
]


def start(out):
    return Started(out.parent, 'protocol', '--out', out, *ARGS)


def finish(out):
    done = start(out).finish()
    assert done.returncode == 0, done.stderr


def kill_when(out, pattern):
    "Start the run and kill it by SIGKILL as soon as a file like `pattern` is there; its workers must end by themselves"
    process, give_up = start(out), time.time() + 300
    while not list(out.glob(pattern)):
        assert process.status() is None, f'ended before {pattern} appeared: {process.said()}'
        assert time.time() < give_up, f'{pattern} did not appear'
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    if not process.all_ended(timeout=60):
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError('workers live on after the main process was killed')
    assert process.finish().returncode == -signal.SIGKILL


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    whole, killed = (tmp_path_factory.mktemp(n) / 'run' for n in ('whole', 'killed'))
    finish(whole)
    for pattern in KILLS:
        kill_when(killed, pattern)
    finish(killed)
    return whole, killed


@pytest.mark.parametrize('name', ['results.csv', 'agreement.csv', 'trace.csv', 'matrix.csv', 'volumes.csv'])
def test_same_tables(runs, name):
    whole, killed = (pd.read_csv(r / name).drop(columns='path', errors='ignore') for r in runs)
    assert len(whole)
    pd.testing.assert_frame_equal(whole, killed, check_exact=True)


def test_same_summary_but_for_the_clock(runs):
    whole, killed = (pd.read_csv(r / 'summary.csv').drop(columns=['seconds', 'seconds_ratio']) for r in runs)
    pd.testing.assert_frame_equal(whole, killed, check_exact=True)


def test_nothing_half_written_is_left(runs):
    finished = [{str(p.relative_to(r)) for p in r.rglob('*') if p.is_file()} for r in runs]
    assert finished[0] == finished[1]


def test_other_settings_do_not_touch_a_run(runs):
    whole = runs[0]
    before = {p: p.read_bytes() for p in whole.rglob('*') if p.is_file()}
    done = command_here('protocol', '--out', whole, '--preset', 'tiny', '--epochs', 2)
    assert done.returncode == 1 and 'other settings' in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert before == {p: p.read_bytes() for p in whole.rglob('*') if p.is_file()}


def test_a_damaged_record_is_an_error_and_not_a_traceback(runs, tmp_path):
    copy = tmp_path / 'run'
    shutil.copytree(runs[0], copy)
    (copy / 'config.json').write_text('{"preset":')
    done = command_here('protocol', '--out', copy, *ARGS)
    assert done.returncode == 1 and 'config.json' in done.stderr and 'Traceback' not in done.stderr
