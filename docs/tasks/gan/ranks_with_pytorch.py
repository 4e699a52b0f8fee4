import json
from pathlib import Path

import torch
from common import EPOCHS, GAN, load_data
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

dist.init_process_group()
rank, ranks = dist.get_rank(), dist.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
centres, points = load_data()
sampler = DistributedSampler(points)
loader = DataLoader(points, batch_size=256 // ranks, sampler=sampler)
gan = GAN().to(device)
torch.manual_seed(rank)
critic = torch.optim.Adam(gan.critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
generator = torch.optim.Adam(gan.generator.parameters(), lr=1e-3, betas=(0.0, 0.9))

folder = Path("runs/gan-pytorch")
folder.mkdir(parents=True, exist_ok=True)
first_epoch, step, best = 0, 0, float("inf")
if (folder / "last.pt").exists():
    saved = torch.load(folder / "last.pt", map_location="cpu")
    gan.load_state_dict(saved["gan"])
    critic.load_state_dict(saved["critic"])
    generator.load_state_dict(saved["generator"])
    first_epoch, step, best = saved["epoch"], saved["step"], saved["best"]
    torch.set_rng_state(saved["random"][rank])


def log(**record):
    if rank == 0:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def average(optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        dist.all_reduce(parameter.grad)
        parameter.grad /= ranks


for epoch in range(first_epoch, EPOCHS):
    sampler.set_epoch(epoch)
    for real in loader:
        critic.zero_grad()
        critic_loss = gan.critic_loss(real.to(device))
        critic_loss.backward()
        average(critic)
        critic.step()
        generator.zero_grad()
        generator_loss = gan.generator_loss(len(real))
        generator_loss.backward()
        average(generator)
        generator.step()
        step += 1
        if step % 10 == 0:
            log(step=step, critic=critic_loss.item(), generator=generator_loss.item())
    with torch.no_grad():
        distance = gan.distance(centres.to(device))
        dist.broadcast(distance, 0)
        distance = distance.item()
    log(step=step, distance=distance)
    if distance < best:
        best = distance
        if rank == 0:
            torch.save(gan.state_dict(), folder / "best.pt")
    random = [None] * ranks
    dist.all_gather_object(random, torch.get_rng_state())
    state = {"gan": gan.state_dict(), "critic": critic.state_dict()}
    state |= {"generator": generator.state_dict(), "random": random}
    state |= {"epoch": epoch + 1, "step": step, "best": best}
    if rank == 0:
        torch.save(state, folder / "last.pt")
dist.destroy_process_group()
print(f"distance {best:.3f}")
