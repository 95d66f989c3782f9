"""How a run is kept: checkpoints that are whole or absent, that continue exactly or are refused, and the final folder."""

import json
import logging
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from mmalign.files import full_disk_explained, staged, write_json
from mmalign.likelihood.reference import Reference
from mmalign.training.align_config import AlignConfig
from mmalign.training.average import AVERAGE_FOLDER, MovingAverage
from mmalign.training.checkpoints import STAGING, check_facts, read_manifest, write_manifest
from mmalign.training.weights import adapter_config, has_adapter

logger = logging.getLogger("mmalign")
# Facts about the library that made an adapter, not about the run.
_VOLATILE = ("peft_version", "base_model_name_or_path", "revision", "inference_mode")


class RunData(Protocol):
    """Rows to train on: what they are called, a hash of all that they are, and a data set with "row" in every item.

    The data set's `buckets` are the shape of each row, or None where all have one.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def dataset(self) -> Any: ...


class SavingTrainer(Trainer):
    """`transformers.Trainer` with checkpoints staged, listed in a manifest and renamed; what they hold is the trained part only."""

    reference: Reference
    args: AlignConfig
    _train: RunData
    _run_dir: str | None = None
    _average: MovingAverage | None = None

    @property
    def network(self) -> nn.Module:
        """The bare network that is trained."""
        raise NotImplementedError

    def _write_weights(self, folder: Path) -> None:
        """Writes what training changed."""
        raise NotImplementedError

    def _read_weights(self, folder: Path) -> None:
        """Reads back what `_write_weights` wrote, exactly."""
        raise NotImplementedError

    def _write_card(self, folder: Path) -> None:
        """Writes README.md of a folder that holds a result."""
        raise NotImplementedError

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to continue a run."""
        adapted = has_adapter(self.network)
        adapter = {k: v for k, v in adapter_config(self.network).items() if k not in _VOLATILE} if adapted else None
        facts = {
            "method": self.args.method,
            "reference model": self._reference_fingerprint(),
            "data": self._train.fingerprint,
            "batch": self.args.rows_per_step,
            "peft_config": adapter,
            **self.args.identity(),
        }
        return cast(dict[str, Any], json.loads(json.dumps(facts)))

    def _reference_fingerprint(self) -> str:
        # A run without a reference still starts from a base, and a LoRA fits that base only.
        without = has_adapter(self.network) and self.reference.kind == "none"
        return (Reference("adapter", self.network) if without else self.reference).fingerprint()

    def averaged(self) -> AbstractContextManager:
        """The network with the weights that count: the moving average where one is kept."""
        return nullcontext() if self._average is None else self._average.in_place()

    def last_metrics(self) -> dict[str, float]:
        """The last logged training entry and the last evaluation."""
        history = self.state.log_history
        last: dict[str, float] = next((entry for entry in reversed(history) if "loss" in entry), {})
        return last | next((entry for entry in reversed(history) if "eval_loss" in entry), {})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or cast(str, self.args.output_dir))
        if not self.args.should_save:
            return
        if self._run_dir is not None:
            self._write(folder)
            if self._average is not None:
                with self.averaged():
                    self._write_weights(folder / AVERAGE_FOLDER)
            return
        with staged(folder) as part, self.averaged():
            self._write(part)
            self._write_card(part)
            write_json(part / "history.json", self.state.log_history)

    def _write(self, folder: Path) -> None:
        """Writes what a checkpoint needs and a result has: the trained weights, and what a method keeps beside them."""
        self._write_weights(folder)

    def card_settings(self) -> dict[str, Any]:
        """What of the method's settings the card tells."""
        return {}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: `README.md` is written together with the weights."""

    def write_history(self) -> None:
        """Writes every logged entry to `history.json` in the output folder."""
        write_json(Path(cast(str, self.args.output_dir)) / "history.json", self.state.log_history)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(cast(str, self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        staging = run / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        # super() rotates in the folder it writes to, which is not the one that older checkpoints lie in.
        self._run_dir, limit, self.args.save_total_limit = str(staging), self.args.save_total_limit, None
        try:
            with full_disk_explained(run):
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(run / name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / "trainer_state.json"))
                    write_manifest(staging / name, self.facts)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self._run_dir, self.args.save_total_limit = None, limit
        if self.args.should_save:
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(staging / name, run / name)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_facts(read_manifest(folder), self.facts, folder)
        if not (folder / "optimizer.pt").is_file():
            raise ValueError(
                f"{folder} was saved with save_only_model and cannot be continued: load its weights into a pipeline and start anew"
            )
        if self._average is not None:
            self._average.load(folder)
        self._read_weights(folder)

    def _load_best_model(self) -> None:
        best = Path(cast(str, self.state.best_model_checkpoint))
        read_manifest(best)
        if self._average is not None:
            self._average.load(best)
        else:
            self._read_weights(best)
        logger.info("best checkpoint: %s (%s = %g)", best, self.args.metric_for_best_model, self.state.best_metric or 0)
