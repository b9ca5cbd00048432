"""The conformance kit passes a sound adapter, and finds what is wrong with others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SUITES = ("tests/kit/suites.py", "tests/kit/suites_of_models.py")
# What is wrong: in which tests it shows, and what they say.
FLAWS: dict[str, dict[str, str]] = {
    "WrongLayout": {
        "test_layer_is_the_map_of_its_geometry[dense]": (
            r"dense, weight '0.kernel' of shape \(5, 3\).*maps 5 inputs to 3 outputs.*"
            r"describes \[\(5, 3\)\].*inputs and outputs are exchanged"
        ),
        "test_layer_is_the_map_of_its_geometry[square]": (
            r"values agree, but the norms of the rows do not.*inputs and outputs are exchanged"
        ),
        "test_layer_is_the_map_of_its_geometry[conv1d]": (
            r"singular value \d of the layer is .*of the geometry.*the layout is another one"
        ),
        "test_layer_is_the_map_of_its_geometry[conv1d strided]": r"maps 16 inputs to 6 outputs",
        "test_layer_is_the_map_of_its_geometry[conv2d]": r"maps 48 inputs to 84 outputs",
        "test_layer_is_the_map_of_its_geometry[conv2d strided]": (
            r"maps 60 inputs to 27 outputs.*layout, groups or input_shape differ"
        ),
    },
    "IgnoresStride": {
        "test_layer_is_the_map_of_its_geometry[conv1d strided]": (
            r"conv1d strided.*stride=\(1,\).*16 inputs to 6 outputs.*Likely cause: stride"
        ),
        "test_layer_is_the_map_of_its_geometry[conv2d strided]": r"Likely cause: stride",
    },
    "MutatesInForward": {
        "test_a_forward_pass_changes_nothing": (
            r"two forward passes on the same batch differ.*vectors advance in the forward pass"
        ),
    },
    "LosesState": {
        f"test_a_resumed_training_is_the_same[{stage}]": pattern
        for stage, pattern in {
            "weights": r"uninterrupted training fired at steps \[4, 6\], the resumed one at \[4\]",
            "gradients": r"count of steps is not in the checkpoint",
            "forward": r"right after restore\(\) outputs differ",
        }.items()
    }
    | {"test_input_sizes_are_in_the_checkpoint": r"right after restore\(\) the geometries are"},
    "LosesVectors": {
        f"test_a_resumed_training_is_the_same[{stage}]": pattern
        for stage, pattern in {
            "weights": r"4 steps after restoring, .*kernel.*differ.*rule's state",
            "gradients": r"4 steps after restoring, .*kernel.*differ.*rule's state",
            "forward": r"right after restore\(\) outputs differ.*vectors of a forward rule",
        }.items()
    }
    | {"test_input_sizes_are_in_the_checkpoint": r"right after restore\(\) the geometries are"},
    "SwallowsNaN": {
        "test_nan_in_a_weight_is_named": r"0.kernel holds NaN.*raised no NonFiniteError.*swallowed",
        "test_nan_leaves_every_weight_as_it_was": r"2.kernel holds NaN.*the error is swallowed",
    },
    "IgnoresEvery": {
        "test_rules_act_at_their_interval[3-0]": (
            r"every=3, start=0: the rule acted at step 1, due is step 3.*plan.fires"
        ),
        "test_rules_act_at_their_interval[2-1]": r"every=2, start=1: the rule acted at step 1",
        "test_an_interval_of_ones_own": r"0.kernel has an interval of its own, 2, .*step 1",
        "test_the_penalty_acts_at_its_interval": r"every=2, but the penalty changed .*at step 1",
    }
    | {
        f"test_history_has_the_steps_that_fired[{stage}]": (
            rf"a rule of stage '{stage}' with every=2.*records of \[\(1, .*expected \[\(2, "
        )
        for stage in ("weights", "gradients", "forward")
    },
    "WritesAsItGoes": {
        "test_nan_leaves_every_weight_as_it_was": (
            r"raised about 2.kernel, yet changed 0.kernel.*Compute all, check, then write"
        ),
        "test_a_rule_that_fails_leaves_every_weight_as_it_was": r"failed at 2.kernel.*0.kernel",
    },
    "StaysOn": {
        "test_detached_rules_act_no_more": r"after detach\(\) all norms are still at most 1",
        "test_detaching_gives_the_plain_model": r"after detach\(\) outputs differ",
        "test_detaching_frees": r"the rule is still alive after detach\(\)",
        "test_project_leaves_the_weight_in_use": r"detach\(fold=True\) does not reach",
    },
    "ReportsHalf": {
        "test_report_accounts_for_every_parameter": (
            r"report lists \['0.kernel', '2.kernel'\], the model has .*'0.bias'"
        ),
    },
    "Subtracts": {
        "test_the_penalty_pulls_at_the_leading_direction": r"subtracted from the gradient",
        "test_a_rule_of_others_acts_on_gradients": r"did not move the weight towards 0",
    },
    "UsesRawWeights": {
        "test_the_weight_in_use_has_the_norm_asked_for": r"the layers use the raw weights",
        "test_the_report_shows_the_norm_in_use": r"0.kernel: the report says norm .*makes it 0.5",
        "test_writes_from_outside_are_noticed": r"weights four times as large changed the outputs",
        "test_weights_loaded_between_firings_are_noticed": r"all weights were replaced",
        "test_a_rule_of_others_acts_in_the_forward_pass": r"from those of weights W/‖W‖_F",
    },
    "CachesTheNorm": {
        "test_writes_from_outside_are_noticed": r"a norm is cached",
    },
    "KeepsVectors": {
        "test_history_has_the_steps_that_fired[forward]": r"records of \[\], expected \[\(2, ",
    },
    "FollowsOldVectors": {
        "test_weights_loaded_between_firings_are_noticed": r"along the vectors of the old weights",
    },
    "PenalisesTwice": {
        "test_history_has_the_steps_that_fired[gradients]": (
            r"(\(2, '2.kernel'\), ){2}.*step\(\) or before_step\(\) more or less than once"
        ),
    },
    "ClaimsTooLittle": {
        "test_rules_of_other_stages_are_refused": (
            r"SpectralNormPenalty.* was accepted; expected SpecopsError"
        ),
    },
    "SkipsThePlan": {
        "test_a_plan_that_cannot_hold_is_refused[names nothing]": (
            r"was accepted; expected PlanError.*Plan.assign"
        ),
        "test_geometries_that_name_nothing_are_refused": r"override_geometries",
    },
    "RefusesUnasked": {
        "test_nan_in_a_weight_is_named": r"FloatingPointError: the model has diverged",
    },
    "HasNoConvolution": {
        "test_the_model_suits_the_kit": r"unless the capabilities deny convolutions, one of them",
    },
    "TooTame": {
        "test_the_model_suits_the_kit": r"without a rule the norms of .*kernel.* are at most 1",
        "test_other_weights_train_as_without_rules": r"names '0.kernel' did not change it",
        "test_rules_stop": r"stop=3, but after step 5 all norms are still at most 1",
        "test_detached_rules_act_no_more": r"after detach\(\) all norms are still at most 1",
        "test_an_interval_of_ones_own": r"0.kernel has an interval of its own",
    },
    "NeverWrites": {
        "test_norms_stay_below_the_bound": (
            r"after step 1 the norms of .* above the bound 1.*not written back"
        ),
        "test_other_weights_train_as_without_rules": r"names '0.kernel' did not change it",
        "test_rules_act_at_their_interval[3-0]": r"at step 3, where every=3.*are above the bound",
        "test_rules_act_at_their_interval[2-1]": r"at step 3, where every=2.*are above the bound",
        "test_an_interval_of_ones_own": r"at step 1; only 0.kernel was to wait",
        "test_rules_stop": r"at step 2, before stop=3 the norms of .* are above the bound",
        "test_a_rule_of_others_acts_on_weights": r"kernel: a rule with nothing but init and update",
        "test_enforce_acts_at_once": r"the norms of .* above the bound 1.*not written back",
        "test_project_acts_once": r"the norms of .* above the bound 1.*not written back",
    },
    "MonitorActs": {
        "test_monitor_changes_nothing": r"Monitor\(\) changed 0.kernel \(",
    },
    "OtherName": {
        "test_the_plugin_is_available": r"no adapter is called 'other'; .*'tiny'.*entry point",
        "test_the_plugin_knows_the_model": r"answered by 'tiny', not by 'other'",
    },
    "NoLayers": {
        "test_layers_are_given": r"layers\(\) is empty",
    },
    "ActsOnFrozen": {
        "test_frozen_weights_are_left_alone": r"0.kernel is frozen, and Clip.* changed it",
    },
    "NamesADtype": {
        "test_report_accounts_for_every_parameter": r"says dtype float64, it is float32",
    },
    "ForgetsSizes": {
        "test_input_sizes_are_in_the_checkpoint": r"input_shape=None.*sizes\(\) and see\(\)",
    },
    "KnowsBetter": {
        "test_a_declared_geometry_is_used": r"the rule was told Dense.*look at `declared`",
    },
    "StoresAnything": {
        "test_weights_keep_their_dtype": r"changed dtypes and shapes .*float64",
        "test_report_accounts_for_every_parameter": r"says dtype float32, it is float64",
    },
    "DropsOptions": {
        "test_unknown_options_are_refused": r"no_such_option=1\) was accepted.*hand them on",
    },
    "HangsFirst": {
        "test_a_refused_plan_leaves_nothing_behind": r"a hook was hung on it before assign\(\)",
    },
    "NeverFolds": {
        "test_project_leaves_the_weight_in_use": r"0.kernel: project.*left a weight that differs",
    },
    "ProjectsACopy": {
        "test_project_acts_once": r"after project\(model, .* above the bound 1",
        "test_project_leaves_the_weight_in_use": r"0.kernel: project.*left a weight that differs",
    },
    "EnforcesNothing": {
        "test_enforce_acts_at_once": r"after step 1 of every=100 and enforce\(\) the norms of",
    },
}

Outcomes = dict[str, dict[str, str]]


def run(*tests: str, folder: Path) -> Outcomes:
    """The message of every test that ran, by suite and test; "" if it passed."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *tests],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    outcomes: Outcomes = {}
    for test in ElementTree.parse(report).iter("testcase"):
        suite = (test.get("classname") or "").rpartition(".Test")[2]
        failed = [*test.iter("failure"), *test.iter("error")]
        message = "\n".join(f"{f.get('message')}\n{f.text}" for f in failed)
        if not list(test.iter("skipped")):
            outcomes.setdefault(suite, {})[test.get("name") or ""] = message
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """All suites at once."""
    return run(*SUITES, folder=tmp_path_factory.mktemp("kit"))


SOUND = ("Tiny", "DenseOnly", "RefusesNaN")


@pytest.mark.parametrize("suite", SOUND)
def test_a_sound_adapter_passes(outcomes: Outcomes, suite: str) -> None:
    failed = {test: message for test, message in outcomes[suite].items() if message}
    assert not failed
    assert len(outcomes[suite]) > 50


def test_every_suite_is_expected_to_do_something(outcomes: Outcomes) -> None:
    assert outcomes.keys() == {*SOUND, *FLAWS}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_fails_where_it_should_and_says_why(outcomes: Outcomes, flaw: str) -> None:
    failed = {test: message for test, message in outcomes[flaw].items() if message}
    assert failed.keys() == FLAWS[flaw].keys()
    for test, pattern in FLAWS[flaw].items():
        assert re.search(pattern, failed[test], re.DOTALL), failed[test]
    assert len(outcomes[flaw]) > len(failed) + 20
