"""One's own loop: the same parts as `fit`, losing nothing."""

from __future__ import annotations

import inspect
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

import sheer
from tests.task import assert_same, loader, loss_step, model, plain_loader, step, trainer


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.g = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.d = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))


def d_step(gan: GAN, batch: Any) -> Tensor:
    fake = gan.g(torch.randn(len(batch[0]), 4)).detach()
    return F.softplus(-gan.d(batch[0])).mean() + F.softplus(gan.d(fake)).mean()


def g_step(gan: GAN, batch: Any) -> Tensor:
    return F.softplus(-gan.d(gan.g(torch.randn(len(batch[0]), 4)))).mean()


def train_gan(folder: str, stop_at: int | None = None, **settings: Any) -> tuple[GAN, Any, list[dict[str, Any]]]:
    sheer.seed_everything(0)
    gan = GAN()
    d, g = Adam(gan.d.parameters(), lr=1e-2), Adam(gan.g.parameters(), lr=1e-2)
    made = trainer(run_dir=folder, resume="auto", log_every_n_steps=4, checkpoint=True, max_epochs=3, **settings)
    run = made.start(gan, optimizers={"d": d, "g": g}, schedulers={"d": StepLR(d, 1, gamma=0.99)})
    for batch in run.steps(loader()):
        run.update(d, d_step, batch)
        if run.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        run.update(g, g_step, batch)
    result = run.finish()
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return gan, result, lines


def test_a_gan_equals_the_hand_written_loop() -> None:
    sheer.seed_everything(0)
    gan = GAN()
    d, g = Adam(gan.d.parameters(), lr=1e-2), Adam(gan.g.parameters(), lr=1e-2)
    scheduler = StepLR(d, 1, gamma=0.99)
    batches, sampler = plain_loader(seed=3)  # the seed that GAN() set last
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in batches:
            d.zero_grad()
            d_step(gan, batch).backward()
            d.step()
            scheduler.step()
            g.zero_grad()
            g_step(gan, batch).backward()
            g.step()

    other, result, lines = train_gan("run")
    assert_same(other.state_dict(), gan.state_dict())
    assert result.step == 21 and result.epoch == 3  # two updates are one step
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 21]
    assert set(lines[0]) == {"step", "epoch", "train/d/loss", "train/g/loss"}


@pytest.mark.parametrize("stop", [5, 7, 13])
def test_it_resumes_exactly(stop: int) -> None:
    gan, _, lines = train_gan("whole")
    with pytest.raises(SystemExit) as left:
        train_gan("stopped", stop)
    assert left.value.code == 85
    again, _, again_lines = train_gan("stopped")
    assert_same(again.state_dict(), gan.state_dict())
    assert again_lines == lines


def test_the_lines_of_fit_with_one_optimizer_give_what_fit_gives() -> None:
    nets = []
    for own in (False, True):
        net = model()
        optimizer = AdamW(net.parameters(), lr=1e-2)
        torch.manual_seed(0)
        made = trainer(max_epochs=2, gradient_clip_val=0.5, precision="bf16-mixed", micro_batch_size=6)
        if own:
            run = made.start(net, optimizers={"optimizer": optimizer})
            for batch in run.steps(loader()):
                run.update(optimizer, step, batch)
            run.finish()
        else:
            made.fit(net, step, loader(), optimizer=optimizer)
        nets.append(net)
    assert_same(nets[0].state_dict(), nets[1].state_dict())


def test_the_halves_of_an_update_leave_room_for_gradient_surgery() -> None:
    """Two losses, of which the second only counts where it agrees with the first."""

    def other_step(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0]).abs().mean()

    net = model(0.0)
    optimizer = SGD(net.parameters(), lr=0.1)
    torch.manual_seed(0)
    batches, _ = plain_loader()
    for batch in batches:
        first = torch.autograd.grad(loss_step(net, batch), list(net.parameters()))
        second = torch.autograd.grad(other_step(net, batch), list(net.parameters()))
        for parameter, a, b in zip(net.parameters(), first, second, strict=True):
            parameter.grad = a + b * (a * b > 0)
        optimizer.step()

    other = model(0.0)
    own = SGD(other.parameters(), lr=0.1)
    torch.manual_seed(0)
    run = trainer(max_epochs=1).start(other, optimizers={"sgd": own})
    for batch in run.steps(loader()):
        run.backward(loss_step, batch)
        before = [parameter.grad for parameter in other.parameters()]
        for parameter in other.parameters():
            parameter.grad = None
        run.backward(other_step, batch)
        for parameter, a in zip(other.parameters(), before, strict=True):
            assert a is not None and parameter.grad is not None
            parameter.grad = a + parameter.grad * (a * parameter.grad > 0)
        run.apply(own)
    run.finish()
    assert_same(other.state_dict(), net.state_dict())


def test_a_mean_over_micro_batches_leaves_gradients_alone_that_were_there_before() -> None:
    def weighted(net: nn.Module, batch: Any) -> sheer.Mean:
        return sheer.mean(net(batch[0]), mask=batch[1] > 0)

    net = nn.Linear(6, 1)
    optimizer = SGD(net.parameters(), lr=0.1)
    run = trainer(max_steps=1, micro_batch_size=5).start(net, optimizers={"sgd": optimizer})
    for batch in run.steps(loader()):
        run.backward(weighted, batch)
        (once,) = (net.weight.grad.clone(),)  # type: ignore[union-attr]
        run.backward(weighted, batch)
        torch.testing.assert_close(net.weight.grad, 2 * once)
        run.apply(optimizer)
    run.finish()


def test_without_a_loader_the_steps_are_counted_and_resumed() -> None:
    def play(folder: str, stop_at: int | None = None) -> nn.Module:
        sheer.seed_everything(0)
        net = nn.Linear(6, 1)
        optimizer = SGD(net.parameters(), lr=0.01)
        run = trainer(max_steps=10, run_dir=folder, resume="auto", checkpoint=True).start(
            net, optimizers={"sgd": optimizer}
        )
        for number in run.steps():
            assert number == run.step
            run.update(optimizer, lambda m, batch: m(batch).square().mean(), torch.randn(8, 6))
            run.log({"seen": number})
            if number == stop_at:
                signal.raise_signal(signal.SIGINT)
        assert run.finish().metrics["train/seen"] == 5.5
        return net

    whole = play("whole")
    with pytest.raises(SystemExit):
        play("stopped", stop_at=4)
    assert_same(play("stopped").state_dict(), whole.state_dict())


def test_evaluate_logs_monitors_and_can_stop() -> None:
    class StopSoon:
        def on_validation_end(self, step: int, metrics: Any) -> str | None:
            return "good enough" if step >= 8 else None

    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    made = trainer(max_steps=100, monitor="val/loss", checkpoint=True, callbacks=[StopSoon()], run_dir="run")
    run = made.start(net, optimizers={"adam": optimizer})
    for batch in run.steps(loader()):
        run.update(optimizer, step, batch)
        if run.step % 4 == 0:
            metrics = run.evaluate(step, loader(50))
            assert set(metrics) == {"val/loss", "val/error"}
    result = run.finish()
    assert result.stopped_by == "good enough" and result.step == 8
    assert result.best is not None and result.best.name in ("step-00000004", "step-00000008")


def test_the_loop_knows_its_length_and_where_an_epoch_ends() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    run = trainer(max_epochs=2, accumulate_grad_batches=3).start(net, optimizers={"adam": optimizer})
    ends = []
    for batch in run.steps(loader()):
        run.update(optimizer, step, batch)
        ends.append(run.epoch_ends)
    run.finish()
    assert ends == [False, False, True] * 2


def test_breaking_out_of_the_loop_saves_what_is_done() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    run = trainer(max_steps=100, checkpoint=True, run_dir="run").start(net, optimizers={"adam": optimizer})
    for batch in run.steps(loader()):
        run.update(optimizer, step, batch)
        if run.step == 3:
            break
    result = run.finish()
    assert result.stopped_by == "break" and result.last is not None and result.last.name == "step-00000003"


def test_with_accumulation_the_batches_of_a_step_are_handed_on_as_they_are() -> None:
    net = model(0.0)
    whole = model(0.0)
    for target, size, accumulate in ((net, 8, 2), (whole, 16, 1)):
        optimizer = SGD(target.parameters(), lr=0.1)
        target[1].eval()
        torch.manual_seed(0)
        run = trainer(max_epochs=1, accumulate_grad_batches=accumulate).start(target, optimizers={"sgd": optimizer})
        for batch in run.steps(loader(size)):
            run.update(optimizer, step, batch)
        run.finish()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name])


def test_breaking_out_of_the_loop_counts_the_batches_of_the_last_step() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    run = trainer(max_steps=100, checkpoint=True, run_dir="run").start(net, optimizers={"adam": optimizer})
    for batch in run.steps(loader()):
        run.update(optimizer, step, batch)
        if run.step == 7:
            break
    assert run.finish().epoch == 1
    progress = json.loads(Path("run/checkpoints/last/state.json").read_text())["progress"]
    assert (progress["step"], progress["batch"], progress["samples"]) == (7, 0, 100)


def test_a_signal_within_a_with_block_leaves_as_without_it() -> None:
    told: list[BaseException] = []

    class Told:
        def on_exception(self, error: BaseException) -> None:
            told.append(error)

    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    made = trainer(max_steps=100, checkpoint=True, run_dir="run", callbacks=[Told()])
    with pytest.raises(SystemExit) as left, made.start(net, optimizers={"adam": optimizer}) as run:
        for batch in run.steps(loader()):
            run.update(optimizer, step, batch)
            if run.step == 3:
                signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 85 and told == []
    assert Path("run/checkpoints/last").readlink().name == "step-00000003"


def test_an_error_after_the_end_of_the_run_comes_through() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=1e-2)
    with (
        pytest.raises(ValueError, match="after the end"),
        trainer(max_steps=1).start(net, optimizers={"a": optimizer}) as run,
    ):
        for batch in run.steps(loader()):
            run.update(optimizer, step, batch)
        run.finish()
        raise ValueError("after the end")


def test_samples_are_those_of_the_order_where_the_batch_does_not_show_them() -> None:
    def collate(items: list[Any]) -> dict[str, Tensor]:
        return {"edges": torch.zeros(2, 7), "x": torch.stack([x for x, _ in items])}

    def first(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["x"]).mean()

    results = []
    for own in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(6, 1)
        optimizer = SGD(net.parameters(), lr=0.1)
        made = trainer(max_epochs=1)
        if own:
            run = made.start(net, optimizers={"sgd": optimizer})
            for batch in run.steps(loader(collate_fn=collate)):
                run.update(optimizer, first, batch)
            results.append(run.finish().metrics)
        else:
            results.append(made.fit(net, first, loader(collate_fn=collate), optimizer=optimizer).metrics)
    assert results[0] == results[1]


def test_a_step_that_several_optimizers_skip_is_skipped_once_and_the_cap_holds() -> None:
    def bad(part: str) -> Any:
        return lambda net, batch: net[part](batch).mean() * float("nan")

    net = nn.ModuleDict({"d": nn.Linear(6, 1), "g": nn.Linear(6, 1)})
    d, g = SGD(net["d"].parameters(), lr=0.1), SGD(net["g"].parameters(), lr=0.1)
    made = trainer(max_steps=150, nonfinite="skip")
    with (
        pytest.raises(sheer.NonFiniteError, match="in 100 steps in a row, up to step 100"),
        made.start(net, optimizers={"d": d, "g": g}) as run,
    ):
        for _ in run.steps():
            run.update(d, bad("d"), torch.randn(4, 6))
            run.update(g, bad("g"), torch.randn(4, 6))


def test_a_scale_that_grows_between_two_optimizers_leaves_the_gradients_of_the_second() -> None:
    """Both have their gradients before either is updated; growing is seen after the first update."""
    net = nn.Linear(6, 1)
    before = net.bias.item()
    first, second = SGD([net.weight], lr=0.1), SGD([net.bias], lr=0.1)
    run = trainer(max_steps=1, precision="16-mixed").start(net, optimizers={"first": first, "second": second})
    run._run.scaler.set_growth_interval(1)  # type: ignore[union-attr]
    for _ in run.steps():
        run.backward(lambda net, batch: net(batch).float().mean() * 0.01, torch.randn(8, 6))
        run.apply(first)
        run.apply(second)
    run.finish()
    assert net.bias.item() == pytest.approx(before - 0.1 * 0.01, rel=1e-3)


def test_an_evaluation_that_stops_the_loop_and_averages_resume_exactly() -> None:
    def train(folder: str, stop_at: int | None = None) -> tuple[nn.Module, str]:
        sheer.seed_everything(0)
        net = model()
        optimizer = AdamW(net.parameters(), lr=1e-2)
        callbacks = [sheer.EarlyStopping(patience=2, min_delta=2.0), sheer.EMA(0.9)]
        run = trainer(
            max_epochs=4, run_dir=folder, resume="auto", checkpoint=True, monitor="val/loss", callbacks=callbacks
        ).start(net, optimizers={"adam": optimizer})
        for batch in run.steps(loader()):
            run.update(optimizer, step, batch)
            if run.step == stop_at:
                signal.raise_signal(signal.SIGTERM)
            if run.step % 3 == 0:
                run.evaluate(step, loader(50, shuffle=False))
        return net, run.finish().stopped_by

    whole, reason = train("whole")
    assert reason.startswith("EarlyStopping")
    for stop in (3, 5):
        with pytest.raises(SystemExit):
            train(f"stopped-{stop}", stop)
        again, again_reason = train(f"stopped-{stop}")
        assert_same(again.state_dict(), whole.state_dict())
        assert again_reason == reason


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Let Ctrl-C interrupt, which it does not in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_signals_are_caught_between_the_first_step_and_the_last_only() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    for stop in (None, 1):
        net = model()
        optimizer = AdamW(net.parameters(), lr=1e-2)
        run = trainer(max_steps=2).start(net, optimizers={"a": optimizer})
        assert handlers() == before
        for batch in run.steps(loader()):
            assert not set(handlers()) & set(before)
            run.update(optimizer, step, batch)
            if run.step == stop:
                break
        assert handlers() == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        run.finish()
    held = (run := trainer(max_steps=2).start(net, optimizers={"a": optimizer})).steps(loader())
    run.update(optimizer, step, next(held))
    run.finish()
    assert handlers() == before


class Saves:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, step: int, path: Path) -> None:
        self.steps.append(step)


def test_the_last_step_is_saved_at_once_and_again_only_where_something_came_after_it() -> None:
    for after, saved in (("nothing", [3]), ("evaluate", [3, 3]), ("log", [3, 3])):
        net, saves = model(), Saves()
        optimizer = AdamW(net.parameters(), lr=1e-2)
        made = trainer(max_steps=3, checkpoint=True, run_dir=after, callbacks=[saves])
        run = made.start(net, optimizers={"a": optimizer})
        for batch in run.steps(loader()):
            run.update(optimizer, step, batch)
        assert saves.steps == [3]
        if after == "evaluate":
            run.evaluate(step, loader(50))
        if after == "log":
            run.log({"seen": 1.0})
        run.finish()
        assert saves.steps == saved


def test_the_data_line_is_printed_when_the_loader_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    net = model()
    run = trainer(max_epochs=2).start(net, optimizers={"a": AdamW(net.parameters())})
    assert "data:" not in capsys.readouterr().out
    for batch in run.steps(loader()):
        run.update(run.optimizers["a"], step, batch)
    run.finish()
    assert "data: 100 samples shuffled by seed 2; 14 steps, 7 an epoch" in capsys.readouterr().out


def test_an_optimizer_may_be_stepped_by_hand_and_a_step_function_be_looked_at_once() -> None:
    class Counted:
        looks = 0

        @property
        def __signature__(self) -> inspect.Signature:
            Counted.looks += 1
            return inspect.signature(loss_step)

        def __call__(self, net: nn.Module, batch: Any) -> Tensor:
            return loss_step(net, batch)

    net = model()
    optimizer, counted = SGD(net.parameters(), lr=0.1), Counted()
    with trainer(max_steps=3).start(net, optimizers={"a": optimizer}) as run:
        for batch in run.steps(loader()):
            run.backward(counted, batch)
            optimizer.step()
            optimizer.zero_grad()
    assert Counted.looks == 1
