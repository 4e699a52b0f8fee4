import lightning as L
import torch
from common import EPOCHS, GAN, load_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader


class LitGAN(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.gan = GAN()

    def training_step(self, real, _):
        critic, generator = self.optimizers()
        critic_loss = self.gan.critic_loss(real)
        critic.zero_grad()
        self.manual_backward(critic_loss)
        critic.step()
        generator_loss = self.gan.generator_loss(len(real))
        generator.zero_grad()
        self.manual_backward(generator_loss)
        generator.step()
        self.log_dict({"train/critic": critic_loss, "train/generator": generator_loss})

    def validation_step(self, centres, _):
        self.log("val/distance", self.gan.distance(centres), sync_dist=True)

    def configure_optimizers(self):
        critic = torch.optim.Adam(self.gan.critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
        generator = torch.optim.Adam(self.gan.generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
        return critic, generator


L.seed_everything(0)
centres, points = load_data()
folder = "runs/gan-lightning"
checkpoint = ModelCheckpoint(folder, monitor="val/distance", save_last=True)
trainer = L.Trainer(
    max_epochs=EPOCHS, log_every_n_steps=10, callbacks=[checkpoint], logger=CSVLogger(folder),
    devices=4, strategy="ddp_find_unused_parameters_true",
)  # fmt: skip
trainer.fit(
    LitGAN(),
    DataLoader(points, batch_size=64, shuffle=True),
    DataLoader(centres, batch_size=8),
    ckpt_path="last",
)
print(f"distance {checkpoint.best_model_score:.3f}")
