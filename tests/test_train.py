"""`mri_unlearn train` trains as the protocol does: an Oracle of the one is as good as an Oracle of the other."""

import argparse
import os
import signal
import time

import torch
from conftest import Started, command_here

from mri_unlearn.command.networks import add_commands
from mri_unlearn.data.request import ForgetRequest
from mri_unlearn.data.volumes import index_volumes
from mri_unlearn.experiment.networks import train_network
from mri_unlearn.experiment.runs import Run
from mri_unlearn.experiment.settings import NetworkSettings, TrainingSettings, prepare
from mri_unlearn.machinery.workers import Progress
from mri_unlearn.network.weights import load_network
from mri_unlearn.verdict.names import NetworkName
from mri_unlearn.verdict.reconstruct import weights_digest


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    return parser.parse_args([str(word) for word in words])


def run(*words):
    args = parsed(*words)
    args.do(args)


def test_defaults_are_those_of_the_protocol():
    "One place says how networks are trained; `None` stands for the size of the protocol's network"
    args, protocol = parsed('train', '--data', 'scans', '--out', 'net.pt'), TrainingSettings()
    same = dict(epochs='epochs', batch_size='bs', lr='lr', schedule='schedule', clip='clip', loss='loss')
    assert {k: getattr(args, k) for k in same} == {k: getattr(protocol, v) for k, v in same.items()}
    assert [args.model, args.chans, args.pools, args.cascades, args.sens_chans] == [None] * 5
    from mri_unlearn.command.networks import SIZES

    assert SIZES == NetworkSettings()


def test_weights_are_those_of_the_protocol(tiny_scans, tmp_path, capsys):
    "Same seed, data and size: the same weights to the last bit, of the Original and of an Oracle"
    settings = prepare('small', dict(chans=2, pools=1, epochs=1))
    splits = ForgetRequest("organ == 'knee'").split(index_volumes(tiny_scans, cache=False))
    there, size = Run(tmp_path / 'run'), ['--chans', 2, '--pools', 1, '--epochs', 1]
    for name, seed, only in [('original', 1, []), ('oracle_s0', 1001, ['--only', "organ == 'brain'"])]:
        train_network(there, settings, NetworkName.parse(name), splits, Progress(1, show=False))
        run('train', '--data', tiny_scans, *size, '--seed', seed, *only, '--out', tmp_path / f'{name}.pt')
        ours, theirs = (weights_digest(load_network(p)) for p in (tmp_path / f'{name}.pt', there.model(name)))
        assert ours == theirs, name


LONG = '--chans 4 --pools 2 --epochs 6 --batch-size 1 --state-every 0.001 --device cpu'.split()


def killed(folder, words, state, after):
    "Start a training and kill it once it has written `after` states; where in which epoch the last one stands"
    process, seen, give_up = Started(folder, *words), set(), time.time() + 120
    while len(seen) < after:
        assert process.status() is None and time.time() < give_up, process.said()
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish().returncode == -signal.SIGKILL
    kept = torch.load(state, weights_only=True)
    return kept['epoch'], kept['batch']


def test_killed_training_goes_on_within_an_epoch(tiny_scans, tmp_path):
    "Three blows, and the same weights to the last bit; with other options it does not go on from the state"
    net, state = tmp_path / 'net.pt', tmp_path / 'net.pt.state'
    words = ['train', '--data', tiny_scans, *LONG, '--out', net]
    places = [killed(tmp_path, words, state, after) for after in (3, 2, 4)]
    assert places == sorted(places) and any(batch for _, batch in places), places
    other = command_here(*words, '--lr', 0.01)
    assert other.returncode == 1 and f'error: {state}: is' in other.stderr and 'lr (0.002, now 0.01)' in other.stderr
    assert command_here(*words).returncode == 0
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith('said')] == ['net.pt']  # no state any more
    run('train', '--data', tiny_scans, *LONG, '--out', tmp_path / 'whole.pt')
    ours, theirs = (weights_digest(load_network(p)) for p in (net, tmp_path / 'whole.pt'))
    assert ours == theirs
