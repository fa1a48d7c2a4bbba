"""transformers.Trainer with EFELoss: a small BERT, made from a config, plans the output grid of a toy task.

Each cell of a grid is a token. A head gives the logits of T steps, the planner's first T layers one each. The loss is
a part of the model, so that the Trainer's optimizer trains its preferences too, checkpoints hold them, and several
processes keep them alike.

    python examples/hf_trainer.py                 # pip install "transformers>=4.57" "accelerate>=1.0"
    python examples/hf_trainer.py --steps 20

Nothing is downloaded. The task is to mirror a grid. It prints what the Trainer logs, then the share of right cells on
new grids beside that of copying the input.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from efe_kernels import EFELoss

STEPS, COLORS, SIDE = 2, 6, 4


class Result(NamedTuple):
    copied: float  # share of right cells of the input itself, on new grids
    planned: float  # the same of the plan's last step
    losses: list[float]  # as logged
    loss_state: dict[str, Tensor]  # of EFELoss, after training


class Planner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=COLORS, hidden_size=64, num_hidden_layers=STEPS, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=SIDE * SIDE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.read = nn.Linear(config.hidden_size, COLORS)
        self.loss = EFELoss(max_grid_size=SIDE, num_colors=COLORS, prompt_dim=COLORS)

    def forward(self, source: Tensor) -> Tensor:
        """[B, H, W] colours -> logits [B, T, H, W, C]."""
        hidden = self.encoder(source.flatten(1), output_hidden_states=True).hidden_states[1:]
        return self.read(torch.stack(hidden, 1)).unflatten(2, source.shape[1:])


class EFETrainer(Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """The mean over the episodes of a batch; the Trainer divides it by the number of batches that it adds up."""
        logits = model(inputs["source"])
        loss = self.accelerator.unwrap_model(model).loss(logits, inputs["target"]).total
        return (loss, {"logits": logits}) if return_outputs else loss


class Grids(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, count: int, seed: int) -> None:
        self.source = torch.randint(COLORS, (count, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"source": self.source[index], "target": self.source[index].flip(-1)}


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    planner = Planner()
    with tempfile.TemporaryDirectory() as folder:
        trainer = EFETrainer(
            model=planner,
            args=TrainingArguments(
                output_dir=folder, max_steps=settings.steps, per_device_train_batch_size=64, learning_rate=3e-3,
                lr_scheduler_type="cosine", warmup_steps=10, logging_steps=20, save_strategy="no", report_to=[],
                # The Trainer passes on what `forward` names; the target is for the loss.
                remove_unused_columns=False, seed=settings.seed, disable_tqdm=True,
            ),
            train_dataset=Grids(20_000, settings.seed),
        )  # fmt: skip
        trainer.train()
    new = Grids(512, settings.seed + 1).source.to(trainer.args.device)
    with torch.no_grad():
        planned = planner.eval()(new)[:, -1].argmax(-1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    copied, right = (float((grid == new.flip(-1)).float().mean()) for grid in (new, planned))
    print(f"right cells on new grids: copying {copied:.3f}, the plan {right:.3f}")
    return Result(copied, right, losses, planner.loss.state_dict())


if __name__ == "__main__":
    main()
