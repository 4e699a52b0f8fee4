import json
from pathlib import Path

import torch
from common import EPOCHS, Net, load_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
train_data, val_data = load_data()
train_loader = DataLoader(train_data, batch_size=64, shuffle=True)
val_loader = DataLoader(val_data, batch_size=256)
model = Net().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

folder = Path("runs/digits-pytorch")
folder.mkdir(parents=True, exist_ok=True)
first_epoch, step, best = 0, 0, 0.0
if (folder / "last.pt").exists():
    saved = torch.load(folder / "last.pt", map_location="cpu")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first_epoch, step, best = saved["epoch"], saved["step"], saved["best"]
    torch.set_rng_state(saved["random"])


def log(**record):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def forward(batch):
    labels = batch["labels"].to(device)
    with torch.autocast(device, torch.bfloat16):
        logits = model(batch["pixels"].to(device))
        return logits, labels, F.cross_entropy(logits, labels)


for epoch in range(first_epoch, EPOCHS):
    model.train()
    for batch in train_loader:
        _, _, loss = forward(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            log(step=step, train_loss=loss.item())
    model.eval()
    total, correct = 0.0, 0
    with torch.no_grad():
        for batch in val_loader:
            logits, labels, loss = forward(batch)
            total += loss.item() * len(labels)
            correct += (logits.argmax(-1) == labels).sum().item()
    accuracy = correct / len(val_data)
    log(step=step, val_loss=total / len(val_data), val_accuracy=accuracy)
    if accuracy > best:
        best = accuracy
        torch.save(model.state_dict(), folder / "best.pt")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"epoch": epoch + 1, "step": step, "best": best, "random": torch.get_rng_state()}
    torch.save(state, folder / "last.pt")
print(f"accuracy {best:.3f}")
