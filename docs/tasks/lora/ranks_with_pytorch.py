import json
from pathlib import Path

import torch
from common import EPOCHS, load_texts, make_collate, make_model, make_tokenizer, tokenized
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import get_linear_schedule_with_warmup

dist.init_process_group()
rank, ranks = dist.get_rank(), dist.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
train_texts, val_texts = load_texts()
tokenizer = make_tokenizer(train_texts)
collate = make_collate(tokenizer)
train_data, val_data = tokenized(tokenizer, train_texts), tokenized(tokenizer, val_texts)
sampler = DistributedSampler(train_data)
train_loader = DataLoader(train_data, batch_size=16 // ranks, sampler=sampler, collate_fn=collate)
val_loader = DataLoader(val_data[rank::ranks], batch_size=32, collate_fn=collate)
model = make_model(tokenizer).to(device)
parallel = DistributedDataParallel(model)
torch.manual_seed(rank)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=3e-3)
scheduler = get_linear_schedule_with_warmup(optimizer, 5, EPOCHS * len(train_loader))

folder = Path("runs/lora-pytorch")
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


for epoch in range(first_epoch, EPOCHS):
    sampler.set_epoch(epoch)
    model.train()
    for batch in train_loader:
        loss = parallel(**batch.to(device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % 5 == 0:
            log(step=step, train_loss=loss.item())
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in val_loader:
            tokens = (batch["labels"][:, 1:] != -100).sum().item()
            total += model(**batch.to(device)).loss.item() * tokens
            count += tokens
    sums = torch.tensor([total, count], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    total, count = sums.tolist()
    val_loss = total / count
    log(step=step, val_loss=val_loss)
    if val_loss < best:
        best = val_loss
        if rank == 0:
            model.save_pretrained(folder / "best")
    random = [None] * ranks
    dist.all_gather_object(random, torch.get_rng_state())
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"scheduler": scheduler.state_dict(), "random": random}
    state |= {"epoch": epoch + 1, "step": step, "best": best}
    if rank == 0:
        torch.save(state, folder / "last.pt")
dist.destroy_process_group()
print(f"loss {best:.3f}")
