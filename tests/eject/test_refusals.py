"""What cannot be ejected is refused, by name and line, with a way out; nothing is written then, and nothing is written over."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sheer.cli import app
from sheer.eject.eject import eject
from sheer.eject.program import Refusal
from sheer.eject.script import Script
from tests.eject.scripts import CALL, OFF, script

SMALL = script(f"max_steps=9, {OFF}")


def refused(text: str, folder: Path, name: str = "train.py") -> str:
    path = folder / name
    path.write_text(text)
    with pytest.raises(Refusal) as error:
        eject(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL.replace("trainer.fit(", "def go(trainer):\n    trainer.fit(").rstrip() + "\ngo(trainer)\n", "the trainer is passed on"),
        (SMALL + f"trainer.fit({CALL})\n", "Eject a script for each call that trains"),
        (SMALL.replace("import sheer\n", "import sheer\nfrom sheer import *\n"), "Name what you import"),
        (SMALL.replace("import sheer\n", "import sheer\nimport sheer.trainer\n"), "line 4: import sheer.trainer is not followed"),
        (script(f"max_steps=9, autotune=True, {OFF}"), "says what to write in its place"),
        (script(f"max_steps=9, compile=sheer.Compile(activation_memory_budget=0.5), {OFF}"), "Eject with compile=True"),
        (SMALL + "print(sheer.Image(torch.zeros(3, 4, 4)))\n", "sheer.Image is used here, which has no form without the library. Hand it to your logger"),
        (script(f"max_steps=9, cuda_graph=True, {OFF}"), "cuda_graph=True has no form without the library yet"),
        (SMALL.replace("checkpoint=False", "nonfinite=sheer.Rollback()"), "nonfinite=Rollback(...) has no form without the library yet"),
        (SMALL + "print(sheer.find_lr)\n", "sheer.find_lr is used here, which has no form without the library"),
        (SMALL + "sheer.load_weights(model, 'w.safetensors', rename={'a': 'b'})\n", "load_weights(rename=...) has no form without the library"),
        (SMALL + "sheer.load_weights(model, 'w.ckpt')\n", "load_weights of 'w.ckpt' has no form without the library"),
        (SMALL.replace("checkpoint=False", "checkpoint=sheer.Checkpoint(directory='s3://a/b')"), "Checkpoint(directory=...) has no form without the library"),
        (SMALL + "print(trainer.settings)\n", "trainer.settings cannot be ejected here"),
        (SMALL.replace("trainer.fit(", "trainers = [trainer]\ntrainers[0].fit("), "the trainer is passed on"),
        (SMALL.replace("trainer = sheer.Trainer(", "trainers = [sheer.Trainer(").replace(f"{OFF})", f"{OFF})]").replace("trainer.fit", "trainers[0].fit"), "the trainer needs a name"),
        (SMALL.replace(f"trainer.fit({CALL})", "trainer.fit(*[model, step, train_loader], optimizer=optimizer)"), "* and ** hide what is passed"),
        (script(f"max_steps=9, **more, {OFF}", before="more = dict(callbacks=[sheer.EMA(0.9)])\n"), "** hides the callbacks"),
        (SMALL.replace("trainer.fit", "raise ValueError('before')\ntrainer.fit"), "failed before it came to fit"),
        (SMALL.split("trainer =")[0], "ended without a call of fit or start"),
        (SMALL.replace(f"trainer.fit({CALL})", f"print(trainer.fit({CALL}).metrics)\ntrainer.test(model, step, val_loader)"), "the result of fit needs a name"),
    ],
)  # fmt: skip
def test_refused(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(text, tmp_path)
    assert said in message
    assert "Please report" not in message


def test_a_module_that_imports_the_library_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helpers.py").write_text("import math\nimport sheer\n")
    message = refused(SMALL.replace("import sheer\n", "import sheer\nimport helpers\n"), tmp_path)
    assert f"{tmp_path / 'helpers.py'}, line 2" in message


def test_a_module_that_does_not_stays_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helpers.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(6, 2)\n")
    path = tmp_path / "train.py"
    path.write_text(
        SMALL.replace("import sheer\n", "import sheer\nimport helpers\n").replace(
            "optimizer = torch", "model = helpers.make()\noptimizer = torch"
        )
    )
    text = eject(path).text
    assert "import helpers\n" in text and "model = helpers.make()\n" in text and "def make" not in text


def test_a_call_in_another_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "body.py").write_text(SMALL)
    assert f"fit is called in {tmp_path / 'body.py'}" in refused("import body\n", tmp_path)


def test_a_notebook_is_told_the_way(tmp_path: Path) -> None:
    assert "jupyter nbconvert --to script" in refused("{}", tmp_path, "train.ipynb")


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output + (done.stderr if done.stderr_bytes else "")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, made = tmp_path / "train.py", tmp_path / "train_torch.py"
    path.write_text(SMALL)
    assert run("eject", "none.py")[0] == 2

    status, shown = run("show", path)
    assert status == 0 and "def fit(" in shown and not made.exists()

    status, said = run("eject", path, "--check", "--updates", "5")
    assert status == 0, said
    assert "compared over 5 updates" in said
    text = made.read_text()
    assert shown in text

    made.write_text(text.replace("lr=1e-2", "lr=2e-2"))  # an edit of the user's
    status, said = run("eject", path)
    assert status == 1 and "--force" in said
    assert "lr=2e-2" in made.read_text()

    path.write_text(SMALL.replace("max_steps=9", "max_steps=7"))
    status, said = run("eject", path, "--diff")
    today, own = said.split("# What you have changed since")
    assert "+MAX_STEPS = 7" in today and "lr=2e-2" not in today
    assert "lr=2e-2" in own and "MAX_STEPS" not in own.replace(" MAX_STEPS = 9", "")
    assert "lr=2e-2" in made.read_text()

    assert run("eject", path, "--force")[0] == 0
    assert "MAX_STEPS = 7" in made.read_text()
    assert not list(tmp_path.glob(".*trial*"))


def test_a_difference_is_said_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text(SMALL.replace("lr=1e-2", "lr=1e-2 * (1 + (__file__ == 'train.py'))"))  # it looks at its own name
    status, said = run("eject", "train.py", "--check")
    assert status == 1 and "do not do the same: after update 1" in said
    assert not (tmp_path / "train_torch.py").exists()


def test_what_the_script_says_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = SMALL.replace("x = torch.randn", "# a comment of mine\nx   =  torch.randn").replace(
        "\n    x, y = batch", "\n    x,y = batch  # both"
    )
    path = tmp_path / "train.py"
    path.write_text(odd)
    lines = eject(path).text.splitlines()
    left = [line for line in odd.splitlines() if "sheer" not in line and "trainer" not in line]
    at = -1
    for line in left:
        at = lines.index(line, at + 1)


REMARKS = """
    # the gradients explode otherwise
    gradient_clip_val=1.0,  # as in the paper
    precision="bf16-mixed",  # half the memory
    max_steps=3 * 3, checkpoint=False,  # 9, ä
    callbacks=[
        sheer.EarlyStopping(patience=3, monitor="val/loss"),  # three are enough
    ],
"""


def test_what_the_script_says_of_settings_is_said_where_they_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text(script(REMARKS))
    lines = eject(path).text.splitlines()
    assert "GRADIENT_CLIP_VAL = 1.0  # the gradients explode otherwise; as in the paper" in lines
    assert "# precision: half the memory" in lines[:8] and "# checkpoint: 9, ä" in lines[:8]
    assert "max_steps = 3 * 3" in lines
    assert 'early_stopping = EarlyStopping(patience=3, monitor="val/loss")  # three are enough' in lines


def test_float8_is_refused_with_the_way_to_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(script(f"max_steps=9, precision='float8-mixed', {OFF}"), tmp_path)
    assert 'Eject with "bf16-mixed", and call torchao.float8.convert_to_float8_training' in message


def test_what_a_script_names_of_the_data_is_found() -> None:
    text = "import sheer\nfrom sheer.data import Packed as P\nsheer.mean(P(x, 3))\nsheer.data.GlobalSampler(x)\nsheer.data\n"
    found = Script(Path("train.py"), text)
    assert sorted(name for _, name in found.references()) == ["GlobalSampler", "Packed", "data", "mean"]
    found.remove_imports()
    assert found.edited().startswith("sheer.mean(P(x, 3))")
