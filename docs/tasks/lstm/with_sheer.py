import sheer
import torch
from common import EPOCHS, Classifier, collate, load_data
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassRecall

recall = MulticlassRecall(3)


def step(model, batch):
    return F.cross_entropy(model(batch["series"], batch["lengths"]), batch["labels"])


def eval_step(model, batch):
    logits, labels = model(batch["series"], batch["lengths"]), batch["labels"]
    recall.update(logits, labels)
    return {"loss": F.cross_entropy(logits, labels), "recall": recall}


sheer.seed_everything(0)
train_data, val_data = load_data()
model = Classifier()
trainer = sheer.Trainer(
    max_epochs=EPOCHS,
    gradient_clip_val=1.0,
    log_every_n_steps=10,
    monitor="val/recall",
    monitor_mode="max",
    checkpoint=sheer.Checkpoint(every_n_epochs=1),
    run_dir="runs/lstm-sheer",
    resume="auto",
)
recall.to(trainer.device)
result = trainer.fit(
    model,
    step,
    DataLoader(train_data, batch_size=32, shuffle=True, collate_fn=collate),
    DataLoader(val_data, batch_size=96, collate_fn=collate),
    eval_step=eval_step,
    optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
)
print(f"recall {result.metrics['val/recall']:.3f}")
