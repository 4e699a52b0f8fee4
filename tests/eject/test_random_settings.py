"""Settings that nobody thought of together: ejected, run, and equal bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheer.eject.check import check
from sheer.eject.eject import eject
from tests.eject.scripts import CALL, script

EXAMPLES = int(os.environ.get("SHEER_EJECT_EXAMPLES", "5"))

chosen = st.fixed_dictionaries(
    {"max_steps": st.integers(3, 14), "log_every_n_steps": st.integers(1, 6)},
    optional={
        "precision": st.sampled_from(["bf16-mixed", "16-mixed", "64-true", "bf16-true", "tf32-true"]),
        "gradient_clip_val": st.sampled_from([0.05, 1.0]),
        "gradient_clip_algorithm": st.sampled_from(["norm", "value"]),
        "accumulate_grad_batches": st.integers(1, 3),
        "micro_batch_size": st.sampled_from([5, 8]),
        "nonfinite": st.sampled_from(["raise", "skip", "ignore"]),
        "validate_every_n_steps": st.integers(1, 5),
        "validate_first": st.booleans(),
        "limit_val_batches": st.sampled_from([0, 1, 0.5]),
        "limit_train_batches": st.sampled_from([2, 0.7]),
        "monitor": st.just("val/accuracy"),
        "monitor_mode": st.sampled_from(["min", "max"]),
        "deterministic": st.booleans(),
        "resume": st.just("auto"),
    },
)
callbacks = st.lists(
    st.sampled_from(
        [
            "sheer.EMA(0.8)",
            "sheer.LearningRateMonitor()",
            "sheer.GradientNorm()",
            "sheer.On(step_end=lambda step, model: None)",
        ]
    ),
    max_size=2,
    unique=True,
)
saves = st.sampled_from(["False", "sheer.Checkpoint(keep_last=1)", "sheer.Checkpoint(every_n_steps=3, keep_best=2)"])


def is_allowed(values: dict[str, Any], save: str) -> bool:
    """Whether the library itself accepts the settings together."""
    return not (
        ("resume" in values and save == "False")
        or ("gradient_clip_algorithm" in values and "gradient_clip_val" not in values)
        or ("monitor_mode" in values and "monitor" not in values)
        or (values.get("limit_val_batches") == 0 and ("monitor" in values or "validate_every_n_steps" in values))
        or (values.get("nonfinite") == "skip" and values.get("precision") == "16-mixed")
    )


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chosen, callbacks, saves, st.booleans())
def test_any_settings_together(values: dict[str, Any], plugins: list[str], save: str, scheduled: bool) -> None:
    if not is_allowed(values, save):
        return
    given_settings = ", ".join(f"{name}={value!r}" for name, value in values.items())
    text = script(
        f"{given_settings}, callbacks=[{', '.join(plugins)}], checkpoint={save}, run_dir='here'",
        f"{CALL}, scheduler=sheer.warmup_linear(warmup_steps=2)" if scheduled else CALL,
    )
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            original, made = Path("train.py"), Path("train_torch.py")
            original.write_text(text)
            made.write_text(eject(original).text)
            assert check(original, made, [], updates=1000).difference is None, text
        finally:
            os.chdir(before)
