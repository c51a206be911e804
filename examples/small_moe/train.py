"""Train the small MoE: tokenizer, model, checkpoint.

`python -m examples.small_moe.train --texts DIR --out DIR --seed 0 --steps 2500`

`--texts` is what `examples.small_moe.texts` wrote. The run is a function of the texts, the
seed and the number of steps (the learning rate follows steps, not the clock). `--resume` goes on
from the last saved state below `--out`.
"""

import argparse
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from examples.small_moe.families import (
    AUXILIARY_LOSS_COEFFICIENT,
    FAMILIES,
    VOCABULARY_SIZE,
    model_config,
    new_model,
)
from examples.small_moe.texts import read_jsonl
from examples.small_moe.token_streams import (
    END_OF_TEXT_ID,
    TokenStream,
    random_windows,
    spaced_windows,
    stream_of,
    token_stream,
    trained_tokenizer,
)
from examples.small_moe.training_experts import keep_freed_memory

_LOG = logging.getLogger(__name__)

PEAK_LEARNING_RATE = 4e-3
FINAL_LEARNING_RATE_FRACTION = 0.05
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.05
BATCH_WINDOWS = 32
TOKENIZER_SAMPLE = 3000
VALIDATION_WINDOWS = 256
STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class TrainingPlan:
    """What decides a run, and how often it reports (`report_every`, `save_every` in steps)."""

    seed: int
    steps: int
    out: Path
    device: str
    report_every: int = 25
    save_every: int = 250
    batch_windows: int = BATCH_WINDOWS
    family: str = "olmoe"


def learning_rate(step: int, steps: int) -> float:
    """Rise linearly, then follow a cosine down to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    floor = FINAL_LEARNING_RATE_FRACTION
    return PEAK_LEARNING_RATE * warmup * (floor + (1 - floor) * cosine)


def new_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """Return AdamW whose weight decay spares the norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))


def mean_nll(model: PreTrainedModel, windows: Tensor, batch_windows: int = 16) -> float:
    """Return the mean negative log likelihood, in nats, of the tokens after each window's first.

    `windows` is int64 [windows, tokens]. The model is left in evaluation mode.
    """
    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in torch.split(windows.to(model.device), batch_windows):
            total += float(_next_token_nll(model(input_ids=batch).logits, batch)) * len(batch)
    return total / len(windows)


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, batch: Tensor, rate: float
) -> float:
    """Update once on int64 [windows, tokens]; return the NLL in nats, without router loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(batch.device.type, torch.bfloat16):
        output = model(input_ids=batch, output_router_logits=True)
    nll = _next_token_nll(output.logits, batch)
    (nll + AUXILIARY_LOSS_COEFFICIENT * output.aux_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return nll.item()


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a bfloat16 checkpoint that the Auto classes load offline."""
    copy = type(model)(model_config(model.config.model_type))
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID
    )
    copy.to(torch.bfloat16).save_pretrained(out)
    _write_out_tied_weights(out / "model.safetensors")
    tokenizer.save_pretrained(out)


def _write_out_tied_weights(checkpoint: Path) -> None:
    """Adds `lm_head.weight`: vLLM's OLMoE does not tie it, and gives nonsense without a word where it is missing."""
    with safe_open(checkpoint, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(checkpoint)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, checkpoint, metadata)


def train(
    plan: TrainingPlan,
    streams: dict[str, TokenStream],
    tokenizer: PreTrainedTokenizerFast,
    resume: bool = False,
) -> PreTrainedModel:
    """Train on `streams["train"]`, validate on `streams["dev"]`, save below `plan.out`."""
    model = new_model(plan.seed, plan.family).to(plan.device)
    optimizer = new_optimizer(model)
    first_step = _restored(model, optimizer, plan) if resume else 0
    validation = spaced_windows(streams["dev"], VALIDATION_WINDOWS)
    progress = _Progress(plan, first_step)
    for step in range(first_step, plan.steps):
        model.train()
        batch = random_windows(streams["train"], plan.batch_windows, plan.seed, step)
        rate = learning_rate(step, plan.steps)
        progress.record(step, train_step(model, optimizer, batch.to(plan.device), rate), batch)
        done = step + 1
        if done % plan.save_every == 0 or done == plan.steps:
            _LOG.info("step %d validation NLL %.4f", done, mean_nll(model, validation))
            _save_state(model, optimizer, done, plan)
            save_checkpoint(model, tokenizer, plan.out)
    return model


class _Progress:
    """Logs an exponential mean of the NLL and the speed; no influence on the run."""

    def __init__(self, plan: TrainingPlan, first_step: int) -> None:
        self._plan = plan
        self._first_step = first_step
        self._started = time.monotonic()
        self._tokens = 0
        self._mean: float | None = None

    def record(self, step: int, nll: float, batch: Tensor) -> None:
        self._tokens += batch.numel()
        self._mean = nll if self._mean is None else 0.97 * self._mean + 0.03 * nll
        if (step + 1) % self._plan.report_every == 0:
            elapsed_s = time.monotonic() - self._started
            speed = self._tokens / elapsed_s
            _LOG.info(
                "step %d %.0f s NLL %.3f %.0f tokens/s", step + 1, elapsed_s, self._mean, speed
            )


def prepared_streams(
    texts: Path, tokenizer_sample: int = TOKENIZER_SAMPLE
) -> tuple[dict[str, TokenStream], PreTrainedTokenizerFast]:
    """Train the tokenizer on a fixed sample of the training text; return streams and it."""
    training = [document.text for document in read_jsonl(texts / "general_train.jsonl")]
    rng = random.Random(0)
    sample = rng.sample(training, min(tokenizer_sample, len(training)))
    tokenizer = trained_tokenizer(sample, VOCABULARY_SIZE)
    streams = {
        "train": token_stream(training, tokenizer),
        "dev": stream_of(texts / "general_dev.jsonl", tokenizer),
    }
    return streams, tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Read the texts, train, and leave the checkpoint below `--out`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.resume and not (options.out / STATE_FILE).is_file():
        parser.error(f"--resume: {options.out / STATE_FILE} is not there; leave it out to begin")
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    options.out.mkdir(parents=True, exist_ok=True)
    streams, tokenizer = prepared_streams(options.texts)
    _LOG.info("training stream: %d tokens", len(streams["train"]))
    plan = TrainingPlan(
        options.seed, options.steps, options.out, _device(options.device), family=options.family
    )
    train(plan, streams, tokenizer, options.resume)


def _next_token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean NLL in nats of [windows, tokens, vocabulary] logits against the tokens that follow."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
    )


def _save_state(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, step: int, plan: TrainingPlan
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    partial = plan.out / f"{STATE_FILE}.partial"
    torch.save(state, partial)
    partial.rename(plan.out / STATE_FILE)


def _restored(model: PreTrainedModel, optimizer: torch.optim.AdamW, plan: TrainingPlan) -> int:
    """Load the last saved state and return the number of steps it has behind it."""
    state: dict[str, Any] = torch.load(
        plan.out / STATE_FILE, map_location=plan.device, weights_only=True
    )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _device(choice: str) -> str:
    if choice != "auto":
        return choice
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the small Mixture-of-Experts model.")
    parser.add_argument("--texts", type=Path, required=True, help="directory with the splits")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--family", choices=FAMILIES, default="olmoe", help="the architecture")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and batches")
    parser.add_argument("--steps", type=int, default=2500, help="steps of 32 windows of 128 tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for the default")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    return parser


if __name__ == "__main__":
    main()
