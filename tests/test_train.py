"""`mri_unlearn train` trains as the protocol does: an Oracle of the one is as good as an Oracle of the other."""

import argparse

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
