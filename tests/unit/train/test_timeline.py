"""The split of a step adds up, nested spans are taken out of their surroundings, and nothing waits for the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bd3_megatron.train.timeline import StepSplit, Timeline, device_event_factory, profiled, time_metrics


class _Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class _DeviceEvent:
    """An event of a device that lags behind the host: it knows its time only once the device has passed it."""

    def __init__(self, device: _Device) -> None:
        self._device = device
        self.at = 0.0

    def record(self) -> None:
        self.at = self._device.queue

    def query(self) -> bool:
        return self.at <= self._device.passed

    def elapsed_time(self, end: _DeviceEvent) -> float:
        return (end.at - self.at) * 1e3


class _Device:
    """Work is queued at once and passed later."""

    def __init__(self) -> None:
        self.queue = 0.0
        self.passed = -1.0
        self.made = 0

    def event(self) -> _DeviceEvent:
        self.made += 1
        return _DeviceEvent(self)


def _step(timeline: Timeline, clock: _Clock, number: int) -> None:
    timeline.start_step(number)
    with timeline.span("data_wait"):
        clock.wait(0.1)
    with timeline.span("forward"):
        clock.wait(1.0)
        with timeline.span("communication_tp"):
            clock.wait(0.25)
        clock.wait(0.5)
    clock.wait(0.05)
    with timeline.span("optimizer"):
        clock.wait(0.2)
    timeline.end_step()


def test_the_split_adds_up_to_the_step() -> None:
    clock = _Clock()
    timeline = Timeline(clock=clock)
    _step(timeline, clock, 7)
    split = next(s for s in timeline.finished() if s.step == 7)
    expected = {"data_wait": 0.1, "forward": 1.5, "communication_tp": 0.25, "optimizer": 0.2, "other": 0.05}
    assert {kind: seconds for kind, seconds in split.by_kind.items() if seconds} == pytest.approx(expected)
    assert split.seconds == pytest.approx(2.1) == pytest.approx(sum(split.by_kind.values()))


def test_the_rest_of_an_outer_span_is_its_own() -> None:
    """So a schedule's bubble is what an outer span keeps after forward and backward are taken out."""
    clock = _Clock()
    timeline = Timeline(clock=clock)
    timeline.start_step(1)
    with timeline.span("bubble"):
        clock.wait(0.3)
        for kind in ("forward", "backward"):
            with timeline.span(kind):
                clock.wait(1.0)
        clock.wait(0.2)
    timeline.end_step()
    split = next(s for s in timeline.finished() if s.step == 1)
    assert split.by_kind["bubble"] == pytest.approx(0.5)


def test_a_late_batch_shows_as_data_wait() -> None:
    clock = _Clock()
    timeline = Timeline(clock=clock)
    for step in (1, 2):
        timeline.start_step(step)
        with timeline.span("data_wait"):
            clock.wait(0.1 if step == 2 else 0.0)
        with timeline.span("forward"):
            clock.wait(0.4)
        timeline.end_step()
    splits = {s.step: s for s in timeline.finished()}
    assert splits[2].by_kind["data_wait"] - splits[1].by_kind["data_wait"] == pytest.approx(0.1)
    assert splits[2].by_kind["forward"] == pytest.approx(splits[1].by_kind["forward"])


def test_pauses_between_steps_belong_to_no_step() -> None:
    clock = _Clock()
    timeline = Timeline(clock=clock)
    _step(timeline, clock, 1)
    with timeline.span("checkpoint"):
        clock.wait(3.0)
    with timeline.span("evaluation"):
        clock.wait(5.0)
    _step(timeline, clock, 2)
    record = time_metrics(timeline.finished())
    assert record["time/step_seconds"] == pytest.approx(2.1)
    assert record["time/pause_checkpoint_seconds"] == pytest.approx(3.0)
    assert record["time/pause_evaluation_seconds"] == pytest.approx(5.0)
    assert record["time/pause_seconds"] == pytest.approx(8.0)
    kinds = [v for k, v in record.items() if "pause" not in k and k != "time/step_seconds"]
    assert sum(kinds) == pytest.approx(record["time/step_seconds"])


def test_speed_counts_what_lies_between_steps_and_has_no_name() -> None:
    clock = _Clock()
    timeline = Timeline(clock=clock)
    clock.wait(60.0)
    _step(timeline, clock, 1)
    clock.wait(0.5)
    with timeline.span("checkpoint"):
        clock.wait(3.0)
    _step(timeline, clock, 2)
    record = time_metrics(timeline.finished())
    # two steps of 2.1 s and half a second between them; neither the start nor the checkpoint is a step's cost
    assert record["time/step_and_pause_seconds"] == pytest.approx((2 * 2.1 + 0.5) / 2)
    assert record["time/step_seconds"] == pytest.approx(2.1)


def test_a_step_cut_short_by_an_error_keeps_its_spans_closed() -> None:
    clock = _Clock()
    timeline = Timeline(clock=clock)
    timeline.start_step(1)
    with pytest.raises(KeyError), timeline.span("forward"):
        clock.wait(1.0)
        raise KeyError
    clock.wait(0.5)
    timeline.end_step()
    split = next(s for s in timeline.finished() if s.step == 1)
    assert (split.by_kind["forward"], split.by_kind["other"]) == pytest.approx((1.0, 0.5))


def test_nothing_is_read_before_the_device_has_passed_it() -> None:
    device = _Device()
    timeline = Timeline(event_factory=device.event)
    device.queue = 1.0
    timeline.start_step(1)
    with timeline.span("forward"):
        device.queue = 3.0
    timeline.end_step()
    assert timeline.finished() == []
    device.passed = 3.0
    split = timeline.finished()[-1]
    assert (split.step, split.seconds, split.by_kind["forward"]) == (1, pytest.approx(2.0), pytest.approx(2.0))


def test_events_are_used_again() -> None:
    device = _Device()
    timeline = Timeline(event_factory=device.event)
    made: list[int] = []
    for step in range(20):
        timeline.start_step(step)
        with timeline.span("forward"):
            device.queue += 1.0
        device.passed = device.queue
        timeline.end_step()
        made.append(device.made)
    assert made[-1] == made[2]


def test_an_unknown_kind_is_refused() -> None:
    timeline = Timeline()
    with pytest.raises(ValueError, match="span 'thinking' is not one of forward, backward"), timeline.span("thinking"):
        pass
    with pytest.raises(ValueError, match="span 'communication_xp'"), timeline.span("communication_xp"):
        pass


def test_no_step_gives_no_step_time() -> None:
    assert time_metrics([]) == {}
    assert time_metrics([StepSplit(None, 2.0, {"other": 2.0})]) == {
        "time/pause_seconds": 2.0,
        "time/pause_other_seconds": 2.0,
    }


def test_without_an_accelerator_the_clock_times() -> None:
    factory = device_event_factory()
    assert (factory is None) == (not torch.accelerator.is_available())


@pytest.mark.gpu
def test_device_events_split_a_step_of_kernels() -> None:
    timeline = Timeline(event_factory=device_event_factory())
    x = torch.ones(2048, 2048, device=torch.accelerator.current_accelerator())
    timeline.start_step(1)
    with timeline.span("forward"):
        for _ in range(50):
            x = x @ x * 1e-4
    timeline.end_step()
    torch.accelerator.synchronize()
    split = next(s for s in timeline.finished() if s.step == 1)
    assert split.by_kind["forward"] > 0.9 * split.seconds > 0


def test_chosen_steps_are_traced_and_no_others(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        with profiled(step, (2,), tmp_path / "profile", rank=0):
            torch.ones(4) + 1
    files = list((tmp_path / "profile").iterdir())
    assert [f.name for f in files] == ["step_2_rank_0.json"]
    assert "traceEvents" in json.loads(files[0].read_text())
