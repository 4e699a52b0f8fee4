import json
from pathlib import Path

import torch
from common import EPOCHS, Classifier, collate, load_data
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics.classification import MulticlassRecall

dist.init_process_group()
rank, ranks = dist.get_rank(), dist.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
train_data, val_data = load_data()
sampler = DistributedSampler(train_data)
train_loader = DataLoader(train_data, batch_size=32 // ranks, sampler=sampler, collate_fn=collate)
val_loader = DataLoader(val_data[rank::ranks], batch_size=96, collate_fn=collate)
model = Classifier().to(device)
parallel = DistributedDataParallel(model)
torch.manual_seed(rank)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
recall = MulticlassRecall(3).to(device)

folder = Path("runs/lstm-pytorch")
folder.mkdir(parents=True, exist_ok=True)
first_epoch, step, best = 0, 0, 0.0
if (folder / "last.pt").exists():
    saved = torch.load(folder / "last.pt", map_location="cpu")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first_epoch, step, best = saved["epoch"], saved["step"], saved["best"]
    torch.set_rng_state(saved["random"][rank])


def log(**record):
    if rank == 0:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def forward(batch):
    labels = batch["labels"].to(device)
    logits = parallel(batch["series"].to(device), batch["lengths"])
    return logits, labels, F.cross_entropy(logits, labels)


for epoch in range(first_epoch, EPOCHS):
    sampler.set_epoch(epoch)
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
    total = 0.0
    recall.reset()
    with torch.no_grad():
        for batch in val_loader:
            logits, labels, loss = forward(batch)
            total += loss.item() * len(labels)
            recall.update(logits, labels)
    value = recall.compute().item()
    total = torch.tensor(total, device=device)
    dist.all_reduce(total)
    log(step=step, val_loss=total.item() / len(val_data), val_recall=value)
    if value > best:
        best = value
        if rank == 0:
            torch.save(model.state_dict(), folder / "best.pt")
    random = [None] * ranks
    dist.all_gather_object(random, torch.get_rng_state())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"epoch": epoch + 1, "step": step, "best": best, "random": random}
    if rank == 0:
        torch.save(state, folder / "last.pt")
dist.destroy_process_group()
print(f"recall {best:.3f}")
