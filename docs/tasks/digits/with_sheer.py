import sheer
import torch
from common import EPOCHS, Net, load_data
from torch.nn import functional as F
from torch.utils.data import DataLoader


def step(model, batch):
    logits, labels = model(batch["pixels"]), batch["labels"]
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}


sheer.seed_everything(0)
train_data, val_data = load_data()
model = Net()
trainer = sheer.Trainer(
    max_epochs=EPOCHS,
    precision="bf16-mixed",
    gradient_clip_val=1.0,
    log_every_n_steps=10,
    monitor="val/accuracy",
    monitor_mode="max",
    checkpoint=sheer.Checkpoint(every_n_epochs=1),
    run_dir="runs/digits-sheer",
    resume="auto",
)
result = trainer.fit(
    model,
    step,
    DataLoader(train_data, batch_size=64, shuffle=True),
    DataLoader(val_data, batch_size=256),
    optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
)
print(f"accuracy {result.metrics['val/accuracy']:.3f}")
