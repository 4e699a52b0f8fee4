import sheer
import torch
from common import EPOCHS, GPT, load_data, loss_of
from torch.utils.data import DataLoader


def step(model, batch):
    return loss_of(model(batch["codes"]), batch["labels"])


sheer.seed_everything(0)
train_data, val_data, characters = load_data()
model = GPT(characters)
trainer = sheer.Trainer(
    max_epochs=EPOCHS,
    precision="bf16-mixed",
    gradient_clip_val=1.0,
    log_every_n_steps=10,
    monitor="val/loss",
    checkpoint=sheer.Checkpoint(every_n_epochs=1),
    run_dir="runs/gpt-sheer",
    resume="auto",
)
result = trainer.fit(
    model,
    step,
    DataLoader(train_data, batch_size=32, shuffle=True),
    DataLoader(val_data, batch_size=64),
    optimizer=torch.optim.AdamW(model.groups(), lr=3e-3, betas=(0.9, 0.95)),
    scheduler=sheer.warmup_cosine(warmup_steps=10),
)
print(f"loss {result.metrics['val/loss']:.3f}")
