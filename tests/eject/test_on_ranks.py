"""Small runs on several ranks, ejected, started as by torchrun (the first by itself) where the library cannot be imported: equal to the library's own, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheer.eject.check import check
from sheer.eject.eject import eject
from sheer.eject.program import Refusal
from tests.eject.scripts import CALL, OFF, ON, ON_RANKS, OWN, script


@pytest.mark.parametrize("row", [pytest.param("DDP", marks=pytest.mark.new_processes), *list(ON_RANKS)[1:]])
def test_an_ejected_run_on_ranks_is_the_same_run(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ranks, text = ON_RANKS[row]
    original, made = tmp_path / "train.py", tmp_path / "train_torch.py"
    original.write_text(text)
    ejected = eject(original)
    assert ejected.ranks == ranks
    assert "sheer" not in ejected.text.replace("`sheer eject`", "")
    assert f"torchrun --nproc-per-node {ranks} train_torch.py" in ejected.text
    made.write_text(ejected.text)
    found = check(original, made, [], updates=1000, ranks=ranks)
    assert found.difference is None
    assert found.updates > 1 and found.logged > 1


def test_a_script_that_leaves_it_to_the_number_of_processes_is_for_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(script(f"max_steps=9, {OFF}"))
    ejected = eject(tmp_path / "train.py")
    assert 'for one process (set parallel="ddp" or "fsdp" for several ranks)' in ejected.text
    assert "distributed" not in ejected.text and ejected.ranks == 1


DDP = f"max_steps=9, parallel='ddp', {OFF}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (script(f"max_steps=9, parallel='ddp', {ON}"), "Set checkpoint=False to eject a script for several ranks"),
        (script(f"max_time=9.0, parallel='ddp', {OFF}"), "each rank has a clock of its own"),
        (script(DDP).replace("shuffle=True)", "shuffle=True, num_workers=1)"), "without workers and limits"),
        (script(DDP, CALL.replace("val_loader", "list(val_loader)")), "a loader to validate on is another"),
        (script(DDP) + "trainer.test(model, step, val_loader)\n", "test, validate and predict cannot be ejected"),
        (script(f"max_steps=9, parallel=sheer.Parallel(tp=2), {OFF}"), "tp divides layers by a plan"),
        (script(DDP, f"{CALL}, parallelize=print"), "parallelize is a function"),
        (script(DDP).replace("trainer.fit(", "run = trainer.start(model, optimizers={'a': optimizer})\nfor batch in run.steps(train_loader):\n    run.update(optimizer, step, batch)\n#"), "a loop of your own"),
        (script(f"{DDP}, callbacks=[Stopper(7)]", before=OWN), "Stopper may end the run on a step"),
        (script(f"max_steps=9, parallel=chosen, {OFF}", before="chosen = sheer.Parallel()\n"), "sheer.Parallel is used here"),
    ],
)  # fmt: skip
def test_refused(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(text)
    with pytest.raises(Refusal) as error:
        eject(tmp_path / "train.py")
    assert said in str(error.value)
    assert "Please report" not in str(error.value)
