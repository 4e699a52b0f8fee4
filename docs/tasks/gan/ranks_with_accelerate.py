import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from common import EPOCHS, GAN, load_data
from torch import nn
from torch.utils.data import DataLoader


class Losses(nn.Module):
    def __init__(self, gan):
        super().__init__()
        self.gan = gan

    def forward(self, name, given):
        return getattr(self.gan, name)(given)


set_seed(0)
centres, points = load_data()
gan = GAN()
critic = torch.optim.Adam(gan.critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
generator = torch.optim.Adam(gan.generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
unused = DistributedDataParallelKwargs(find_unused_parameters=True)
accelerator = Accelerator(kwargs_handlers=[unused])
losses, critic, generator, loader = accelerator.prepare(
    Losses(gan), critic, generator, DataLoader(points, batch_size=64, shuffle=True)
)


class Progress:
    epoch, step, best = 0, 0, float("inf")

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, state):
        vars(self).update(state)


progress = Progress()
accelerator.register_for_checkpointing(progress)
folder = Path("runs/gan-accelerate")
folder.mkdir(parents=True, exist_ok=True)
if (folder / "last").exists():
    accelerator.load_state(folder / "last")


def log(**record):
    if accelerator.is_main_process:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


while progress.epoch < EPOCHS:
    for real in loader:
        critic.zero_grad()
        critic_loss = losses("critic_loss", real)
        accelerator.backward(critic_loss)
        critic.step()
        generator.zero_grad()
        generator_loss = losses("generator_loss", len(real))
        accelerator.backward(generator_loss)
        generator.step()
        progress.step += 1
        if progress.step % 10 == 0:
            log(step=progress.step, critic=critic_loss.item(), generator=generator_loss.item())
    with torch.no_grad():
        distance = gan.distance(centres.to(accelerator.device)).item()
    log(step=progress.step, distance=distance)
    progress.epoch += 1
    if distance < progress.best:
        progress.best = distance
        accelerator.save_model(gan, folder / "best")
    accelerator.save_state(folder / "last")
print(f"distance {progress.best:.3f}")
