import json
from pathlib import Path

import torch
from common import EPOCHS, GPT, load_data, loss_of, warmup_cosine
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

dist.init_process_group()
rank, ranks = dist.get_rank(), dist.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
train_data, val_data, characters = load_data()
sampler = DistributedSampler(train_data)
train_loader = DataLoader(train_data, batch_size=32 // ranks, sampler=sampler)
val_loader = DataLoader(val_data[rank::ranks], batch_size=64)
model = GPT(characters).to(device)
parallel = DistributedDataParallel(model)
torch.manual_seed(rank)
optimizer = torch.optim.AdamW(model.groups(), lr=3e-3, betas=(0.9, 0.95))
scheduler = warmup_cosine(optimizer, 10, EPOCHS * len(train_loader))

folder = Path("runs/gpt-pytorch")
folder.mkdir(parents=True, exist_ok=True)
first_epoch, step, best = 0, 0, float("inf")
if (folder / "last.pt").exists():
    saved = torch.load(folder / "last.pt", map_location="cpu")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    first_epoch, step, best = saved["epoch"], saved["step"], saved["best"]
    torch.set_rng_state(saved["random"][rank])


def log(**record):
    if rank == 0:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def loss_on(batch):
    with torch.autocast(device, torch.bfloat16):
        return loss_of(parallel(batch["codes"].to(device)), batch["labels"].to(device))


for epoch in range(first_epoch, EPOCHS):
    sampler.set_epoch(epoch)
    model.train()
    for batch in train_loader:
        loss = loss_on(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            log(step=step, train_loss=loss.item())
    model.eval()
    with torch.no_grad():
        total = sum(loss_on(batch).item() * len(batch["codes"]) for batch in val_loader)
    total = torch.tensor(total, device=device)
    dist.all_reduce(total)
    val_loss = total.item() / len(val_data)
    log(step=step, val_loss=val_loss)
    if val_loss < best:
        best = val_loss
        if rank == 0:
            torch.save(model.state_dict(), folder / "best.pt")
    random = [None] * ranks
    dist.all_gather_object(random, torch.get_rng_state())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"scheduler": scheduler.state_dict(), "random": random}
    state |= {"epoch": epoch + 1, "step": step, "best": best}
    if rank == 0:
        torch.save(state, folder / "last.pt")
dist.destroy_process_group()
print(f"loss {best:.3f}")
