"""The method `proxy` at its edges: what moves, what it costs, what it refuses, and networks of both kinds."""

import warnings
from functools import cache, partial

import pytest
import torch

from mri_unlearn.data.request import ForgetRequest
from mri_unlearn.machinery.disk import DataError
from mri_unlearn.network.learner import WorkMeter
from mri_unlearn.unlearn.aim import MECHANISMS
from mri_unlearn.unlearn.by_hand import REQUEST, largest_change, must_be_equal, practice
from mri_unlearn.unlearn.core import unlearn

pytestmark = pytest.mark.filterwarnings('ignore:the level to end at is doubtful')  # networks trained for a moment
original = cache(practice)


def moved(a, b, part):
    "Whether a weight moved whose name has `part` in it"
    return any(part in name and not torch.equal(p, q) for (name, p), q in zip(a.named_parameters(), b.parameters()))


def organ(learn=None, **settings):
    given = dict(kind='competence', shadow_level=0.1, rounds=1, steps=1, bs=12) | settings
    return unlearn(learn or original(), REQUEST, 'proxy', 0.5, **given)


def patient(learn=None, **settings):
    learn = learn or original()
    volumes = learn.dls.train_ds.volumes
    one = ForgetRequest(f"patient_id == '{volumes[volumes.organ == 'knee'].patient_id.iloc[0]}'")
    given = dict(kind='memory', rounds=3, steps=16, bs=4, seed=1, held_out=learn.dls.valid_ds.volumes) | settings
    return unlearn(learn, one, 'proxy', 1.0, **given)


def test_all_but_the_transposed_convolutions_move_and_no_teacher_stays_behind():
    student = organ()
    parts = ('down_sample', 'up_conv', 'up_transpose')
    assert [moved(student.model, original().model, part) for part in parts] == [True, True, False]
    assert all(p.requires_grad for p in student.model.parameters())
    assert not hasattr(student, 'proxies') and not hasattr(student, 'teacher_pred')


def test_without_weights_nothing_pulls():
    zero = organ(forget_weight=0.0, retain_weight=0.0)
    must_be_equal(zero.model, original().model, 3e-4)  # but for Adam's weight decay


@pytest.mark.parametrize(
    'run, settings, said',
    [
        (organ, dict(part='head'), 'unknown part'),
        (organ, dict(moves='legs'), 'unknown part'),
        (organ, dict(proxies=0), 'at least one proxy'),
        (patient, dict(kind='organ'), "found 'organ'"),
    ],
)
def test_what_it_refuses(run, settings, said):
    with pytest.raises(DataError, match=said):
        run(**settings)


def test_the_budget_is_kept_teachers_and_looks_included():
    "Steps of two slices, a third of a slice for each answer of a teacher, the proxies' training, and every look"
    student = organ(rounds=2, steps=15, bs=4, kind=None, shadow_level=None, cbs=[WorkMeter()])
    assert 0.9 * student.budget < student.work_meter.slices <= student.budget + 30
    assert student.work_meter.seconds > 0


def test_the_same_twice_is_the_same_and_another_gamma_is_not():
    once = partial(organ, steps=3, bs=4, shadow_level=None)
    one, again, other = (once(gamma=gamma).model for gamma in (1.0, 1.0, 2.0))
    assert largest_change(one, again) == 0.0 and largest_change(one, other) > 0


def test_a_varnet_moves_but_for_its_sensitivity_network():
    varnet = practice('kspace')
    student = organ(varnet, steps=4, bs=4)
    parts = ('cascades', 'up_transpose', 'sens_net')
    assert [moved(student.model, varnet.model, part) for part in parts] == [True, False, False]


def test_a_varnet_unlearns_a_patient():
    varnet = practice('kspace')
    student = patient(varnet, bs=2, steps=6)  # some batches hold retained slices alone
    assert student.level_record['mechanism'] == MECHANISMS['memory']
    assert largest_change(student.model, varnet.model) > 0


def test_the_share_of_an_organ_is_no_level_for_a_patient():
    student = patient()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        asked = patient(shadow_level=0.03)
    assert any('not used' in str(w.message) for w in caught)
    assert asked.level.aim == student.level.aim
