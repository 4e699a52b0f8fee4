import sheer
import torch
from common import EPOCHS, GAN, load_data
from torch.utils.data import DataLoader


def critic_step(gan, real):
    return gan.critic_loss(real)


def generator_step(gan, real):
    return gan.generator_loss(len(real))


def distance_step(gan, centres):
    return {"distance": gan.distance(centres)}


sheer.seed_everything(0)
centres, points = load_data()
gan = GAN()
critic = torch.optim.Adam(gan.critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
generator = torch.optim.Adam(gan.generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
loader = DataLoader(points, batch_size=256, shuffle=True)
trainer = sheer.Trainer(
    max_epochs=EPOCHS,
    log_every_n_steps=10,
    monitor="val/distance",
    checkpoint=sheer.Checkpoint(every_n_epochs=1),
    run_dir="runs/gan-sheer",
    resume="auto",
)
run = trainer.start(gan, optimizers={"critic": critic, "generator": generator})
for real in run.steps(loader):
    run.update(critic, critic_step, real)
    run.update(generator, generator_step, real)
    if run.step % len(loader) == 0:
        run.evaluate(distance_step, [centres])
result = run.finish()
print(f"distance {result.metrics['val/distance']:.3f}")
