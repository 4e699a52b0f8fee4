import lightning as L
import torch
from common import EPOCHS, GPT, load_data, loss_of, warmup_cosine
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader


class LitGPT(L.LightningModule):
    def __init__(self, characters):
        super().__init__()
        self.gpt = GPT(characters)

    def training_step(self, batch, _):
        loss = loss_of(self.gpt(batch["codes"]), batch["labels"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val/loss", loss_of(self.gpt(batch["codes"]), batch["labels"]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.gpt.groups(), lr=3e-3, betas=(0.9, 0.95))
        steps = self.trainer.estimated_stepping_batches
        scheduler = warmup_cosine(optimizer, 10, steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


L.seed_everything(0)
train_data, val_data, characters = load_data()
folder = "runs/gpt-lightning"
checkpoint = ModelCheckpoint(folder, monitor="val/loss", save_last=True)
trainer = L.Trainer(
    max_epochs=EPOCHS,
    devices=4,
    precision="bf16-mixed",
    gradient_clip_val=1.0,
    log_every_n_steps=10,
    callbacks=[checkpoint],
    logger=CSVLogger(folder),
)
trainer.fit(
    LitGPT(characters),
    DataLoader(train_data, batch_size=8, shuffle=True),
    DataLoader(val_data, batch_size=64),
    ckpt_path="last",
)
print(f"loss {checkpoint.best_model_score:.3f}")
