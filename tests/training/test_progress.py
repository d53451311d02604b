"""Speeds by a clock that the test winds, and figures read back from TensorBoard's own files."""

from pathlib import Path

import pytest

from polarctl.errors import MissingError, UsageError
from polarctl.training.progress import Meter, Trackers, check_trackers


class Clock:
    """Seconds, as told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_tokens_over_the_time_of_the_steps() -> None:
    # Two steps, 2 s and 3 s: (300 + 200) / 5 computed, (450 + 300) / 5 effective tokens a second.
    # MFU: 100 tokens/s * 6 * 10 weights / 12,000 FLOP/s = 0.5. 8 steps of 2.5 s are left.
    clock = Clock()
    meter = Meter(parameters=10, peak=12_000.0, clock=clock)
    for step, seconds, effective, computed in ((1, 2, 450, 300), (2, 3, 300, 200)):
        clock.now += seconds
        meter.update(step, 10, effective, computed)
    assert meter.rates() == {"tokens_per_s": 100.0, "effective_tokens_per_s": 150.0, "mfu": 0.5}
    assert meter.eta_s == 20.0
    assert meter.summary() == {"seconds": 5.0, **meter.rates()}


def test_only_the_last_fifty_steps_count() -> None:
    # Ten steps of 100 s, one of 25.5 s, 49 of 0.5 s, 10 tokens each. The last fifty take
    # 25.5 + 24.5 = 50 s: 500 tokens / 50 s, and 1 s for each of the 40 that are left.
    clock = Clock()
    meter = Meter(parameters=1, peak=None, clock=clock)
    for step, seconds in enumerate([100] * 10 + [25.5] + [0.5] * 49, start=1):
        clock.now += seconds
        meter.update(step, 100, 10, 10)
    assert meter.computed_per_s == meter.effective_per_s == 10.0
    assert meter.eta_s == 40.0
    assert meter.summary()["seconds"] == 1000 + 50


def test_a_resumed_run_counts_its_own_steps_only() -> None:
    # It goes on after step 90 of 100: one step of 4 s, nine are left.
    clock = Clock()
    meter = Meter(parameters=1, peak=None, clock=clock)
    clock.now += 4
    meter.update(91, 100, 40, 40)
    assert meter.computed_per_s == 10.0
    assert meter.eta_s == 9 * 4


def test_the_line_says_loss_speed_use_and_time_left() -> None:
    # 1 s a step and 11,520 steps left: 11,520 s = 3 h 12 min.
    clock = Clock()
    meter = Meter(parameters=1000, peak=412e6, clock=clock)
    clock.now += 1
    meter.update(1, 11_521, 62_000, 41_200)
    # 41,200 * 6 * 1,000 / 412e6 = 0.6.
    assert meter.line(0.69314, 0.5121) == (
        "loss 0.6931 accuracy 0.512 | 41.2k tok/s (62.0k effective) | MFU 60% | 3 h 12 min left"
    )


def test_the_line_leaves_out_what_is_not_known_or_over() -> None:
    clock = Clock()
    meter = Meter(parameters=1000, peak=None, clock=clock)
    clock.now += 2
    meter.update(5, 5, 2_400_000, 600)
    assert meter.line(1.0, 1.0) == "loss 1.0000 accuracy 1.000 | 300 tok/s (1.2M effective)"
    assert "mfu" not in meter.rates()


@pytest.mark.parametrize(
    ("seconds", "words"), [(59, "59 s left"), (60, "1 min 00 s left"), (3599.6, "1 h 00 min left")]
)
def test_the_time_left_is_in_the_units_that_fit(seconds, words) -> None:
    clock = Clock()
    meter = Meter(parameters=1, peak=None, clock=clock)
    clock.now += seconds
    meter.update(1, 2, 1, 1)
    assert meter.line(0.0, 0.0).endswith(words)


def test_a_meter_without_steps_and_a_clock_that_stands_divide_by_nothing() -> None:
    meter = Meter(parameters=1, peak=1.0, clock=Clock())
    assert meter.computed_per_s == 0.0
    assert meter.summary() == {}
    meter.update(1, 2, 0, 0)
    assert meter.eta_s == 0.0


@pytest.fixture
def no_accelerator():
    """Accelerate as in a process that has no Accelerator."""
    state = pytest.importorskip("accelerate.state").PartialState._shared_state
    saved = dict(state)
    state.clear()
    yield
    state.clear()
    state.update(saved)


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of TensorBoard's files, as TensorBoard reads them: {name: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.usefixtures("no_accelerator")
def test_tensorboard_gets_the_figures_and_the_config_that_was_given(tmp_path, monkeypatch) -> None:
    import yaml
    from accelerate import PartialState

    monkeypatch.setenv("HF_TOKEN", "hf_not_for_dashboards")
    config = {"lr": 1e-5, "seed": 0, "shared_prefix": True, "report_to": ("tensorboard",)}
    trackers = Trackers(["tensorboard", "tensorboard"], tmp_path, config, run_name="run")
    trackers.log(1, {"step": 1, "loss": 0.75, "accuracy": 0.5})
    trackers.log(2, {"step": 2, "loss": 0.5, "accuracy": 1.0})
    trackers.close()
    assert PartialState()._cpu  # it took no GPU for itself
    # Once each although it was named twice, and the step is the axis and no figure.
    assert read_back(tmp_path / "runs") == {
        "loss": [(1, 0.75), (2, 0.5)],
        "accuracy": [(1, 0.5), (2, 1.0)],
    }
    (written,) = tmp_path.rglob("hparams.yml")
    assert yaml.safe_load(written.read_text()) == {**config, "report_to": "('tensorboard',)"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hf_not_for_dashboards" in path.read_bytes() for path in files)


def test_an_unknown_tracker_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UsageError, match="`--report-to mlflow`: unknown") as caught:
        check_trackers(["tensorboard", "mlflow"])
    assert caught.value.hint == "one of tensorboard, wandb, trackio"


def test_a_tracker_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch) -> None:
    # Neither of the two is here, so only the search path of this process is searched; wandb
    # leaves a folder of its own name where it ran, which is not the package.
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    for name in ("wandb", "trackio"):
        with pytest.raises(MissingError, match="not installed") as caught:
            Trackers([name], tmp_path, {}, run_name="run")
        assert caught.value.hint == f"pip install {name}"
