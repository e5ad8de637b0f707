"""The training loop: mixed precision, average of the weights, logs, and a state on disk to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from ..models.checkpoint import save_weights
from .checkpoint import load_state, random_state, restore_random_state, save_state
from .data import StepSampler, step_loader
from .distributed import Ranks, StopSignals
from .logging import Progress, RunLog
from .optim import average_into, cosine_with_warmup, ema_decay, parameter_groups
from .settings import Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAST, RESULT = "last.pt", "weights.pt"


class Trainer:
    """Trains `model` with AdamW as `settings` say.

    N steps, a stop, and N more with `resume` give the bits of 2N steps (where the arithmetic itself repeats: on the CPU
    with a fixed number of threads). SIGTERM and Ctrl-C write the state between two steps and end the run.

    Args:
        model: its initial weights must be the same on all ranks; it is moved to the ranks' device.
        loss_of: (model, batch) -> the mean loss of the batch, a scalar; called under autocast.
        settings: of the run.
        ranks: of this process.
        identity: what else the run's numbers depend on, such as the model's name; compared where a run goes on.

    Raises:
        CheckpointError: with `resume`, last.pt is damaged or of another kind.
        FileNotFoundError, FileExistsError: there is no last.pt with `resume`, or one without it.
        ValueError: last.pt is of a run with other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[nn.Module, Any], Tensor],
        settings: Settings,
        ranks: Ranks,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.ranks, self.loss_of = settings, ranks, loss_of
        self.identity = {**settings.identity, **(identity or {})}
        self.step = 0
        self._loss_sum, self._loss_steps = torch.zeros((), device=ranks.device), 0
        layout = torch.channels_last if settings.channels_last else torch.preserve_format
        self.model = model.to(ranks.device).to(memory_format=layout)
        groups = parameter_groups(self.model, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine_with_warmup(step, settings.steps, settings.warmup)
        )
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.amp == "fp16")
        self.average: AveragedModel | None = None
        if settings.ema > 0:
            self.average = AveragedModel(
                self.model,
                multi_avg_fn=lambda averages, values, _: average_into(
                    averages, values, ema_decay(self.step, settings.ema)
                ),
                use_buffers=True,
            )
        torch.manual_seed(settings.seed + ranks.rank)  # the ranks drop and mix differently
        self._resume()
        self.parallel = ranks.wrap(self.model)

    @property
    def result(self) -> nn.Module:
        """The model to evaluate: with the averaged weights, where there is an average."""
        return self.model if self.average is None else self.average.module

    def fit(self, data: Dataset[Any], evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None) -> bool:
        """Runs to the last step, or to a stop; True if the run is complete, its result then in weights.pt.

        Args:
            data: of examples that torch's default collation makes batches of; see `Seeded` for its random changes.
            evaluate: gives the figures for eval.csv; called on every rank, with `result` in eval mode, without grad.

        Raises: FloatingPointError: the loss is not finite; the last state on disk is older.
        """
        settings, ranks = self.settings, self.ranks
        last = min(settings.steps, self.step + settings.stop_after) if settings.stop_after else settings.steps
        sampler = StepSampler(len(data), settings.batch, settings.seed, ranks, self.step, last)  # type: ignore[arg-type]
        batches = step_loader(data, sampler, settings.workers, ranks.device)
        log = RunLog(settings.out if ranks.main else None, self.step)
        bar = Progress(settings.steps, self.step, ranks.main, settings.log_every)
        try:
            with StopSignals() as signals:
                self._train(batches, last, evaluate, signals, log, bar)
                self._save()
        finally:
            bar.close()
            log.close()
        complete = self.step == settings.steps
        if complete and ranks.main:
            save_weights(self.result, settings.out / RESULT)
        return complete

    def _train(
        self,
        batches: Iterable[Any],
        last: int,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
        signals: StopSignals,
        log: RunLog,
        bar: Progress,
    ) -> None:
        """All batches, or those up to a signal; the caller writes the last state."""
        settings, started = self.settings, time.perf_counter()
        for batch in batches:
            self._train_step(batch)
            bar.advance()
            if self.step == settings.steps or _due(self.step, settings.log_every):
                self._log(log, bar, started)
                started = time.perf_counter()
            if evaluate and (self.step == settings.steps or _due(self.step, settings.eval_every)):
                self._evaluate(evaluate, log, bar)
            if self._hears(signals):
                bar.say(f"stopped by {signals.received or 'a signal to another rank'} after step {self.step}")
                break
            if _due(self.step, settings.save_every) and self.step < last:
                self._save()

    def _hears(self, signals: StopSignals) -> bool:
        """Whether some rank was told to stop. GPUs, for which asking means to wait, ask at every row of the log."""
        ranks = self.ranks
        asks = ranks.world == 1 or ranks.device.type == "cpu" or self.step % self.settings.log_every == 0
        return asks and ranks.any(signals.received is not None)

    def _train_step(self, batch: Any) -> None:
        batch = self._to_device(batch)
        self.parallel.train()
        device, dtype = self.ranks.device.type, DTYPES.get(self.settings.amp)
        try:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = self.loss_of(self.parallel, batch)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            error.add_note(f"rank {self.ranks.rank} of {self.ranks.world}, in step {self.step + 1}")
            raise
        if self.settings.clip > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self._loss_sum += loss.detach()
        self._loss_steps += 1

    def _to_device(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):
            layout = self.settings.channels_last and batch.dim() == 4 and batch.is_floating_point()
            return batch.to(
                self.ranks.device,
                non_blocking=True,
                memory_format=torch.channels_last if layout else torch.preserve_format,
            )
        if isinstance(batch, Mapping):
            return {key: self._to_device(value) for key, value in batch.items()}
        return [self._to_device(value) for value in batch] if isinstance(batch, (list, tuple)) else batch

    def _log(self, log: RunLog, bar: Progress, started: float) -> None:
        """The mean loss since the last row, over all ranks."""
        mean = float(self.ranks.sum(self._loss_sum)) / (self._loss_steps * self.ranks.world)
        images = self._loss_steps * self.settings.batch
        self._check_finite(mean)
        self._loss_sum, self._loss_steps = torch.zeros_like(self._loss_sum), 0
        lr = self.optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - started
        log.write("train", self.step, {"loss": mean, "next_lr": lr, "images_per_second": images / seconds})
        bar.note(loss=mean)

    def _evaluate(self, evaluate: Callable[[nn.Module], Mapping[str, float]], log: RunLog, bar: Progress) -> None:
        self.ranks.share_buffers(self.result)
        with torch.no_grad():
            figures = evaluate(self.result.eval())
        log.write("eval", self.step, figures)
        bar.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def _check_finite(self, loss: float) -> None:
        if not abs(loss) < float("inf"):
            raise FloatingPointError(f"Trainer: loss must be finite, got {loss} in step {self.step} or just before it")

    def _save(self) -> None:
        self._check_finite(float(self.ranks.sum(self._loss_sum)))
        for module in (self.model, self.average):
            if module is not None:
                self.ranks.share_buffers(module)
        random_states = self.ranks.gather(random_state(self.ranks.device))
        loss_sums = self.ranks.gather(float(self._loss_sum))
        if not self.ranks.main:
            return
        state = {
            "identity": self.identity,
            "step": self.step,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": [loss_sums, self._loss_steps],
            "random": random_states,
        }
        self.settings.out.mkdir(parents=True, exist_ok=True)
        save_state(state, self.settings.out / LAST)

    def _resume(self) -> None:
        path = self.settings.out / LAST
        # All look before the first rank can write.
        exists = all(self.ranks.gather(path.exists()))
        if not self.settings.resume:
            if exists:
                raise FileExistsError(f"Trainer: {path} is the state of a run: resume it, or take another folder")
            return
        if not exists:
            raise FileNotFoundError(f"Trainer: resume needs {path} on every rank, which does not exist")
        state = load_state(path)
        differs = [
            f"{key} was {state['identity'].get(key)!r} and is {value!r}"
            for key, value in self.identity.items()
            if state["identity"].get(key) != value
        ]
        if differs:
            raise ValueError(f"Trainer: settings must be those of {path}, got others: {'; '.join(differs)}")
        self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        (loss_sums, self._loss_steps), randoms, ranks = state["loss"], state["random"], self.ranks
        if len(randoms) == ranks.world:
            self._loss_sum.fill_(loss_sums[ranks.rank])
            restore_random_state(randoms[ranks.rank], ranks.device)
        else:
            # Other ranks draw other numbers (for dropout, for instance), whatever the states; the losses only add up.
            self._loss_sum.fill_(sum(loss_sums) / len(loss_sums))
            torch.manual_seed(self.settings.seed + self.step * ranks.world + ranks.rank)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
