"""A policy learns to balance a pole (REINFORCE with a baseline): a loop of one's own, without a loader. About five seconds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import sheer

POLES, LIMIT = 64, 200  # poles that are balanced at once, and time steps until an episode ends


class CartPole:
    """Carts with poles, all moved at once; the equations of Barto, Sutton and Anderson (1983), as in Gym's CartPole."""

    def __init__(self) -> None:
        self.state = torch.empty(POLES, 4).uniform_(-0.05, 0.05)  # position, speed, angle, turning speed
        self.alive = torch.ones(POLES, dtype=torch.bool)

    def push(self, right: Tensor) -> None:
        """Push each cart for 0.02 s, to the right where `right` [POLES] is 1, else to the left."""
        _, speed, angle, turning = self.state.unbind(1)
        force = torch.where(right == 1, 10.0, -10.0)
        cos, sin = angle.cos(), angle.sin()
        push = (force + 0.05 * turning**2 * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        move = push - 0.05 * turn * cos / 1.1
        change = torch.stack([speed, move, turning, turn], dim=1)
        self.state = self.state + 0.02 * change
        self.alive &= (self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < math.radians(12))


def play(policy: nn.Module) -> dict[str, Tensor]:
    """Play until all poles have fallen; return what was seen and done, [time, POLES, ...], and how long each stood."""
    world, states, actions, alive = CartPole(), [], [], []
    with torch.no_grad():
        for _ in range(LIMIT):
            action = torch.distributions.Categorical(logits=policy(world.state)).sample()
            states.append(world.state)
            actions.append(action)
            alive.append(world.alive.clone())
            world.push(action)
            if not world.alive.any():
                break
    return {"states": torch.stack(states), "actions": torch.stack(actions), "alive": torch.stack(alive).float()}


def step(policy: nn.Module, played: dict[str, Tensor]) -> dict[str, Tensor | sheer.Mean]:
    alive = played["alive"]
    returns = alive.flip(0).cumsum(0).flip(0)  # one point for each time step to come
    baseline = (returns * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
    advantage = (returns - baseline) / LIMIT
    log_probability = torch.distributions.Categorical(logits=policy(played["states"])).log_prob(played["actions"])
    return {"loss": sheer.mean(-log_probability * advantage, mask=alive), "stood": alive.sum(0).mean()}


def main() -> None:
    sheer.seed_everything(0)
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    trainer = sheer.Trainer(
        max_steps=60, log_every_n_steps=10, device="cpu", run_dir="runs/reinforcement", resume="auto"
    )
    adam = torch.optim.Adam(policy.parameters(), lr=0.02)

    run = trainer.start(policy, optimizers={"adam": adam})
    for _ in run.steps():
        run.update(adam, step, play(policy))
    result = run.finish()
    print(f"after {result.step} episodes the poles stand for {result.metrics['train/stood']:.0f} of {LIMIT} time steps")


if __name__ == "__main__":
    main()
