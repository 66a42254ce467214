"""TRL's part of vs_trl.py: runs under an interpreter that has TRL and knows nothing of opd.

    python trl_side.py TASK.json

TASK holds ``task`` ("losses" or "train") and the settings that vs_trl.py wrote; figures are appended
to ``task["out"]``, one JSON object a line.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


def build_trainer(
    task: dict[str, Any], *, beta: float, steps: int, callbacks: list[TrainerCallback]
) -> DistillationTrainer:
    """TRL's trainer with float32 models, no activation checkpointing, and the task's prompts in order."""
    model = AutoModelForCausalLM.from_pretrained(task["student"], dtype=torch.float32)
    optim = task["optim"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim["lr"],
        betas=tuple(optim["betas"]),
        eps=optim["eps"],
        weight_decay=optim["weight_decay"],
    )
    shares = [lr / optim["lr"] for lr in optim["lrs"]]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: shares[min(step, len(shares) - 1)]
    )
    args = DistillationConfig(
        output_dir=task["folder"],
        beta=beta,
        temperature=task["temperature"],
        max_completion_length=task["max_tokens"],
        teacher_model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=task["prompts_per_step"],
        gradient_accumulation_steps=1,
        max_grad_norm=optim["max_grad_norm"],
        max_steps=steps,
        seed=task["seed"],
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return DistillationTrainer(
        model=model,
        teacher_model=task["teacher"],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": task["prompts"]}),
        processing_class=AutoTokenizer.from_pretrained(task["student"], padding_side="left"),
        callbacks=callbacks,
        optimizers=(optimizer, scheduler),
    )


class Watch(TrainerCallback):
    """Times each step from its first batch to its optimizer step, and keeps the student now and then."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task
        self._started = 0.0
        self._lr = 0.0
        self._row: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lr = kwargs["optimizer"].param_groups[0]["lr"]
        assert abs(self._lr - self._task["optim"]["lrs"][state.global_step]) < 1e-12
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._started
        self._row = {"step": state.global_step, "seconds": seconds, "lr": self._lr}
        if state.global_step % self._task["save_every"] == 0:
            kwargs["model"].save_pretrained(f"{self._task['folder']}/step_{state.global_step:06d}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            logged = {"loss": float(logs["loss"]), "grad_norm": float(logs["grad_norm"])}
            write(self._task, self._row | logged | {"length": logs["completions/mean_length"]})


def write(task: dict[str, Any], row: dict[str, Any]) -> None:
    """One line more."""
    with Path(task["out"]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def padded(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), filled up on one side as the trainer fills its own samples up."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids, mask


def losses(task: dict[str, Any]) -> None:
    """The training loss and its gradient on given completions, before any step, for every beta."""
    for beta in task["betas"]:
        trainer = build_trainer(task, beta=beta, steps=1, callbacks=[])
        pad_id = trainer.processing_class.pad_token_id
        prompt_ids, prompt_mask = padded(task["prompt_ids"], pad_id, left=True)
        completion_ids, completion_mask = padded(task["completion_ids"], pad_id, left=False)
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "num_items_in_batch": completion_mask.sum(),
        }
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        named = trainer.model.named_parameters()
        grads = {name: p.grad.clone() for name, p in named if p.grad is not None}
        save_file(grads, f"{task['folder']}/gradient_{beta}.safetensors")
        row = {"beta": beta, "loss": loss.item(), "tokens": int(completion_mask.sum())}
        write(task, row | {"gkd_loss": gkd_loss(trainer, inputs, beta)})


@torch.no_grad()
def gkd_loss(trainer: DistillationTrainer, inputs: dict[str, torch.Tensor], beta: float) -> float:
    """The same by the loss of TRL's older trainer, trl.experimental.gkd, per token."""
    from trl.experimental.gkd import GKDTrainer

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : inputs["prompt_ids"].shape[1]] = -100
    student, teacher = (
        m(input_ids=ids, attention_mask=mask).logits[:, :-1]
        for m in (trainer.model, trainer.teacher_model)
    )
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels[:, 1:], beta=beta).item()


def train(task: dict[str, Any]) -> None:
    """On-policy training; a line a step, and students in ``folder``."""
    trainer = build_trainer(task, beta=task["beta"], steps=task["steps"], callbacks=[Watch(task)])
    trainer.train()


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    write(task, versions | {"torch": torch.__version__})
    {"losses": losses, "train": train}[task["task"]](task)


if __name__ == "__main__":
    main()
