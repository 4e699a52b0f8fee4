"""Handwritten digits: trained, tested, and used without Sheer."""

import sheer, torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

sheer.seed_everything(0)  # before anything random is built
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
train, val, test = random_split(data, [1297, 250, 250])
train_loader = DataLoader(train, batch_size=64, shuffle=True)  # 64 samples a step, on any number of ranks
val_loader, test_loader = DataLoader(val, batch_size=256), DataLoader(test, batch_size=256)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def scheduler(optimizer, total_steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=total_steps)


def step(model, batch):  # one function: trained on its "loss", evaluated on all it returns
    x, y = batch
    logits = model(x)
    return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(-1) == y).float().mean()}


trainer = sheer.Trainer(
    max_epochs=10,
    precision="bf16-mixed",
    gradient_clip_val=1.0,
    monitor="val/accuracy",
    monitor_mode="max",
    checkpoint=sheer.Checkpoint(every_n_steps=100, keep_last=2, keep_best=1),
    callbacks=[sheer.EarlyStopping(patience=3)],
    loggers=[sheer.TensorBoard()],
    run_dir="runs/digits",
    resume="auto",
)
result = trainer.fit(model, step, train_loader, val_loader, optimizer=optimizer, scheduler=scheduler)
print(result.metrics)  # {"val/loss": ..., "val/accuracy": ...}
print(trainer.test(model, step, test_loader, checkpoint="best"))  # {"test/loss": ..., "test/accuracy": ...}

model.load_state_dict(load_file(result.best / "model.safetensors"))  # all that serving needs
