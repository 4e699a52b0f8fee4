import lightning as L
import torch
from common import EPOCHS, load_texts, make_collate, make_model, make_tokenizer, tokenized
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup


class Finetuned(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, _):
        tokens = (batch["labels"][:, 1:] != -100).sum().item()
        self.log("val/loss", self.model(**batch).loss, batch_size=tokens, sync_dist=True)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        steps = self.trainer.estimated_stepping_batches
        scheduler = get_linear_schedule_with_warmup(optimizer, 5, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


L.seed_everything(0)
train_texts, val_texts = load_texts()
tokenizer = make_tokenizer(train_texts)
collate = make_collate(tokenizer)
train_data, val_data = tokenized(tokenizer, train_texts), tokenized(tokenizer, val_texts)
model = make_model(tokenizer)
folder = "runs/lora-lightning"
checkpoint = ModelCheckpoint(folder, monitor="val/loss", save_last=True)
trainer = L.Trainer(
    max_epochs=EPOCHS,
    devices=4,
    gradient_clip_val=1.0,
    log_every_n_steps=5,
    callbacks=[checkpoint],
    logger=CSVLogger(folder),
)
trainer.fit(
    Finetuned(model),
    DataLoader(train_data, batch_size=4, shuffle=True, collate_fn=collate),
    DataLoader(val_data, batch_size=32, collate_fn=collate),
    ckpt_path="last",
)
if trainer.is_global_zero:
    best = Finetuned.load_from_checkpoint(checkpoint.best_model_path, model=model)
    best.model.save_pretrained(f"{folder}/best")
print(f"loss {checkpoint.best_model_score:.3f}")
