"""Run by `make package` in an environment that holds nothing but the wheel and what it depends on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sheer

assert "site-packages" in sheer.__file__, sheer.__file__
assert Path(sheer.__file__).with_name("py.typed").exists()
model = nn.Linear(4, 1)
loader = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=8, shuffle=True)
trainer = sheer.Trainer(
    max_epochs=2, monitor="val/loss", loggers=[sheer.TensorBoard(), sheer.CSV()], callbacks=[sheer.EMA()]
)
result = trainer.fit(
    model,
    lambda model, batch: model(batch[0]).square().mean(),
    loader,
    loader,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
)
assert result.step == 8 and result.best is not None
print("the wheel works")
