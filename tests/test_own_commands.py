"""Commands with a network of one's own, on a device, into the formats of others."""

import argparse
import json
import shutil

import pytest
import torch

from mri_unlearn.command.networks import add_commands
from mri_unlearn.machinery.disk import DataError

KNEE = "organ == 'knee'"
NETS = """
from torch import nn


class Tiny(nn.Module):
    def __init__(self, chans=4):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, chans, 3, padding=1), nn.ReLU(), nn.Conv2d(chans, 1, 3, padding=1))

    def forward(self, x):
        return x + self.net(x)


class Statistics(Tiny):
    def __init__(self):
        super().__init__()
        self.net.append(nn.BatchNorm2d(1))


class Pairs(Tiny):
    takes = 'two channels'


class Sized(Tiny):
    def forward(self, x):
        if x.shape[-1] % 80 or x.shape[-2] % 80:
            raise ValueError('needs images of another size')
        return super().forward(x)
"""
OWN = ['--network', 'nets_of_a_test:Tiny', '--network-args', '{"chans": 3}', '--device', 'cpu']


@pytest.fixture(scope='module')
def home(tiny_scans, tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    shutil.copytree(tiny_scans, home / 'scans')
    (home / 'nets_of_a_test.py').write_text(NETS)
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)

    def run(*words):
        parser = argparse.ArgumentParser()
        add_commands(parser.add_subparsers())
        args = parser.parse_args([words[0], '--data', 'scans', *map(str, words[1:])])
        args.do(args)
        return capsys.readouterr().out

    return run


def test_a_network_of_ones_own_goes_through_all_commands(run, home):
    run('train', *OWN, '--epochs', 1, '--out', 'own.pt')
    run('train', *OWN, '--epochs', 1, '--only', "organ == 'brain'", '--out', 'oracle.safetensors')
    few = ['--forget', KNEE, '--method', 'nl_ft', '--rounds', 1, '--steps', 1, '--clip', 'none']
    run('unlearn', *OWN, '--model', 'own.pt', *few, '--out', 'forgot.ckpt')
    record = json.loads((home / 'forgot.json').read_text())
    assert record['made_by']['network'] == 'nets_of_a_test:Tiny' and record['settings']['clip'] is None
    models = ['--model', 'own.pt', 'forgot.ckpt', '--oracle', 'oracle.safetensors']
    said = run('evaluate', *OWN, *models, '--forget', KNEE)
    assert said.count('not decided: 2 patients') == 4 and 'PSNR minus that of the Oracle' in said
    assert 'reconstructed: 13' in run('reconstruct', *OWN, '--model', 'forgot.ckpt', '--out', 'images')


@pytest.mark.parametrize(
    'words, says',
    [
        (['--network', 'nets_of_a_test:Large'], "has no 'Large'"),
        (['--network', 'nowhere_at_all:Tiny'], 'nowhere_at_all'),
        (['--network', 'nets_of_a_test:Tiny', '--network-args', '{"depth": 3}'], 'depth'),
        (['--network', 'nets_of_a_test:Tiny', '--takes', 'banana'], 'banana'),
        (['--gives', 'image'], '--gives goes with --network'),
        (['--network', 'nets_of_a_test:Tiny', '--chans', '8'], '--chans goes with a U-Net or VarNet'),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_written(run, home, words, says):
    with pytest.raises(DataError, match=says):
        run('train', *words, '--out', 'never.pt')
    assert not (home / 'never.pt').exists()


@pytest.mark.parametrize(
    'name, says',
    [('Pairs', 'expected input.* to have 1 channels, but got 2 channels'), ('Sized', 'another size.* multiple=16')],
)
def test_a_network_that_does_not_fit_is_refused_before_the_first_step(run, home, name, says):
    with pytest.raises(DataError, match=says):
        run('train', '--network', f'nets_of_a_test:{name}', '--device', 'cpu', '--out', 'never.pt')
    assert not (home / 'never.pt').exists()


def test_train_says_what_is_doubtful_about_a_network(run, home):
    with pytest.warns(UserWarning, match='keeps statistics of the slices it is trained on'):
        run('train', '--network', 'nets_of_a_test:Statistics', '--epochs', 1, '--device', 'cpu', '--out', 'doubt.pt')
    assert (home / 'doubt.pt').exists()


def test_the_look_before_a_training_changes_no_weight(run, home, monkeypatch):
    few = ['train', *OWN, '--epochs', 1, '--only', KNEE, '--out']
    run(*few, 'looked.pt')
    monkeypatch.setattr('mri_unlearn.network.adapter.check_network', lambda *_: [])
    run(*few, 'blind.pt')
    looked, blind = (torch.load(home / f'{name}.pt', weights_only=True) for name in ('looked', 'blind'))
    assert all(torch.equal(looked[key], blind[key]) for key in looked)


@pytest.mark.parametrize('ending', ['ckpt', 'safetensors'])
def test_formats_of_others_go_in_and_out(run, home, ending):
    "A file that the command has written may be replaced by it, and is read again"
    size = ['--chans', 2, '--pools', 1, '--epochs', 1, '--out', f'net.{ending}']
    run('train', *size)
    run('train', *size)
    few = ['--forget', KNEE, '--method', 'ga', '--rounds', 1, '--steps', 1]
    run('unlearn', '--model', f'net.{ending}', *few, '--out', f'forgot_{ending}.{ending}')
    assert 'forgot' in run('evaluate', '--model', f'forgot_{ending}.{ending}')
    if ending == 'ckpt':
        found = torch.load(home / f'forgot_{ending}.ckpt', weights_only=True)
        assert found['hyper_parameters']['chans'] == 2 and all(n.startswith('unet.') for n in found['state_dict'])


def test_a_checkpoint_of_a_training_goes_back_out_as_one(run, home):
    from mri_unlearn.network.weights import new_unet

    weights = {f'unet.{name}': tensor for name, tensor in new_unet(3, chans=2, num_pool_layers=1).state_dict().items()}
    began = {'state_dict': weights, 'pytorch-lightning_version': '1.4.2', 'hyper_parameters': {'chans': 2, 'lr': 3e-4}}
    torch.save(began | {'optimizer_states': [{'state': {0: {'exp_avg': torch.ones(3)}}}]}, home / 'began.ckpt')
    few = ['--forget', KNEE, '--method', 'ga', '--rounds', 1, '--steps', 1]
    run('unlearn', '--model', 'began.ckpt', *few, '--out', 'ended.ckpt')
    found = torch.load(home / 'ended.ckpt', weights_only=True)
    assert list(found['state_dict']) == list(weights) and found['hyper_parameters'] == began['hyper_parameters']
    assert found['pytorch-lightning_version'] == '1.4.2' and 'optimizer_states' not in found
    assert any(not torch.equal(found['state_dict'][name], tensor) for name, tensor in weights.items())
