import json
from pathlib import Path

import torch
from common import EPOCHS, load_texts, make_collate, make_model, make_tokenizer, tokenized
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
train_texts, val_texts = load_texts()
tokenizer = make_tokenizer(train_texts)
collate = make_collate(tokenizer)
train_data, val_data = tokenized(tokenizer, train_texts), tokenized(tokenizer, val_texts)
train_loader = DataLoader(train_data, batch_size=16, shuffle=True, collate_fn=collate)
val_loader = DataLoader(val_data, batch_size=32, collate_fn=collate)
model = make_model(tokenizer).to(device)
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
    torch.set_rng_state(saved["random"])


def log(**record):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


for epoch in range(first_epoch, EPOCHS):
    model.train()
    for batch in train_loader:
        loss = model(**batch.to(device)).loss
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
    val_loss = total / count
    log(step=step, val_loss=val_loss)
    if val_loss < best:
        best = val_loss
        model.save_pretrained(folder / "best")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"scheduler": scheduler.state_dict(), "random": torch.get_rng_state()}
    state |= {"epoch": epoch + 1, "step": step, "best": best}
    torch.save(state, folder / "last.pt")
print(f"loss {best:.3f}")
