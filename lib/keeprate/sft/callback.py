"""What the Trainer needs to know of a method beyond its loss."""

from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from transformers import TrainerCallback

from keeprate.sft.base import SFTMethod
from keeprate.sft.session import Session, on_model


class Watch(TrainerCallback):
    """Opens `method(model)` for the length of a training and adds its statistics to the Trainer's log.

    They stand in `trainer.state.log_history` beside the loss, and in every reporter that comes after this callback.
    Reporters chosen by `report_to` come before it: to have the statistics there, pass theirs as a later callback.

    A training that ends in an exception leaves `method(model)` open until the model is trained again: until then the
    model gives the logits of the first position alone where gradients are on.

    Args:
        method: The one given as `compute_loss_func`, or one equal to it.
        groups: Names of the token groups that a column `group` numbers from 0.
        logits: See `Session`. For a Trainer that takes metrics of its own from all logits of the training pass.

    Attributes:
        trace: The open `Session`; None outside of training.

    Raises:
        ValueError: When the training begins, on a setting of the Trainer that this loss would ignore or get wrong;
            after the first step, if the Trainer does not use the loss.

    Example:
        >>> Trainer(model, args, train_dataset=data, data_collator=kr.sft.Collator(tokenizer),   # doctest: +SKIP
        ...         compute_loss_func=method, callbacks=[kr.sft.Watch(method)]).train()
    """

    def __init__(self, method: SFTMethod, groups: tuple[str, ...] = (), logits: bool = False):
        if not isinstance(method, SFTMethod):
            raise ValueError(f"Watch takes a method of kr.sft; got {type(method).__name__}")
        self.method, self.options = method, {"groups": tuple(groups), "logits": logits}
        self.trace: Session | None = None
        self.counting = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _check(args, self.options["logits"], kwargs.get("train_dataloader"))
        self.counting = False
        for left in on_model(model):  # a training that ended in an exception never said so
            left.__exit__(None, None, None)
        self.trace = Session(self.method, model, **self.options).__enter__()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trace is None:
            return
        # counted, for where a data set has no length the Trainer's epoch is no whole number between two passes
        self.trace.epoch = self.trace.epoch + 1 if self.counting else int((state.epoch or 0) + 1e-6)
        self.counting = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trace is not None and self.trace.bypassed and not self.trace.asked:
            raise ValueError(
                f"the model computed its own loss, not that of {self.method!r}: give the Trainer "
                "compute_loss_func=method as well"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.trace is None or "loss" not in (logs or {}):
            return
        found = self.trace.log()
        logs.update(found)
        if state.log_history:  # the Trainer has copied the log there already
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trace is not None:
            self.trace.__exit__(None, None, None)
            self.trace = None


def _check(args: Any, logits: bool, loader: Any) -> None:
    """Raise a ValueError on settings of `TrainingArguments` that a loss function of its own leaves without effect."""
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor must be 0: the Trainer ignores it beside compute_loss_func; "
            f"got {args.label_smoothing_factor:g}"
        )
    if isinstance(loader, DataLoaderDispatcher):
        raise ValueError(
            "dispatch_batches must be False, for it takes batches apart and loses the columns beside the labels: "
            "TrainingArguments(accelerator_config={'dispatch_batches': False}); got True, the default for a data set "
            "without a length"
        )
    if args.n_gpu > 1:
        raise ValueError(
            "n_gpu must be at most 1, for DataParallel hides the model's hidden states; use torchrun or "
            f"accelerate launch, or one visible GPU; got {args.n_gpu}"
        )
    if args.world_size > 1 and getattr(args, "ddp_static_graph", None) and not logits:
        raise ValueError(
            "ddp_static_graph must be False, for it averages gradients of the model's outputs alone, or all logits "
            "must be computed: Watch(method, logits=True); got True"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            f"average_tokens_across_devices must be True, for the {args.world_size} processes share one denominator; "
            "got False"
        )
