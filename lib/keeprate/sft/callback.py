"""What the Trainer needs to know of a method beyond its loss."""

from typing import Any

from transformers import TrainerCallback

from keeprate.sft.base import SFTMethod
from keeprate.sft.session import Session, on_model


class Watch(TrainerCallback):
    """Opens `method(model)` for the length of a training and adds its statistics to the Trainer's log.

    They stand in `trainer.state.log_history` beside the loss, and in every reporter that comes after this callback.
    Reporters chosen by `report_to` come before it: to have the statistics there, pass theirs as a later callback.

    Args:
        method: The one given as `compute_loss_func`, or one equal to it.
        groups: Names of the token groups that a column `group` numbers from 0.
        logits: See `Session`. For a Trainer that takes metrics of its own from all logits of the training pass.

    Attributes:
        trace: The open `Session`; None outside of training.

    Example:
        >>> Trainer(model, args, train_dataset=data, data_collator=kr.sft.Collator(tokenizer),   # doctest: +SKIP
        ...         compute_loss_func=method, callbacks=[kr.sft.Watch(method)]).train()
    """

    def __init__(self, method: SFTMethod, groups: tuple[str, ...] = (), logits: bool = False):
        if not isinstance(method, SFTMethod):
            raise ValueError(f"Watch takes a method of kr.sft; got {type(method).__name__}")
        self.method, self.options = method, {"groups": tuple(groups), "logits": logits}
        self.trace: Session | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for left in on_model(model):  # a training that ended in an exception never said so
            left.__exit__(None, None, None)
        self.trace = Session(self.method, model, **self.options).__enter__()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trace is not None:
            self.trace.epoch = int((state.epoch or 0) + 1e-6)

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
