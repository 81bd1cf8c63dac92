"""Training with the stock Trainer and with the plain loop: curves, accumulation, interruption, telemetry."""

import argparse
import copy
import math

import datasets
import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer, TrainerCallback, TrainingArguments

import keeprate as kr
from keeprate import load
from keeprate.sft import Collator, Watch

GROUPS = ("clean", "noisy")


@pytest.fixture
def data(llama, rows):
    rows = kr.sft.score(llama, rows).join(rows, "history")
    g = torch.Generator().manual_seed(
        0
    )  # a reference that is not the model itself: an excess of 0 is decided by rounding
    return [{**row, "reference": [x * float(torch.rand((), generator=g)) for x in row["history"]]} for row in rows]


def trainer(model, data, method, folder, *, size=4, accumulate=1, steps=8, watch=True, callbacks=(), **params):
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulate,
        "max_steps": steps,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": [],
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(str(folder), **{**settings, **params})
    watching = [Watch(method, groups=GROUPS)] if watch else []
    return Trainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(data),
        eval_dataset=datasets.Dataset.from_list(data[:5]),
        data_collator=Collator(pad=0),
        compute_loss_func=method,
        callbacks=[*watching, *callbacks],
    )


def curve(done: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in done.state.log_history if "loss" in entry]


def test_plain_weights_train_as_the_trainer_does_without_us(llama, data, tmp_path):
    ours = trainer(copy.deepcopy(llama), data, kr.sft.SFT(), tmp_path, accumulate=2)
    theirs = trainer(copy.deepcopy(llama), data, None, tmp_path, accumulate=2, watch=False)
    ours.train()
    theirs.train()
    assert np.allclose(curve(ours), curve(theirs), rtol=1e-5)
    assert np.allclose(curve(ours, "grad_norm"), curve(theirs, "grad_norm"), rtol=1e-4)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated", "ignore:`gradient_checkpointing` is deprecated")
def test_sfttrainer_of_trl_takes_the_losses(llama, data, tmp_path, logits):
    trl = pytest.importorskip("trl")
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": [],
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "gradient_checkpointing": False,
        "bf16": False,
        "max_length": None,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }

    def train(method):
        own = {} if method is None else {"compute_loss_func": method, "callbacks": [Watch(method, logits=logits)]}
        done = trl.SFTTrainer(
            copy.deepcopy(llama),
            trl.SFTConfig(str(tmp_path), loss_type="nll", **settings),
            train_dataset=datasets.Dataset.from_list(data),
            data_collator=Collator(pad=0),
            processing_class=load("llama-docs").processor,
            **own,
        )
        done.train()
        return done

    theirs, ours, some = (train(method) for method in (None, kr.sft.SFT(), kr.sft.Rho1(keep=0.5)))
    assert np.allclose(curve(ours), curve(theirs), rtol=1e-5)
    assert np.allclose(curve(ours, "grad_norm"), curve(theirs, "grad_norm"), rtol=1e-4)
    assert not np.allclose(curve(some), curve(ours), rtol=1e-2)
    assert all(0.4 < share <= 0.5 for share in curve(some, "kept"))


@pytest.mark.parametrize(
    "method",
    [
        kr.sft.Rho1(scope="sequence", denominator="kept"),
        kr.sft.PRIOR(denominator="weight_sum"),
        kr.sft.DFT(),
        kr.sft.SsToken(),
    ],
    ids=lambda method: method.name,
)
def test_the_trainers_accumulation_equals_one_large_batch(llama, data, tmp_path, method):
    whole = trainer(copy.deepcopy(llama), data, method, tmp_path, size=8, steps=5)
    parts = trainer(copy.deepcopy(llama), data, method, tmp_path, size=2, accumulate=4, steps=5)
    whole.train()
    parts.train()
    assert np.allclose(curve(whole), curve(parts), rtol=1e-4)
    assert np.allclose(curve(whole, "grad_norm"), curve(parts, "grad_norm"), rtol=1e-3)


def test_without_a_session_a_shared_denominator_is_estimated(llama, data, tmp_path):
    """One micro-batch: the same. Several: close, and no more; this is what `Watch` is for."""
    method = kr.sft.Rho1(scope="sequence")
    runs = [trainer(copy.deepcopy(llama), data, method, tmp_path, watch=x, steps=4) for x in (True, False)]
    for run in runs:
        run.train()
    assert np.allclose(curve(runs[0]), curve(runs[1]), rtol=1e-4)
    runs = [
        trainer(copy.deepcopy(llama), data, method, tmp_path, watch=x, accumulate=3, steps=1) for x in (True, False)
    ]
    for run in runs:
        run.train()
    assert curve(runs[0])[0] == pytest.approx(curve(runs[1])[0], rel=0.1)


class Stop(TrainerCallback):
    """An interruption."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
        return control


@pytest.mark.parametrize("method", [kr.sft.RandomMask(keep=0.5), kr.sft.SsToken()], ids=lambda method: method.name)
def test_an_interrupted_training_resumes_with_the_same_curve(llama, data, tmp_path, method):
    """Into the third epoch, cut in the middle of the second."""
    options = {"save_strategy": "steps", "save_steps": 3, "steps": 15}
    whole = trainer(copy.deepcopy(llama), data, method, tmp_path / "whole", **options)
    whole.train()
    assert whole.state.epoch > 2
    first = trainer(copy.deepcopy(llama), data, method, tmp_path / "cut", callbacks=[Stop(9)], **options)
    first.train()
    second = trainer(copy.deepcopy(llama), data, method, tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=True)
    for name in ("loss", "kept", "gradient/noisy"):
        assert np.allclose(curve(second, name), curve(whole, name), rtol=1e-5), name
    assert len(curve(second)) == 15 and curve(whole)[9:] != curve(whole)[:6]


def test_random_masks_change_from_epoch_to_epoch(llama, data, tmp_path):
    method = kr.sft.RandomMask(keep=0.5)
    done = trainer(llama, data, method, tmp_path, size=24, steps=3)
    done.args.learning_rate = 0.0
    done.train()
    losses = curve(done)
    assert len({round(x, 4) for x in losses}) == 3, "the model stands still: only the draw can change the loss"


def test_the_log_holds_the_statistics(llama, data, tmp_path):
    method = kr.sft.Rho1(keep=0.5, scope="sequence")
    done = trainer(llama, data, method, tmp_path, accumulate=2, steps=4, logging_steps=2)
    done.train()
    entries = [entry for entry in done.state.log_history if "loss" in entry]
    assert len(entries) == 2
    targets = [sum(i != -100 for i in row["labels"]) for row in data]
    share = sum(max(1, n // 2) for n in targets) / sum(targets)
    for entry in entries:
        assert entry["kept"] == pytest.approx(share, abs=0.03)
        n = sum(targets) / len(targets) * 16  # sequences between entries
        assert entry["weight_entropy"] == pytest.approx(math.log(entry["kept"] * n) / math.log(n), abs=0.02)
        assert entry["gradient/clean"] + entry["gradient/noisy"] == pytest.approx(1)
        assert 0 < entry["gradient/clean"] < 1
    assert not any("kept" in entry for entry in done.state.log_history if "loss" not in entry)


def test_gradient_shares_are_those_of_the_logits(llama, data):
    """Share of each group in the l1 norm of the gradient at the logits, taken from autograd."""
    for method in (kr.sft.Focal(), kr.sft.DFT(), kr.sft.PRIOR()):
        made = Collator(pad=0)(data[:6])
        labels = made.pop("labels")
        with method(llama, groups=GROUPS) as trace:
            method(llama(**made), labels)
            found = trace.log()
            assert trace.log() == {}
        logits = llama(**made).logits.detach().requires_grad_()
        (grad,) = torch.autograd.grad(method(logits, labels), logits)
        force = torch.nn.functional.pad(grad.abs().sum(-1), (1, 0))[:, :-1]  # at the place of the target
        noisy = float(force[labels.columns["group"] == 1].sum() / force.sum())
        assert found["gradient/noisy"] == pytest.approx(noisy, rel=1e-4), method


def test_groups_must_have_names(llama, data):
    made = Collator(pad=0)(data[:3])
    labels = made.pop("labels")
    method = kr.sft.SFT()
    with method(llama) as trace:
        method(llama(**made), labels)
        assert {"gradient/0", "gradient/1"} <= set(trace.log())
        more = [{**row, "group": [3] * len(row["group"])} for row in data[:3]]
        for rows in (data[:3], more):  # a group that the first batches did not have
            made = Collator(pad=0)(rows)
            own = made.pop("labels")
            method(llama(**made), own)
        found = trace.log()
        assert [name for name in found if "/" in name] == [f"{x}/{i}" for x in ("gradient", "weight") for i in range(4)]
        assert found["weight/2"] == 0 and found["weight/3"] == 1 and 0 < found["gradient/3"] < 1
        made = Collator(pad=0)(data[:3])
        labels = made.pop("labels")
    with (
        method(llama, groups=("only",)),
        pytest.raises(ValueError, match="group must number the 1 groups only; got 0 to 1"),
    ):
        method(llama(**made), labels)


def test_evaluation_is_the_plain_loss_with_all_logits(llama, data, tmp_path):
    seen = []

    def measure(prediction):
        seen.append(prediction.predictions.shape)
        return {"rows": float(len(prediction.label_ids))}

    done = trainer(llama, data, kr.sft.Rho1(keep=0.3), tmp_path, steps=2)
    done.compute_metrics = measure
    done.train()
    found = done.evaluate()
    with torch.no_grad():
        made = Collator(pad=0)(data[:5])
        plain = llama(**{**made, "labels": made["labels"].as_subclass(torch.Tensor)}).loss
    assert found["eval_loss"] == pytest.approx(float(plain), rel=1e-5) and found["eval_rows"] == 5
    assert seen[0][-1] == 40 and seen[0][1] == made["input_ids"].shape[1]
    bare = done.evaluate(datasets.Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in data[:5]]))
    assert bare["eval_loss"] == pytest.approx(float(plain), rel=1e-5), "the method's columns are not needed"


def test_an_evaluation_looks_for_nothing_but_the_loss(llama, data, monkeypatch):
    made = Collator(pad=0)(data[:5])
    labels = made.pop("labels")
    monkeypatch.setattr(torch.Tensor, "topk", None)
    with torch.no_grad():
        plain = kr.sft.SFT()(llama(**made), labels)
        assert torch.equal(kr.sft.EntropyWeight()(llama(**made), labels), plain)


def test_a_trainer_that_reads_all_logits_gets_them(llama, data, tmp_path):
    """As TRL's does, for its metrics; the loss is the same."""

    class Reading(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            labels = inputs["labels"]
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            self.shapes = outputs.logits.shape[:2], labels[..., 1:].shape
            return (loss, outputs) if return_outputs else loss

    method, runs = kr.sft.Rho1(scope="sequence"), []
    for logits in (True, False):
        done = trainer(copy.deepcopy(llama), data, method, tmp_path, steps=3, watch=False)
        done.add_callback(Watch(method, logits=logits))
        done.__class__ = Reading
        done.train()
        runs.append(done)
    assert runs[0].shapes[0][1] == runs[0].shapes[1][1] + 1 and runs[1].shapes[0][1] == 1
    assert np.allclose(curve(runs[0]), curve(runs[1]), rtol=1e-5)


def test_a_training_that_failed_leaves_no_trace_on_the_next(llama, data, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("out of memory")

    method = kr.sft.SsToken()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(llama, data, method, tmp_path, callbacks=[Fail()]).train()
    trainer(llama, data, method, tmp_path, steps=2).train()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    with pytest.raises(ValueError, match=r"Watch takes a method of kr.sft; got str"):
        Watch("SFT")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0.*got 0.1"),
        ({"n_gpu": 2}, "n_gpu must be at most 1.*got 2"),
        ({"world_size": 2, "average_tokens_across_devices": False}, "average_tokens_across_devices must be True"),
        ({"world_size": 2, "ddp_static_graph": True}, "ddp_static_graph must be False"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(llama, data, tmp_path, options, told):
    done = trainer(llama, data, kr.sft.SFT(), tmp_path, steps=1)
    seen = {"label_smoothing_factor": 0.0, "n_gpu": 1, "world_size": 1, "average_tokens_across_devices": True}
    watch = next(c for c in done.callback_handler.callbacks if isinstance(c, Watch))
    with pytest.raises(ValueError, match=told):
        watch.on_train_begin(argparse.Namespace(**seen | options), done.state, done.control, model=llama)
    assert watch.trace is None and not llama._forward_hooks
    if "label_smoothing_factor" in options:
        with pytest.raises(ValueError, match=told):
            trainer(llama, data, kr.sft.SFT(), tmp_path, steps=1, **options).train()


def test_a_loader_that_would_lose_the_columns_is_refused(llama, data, tmp_path):
    """It cuts batches up and puts them together again, as plain tensors: weights would have no effect."""
    weighted = [{**row, "weights": [float(i % 2) for i in range(len(row["labels"]))]} for row in data]
    settings = {"steps": 1, "accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError, match="dispatch_batches must be False"):
        trainer(llama, weighted, kr.sft.SFT(), tmp_path, **settings).train()
    settings["accelerator_config"] = {"dispatch_batches": False}
    trainer(llama, weighted, kr.sft.SFT(), tmp_path, **settings).train()


def test_a_watch_alone_is_no_training_with_the_method(llama, data, tmp_path):
    done = trainer(llama, data, kr.sft.Rho1(), tmp_path, steps=1)

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]]))  # a loss of one's own beside it

    done.add_callback(Look())
    done.train()
    done.compute_loss_func = None
    with pytest.raises(ValueError, match=r"the model computed its own loss.*compute_loss_func"):
        done.train()


def test_a_router_s_loss_is_not_left_out_in_silence(llama, data):
    made = Collator(pad=0)(data[:2])
    labels, method = made.pop("labels"), kr.sft.SFT()
    outputs = llama(**made)
    outputs["aux_loss"] = outputs.logits.sum()
    with pytest.raises(ValueError, match=r"outputs hold an aux_loss.*output_router_logits=False"):
        method(outputs, labels)
    with method(llama), pytest.raises(ValueError, match="outputs hold an aux_loss"):
        outputs = llama(**made)
        outputs["aux_loss"] = outputs.logits.sum()
        method(outputs, labels)
    with torch.no_grad():
        outputs = llama(**made)
        outputs["aux_loss"] = outputs.logits.sum()
        assert torch.isfinite(method(outputs, labels)), "an evaluation is the plain loss anyway"


def test_passes_are_counted_where_nobody_knows_their_length(llama, data, tmp_path):
    """A data set without a length: the Trainer's own epoch is a fraction of something else."""
    seen = []

    class See(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(watch.trace.epoch)

    method = kr.sft.RandomMask()
    loading = {"dispatch_batches": False}
    done = trainer(llama, data, method, tmp_path, steps=7, callbacks=[See()], accelerator_config=loading)
    done.train_dataset = datasets.Dataset.from_list(data[:8]).to_iterable_dataset()
    watch = next(c for c in done.callback_handler.callbacks if isinstance(c, Watch))
    done.train()
    assert seen == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("denominator", ["valid", "kept", "weight_sum"])
def test_a_loss_may_be_scaled_where_it_lies(llama, data, denominator):
    """The Trainer multiplies what it was given by the number of processes, in place."""
    method = kr.sft.Rho1(scope="sequence", denominator=denominator)
    parts = (data[:1], data[1:4], data[4:6])
    items = torch.tensor(sum(len(row["labels"]) - 3 for part in parts for row in part))

    def total(parts, scale):
        llama.zero_grad()
        with method(llama):
            found = 0.0
            for part in parts:
                made = Collator(pad=0)(part)
                labels = made.pop("labels")
                loss = method(llama(**made), labels, items)
                loss *= scale
                loss.backward()
                found += float(loss.detach()) / scale
        return found

    whole = total([data[:6]], 1)
    assert total(parts, 1) == pytest.approx(whole, rel=1e-5)
    assert total(parts, 4) == pytest.approx(whole, rel=1e-5)


def test_gradients_that_are_out_of_reach_are_missed(llama, data):
    """As under DeepSpeed, or where `backward` is called once for the sum of the losses."""
    method = kr.sft.Rho1(scope="sequence")
    batches = [Collator(pad=0)(part) for part in (data[:2], data[2:5])]
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    with method(llama):
        for batch, allowed in zip(batches, (True, False), strict=True):
            labels = batch.pop("labels")
            outputs = llama(**batch)
            if allowed:
                method(outputs, labels, items)
            else:
                with pytest.raises(ValueError, match="call backward after every micro-batch"):
                    method(outputs, labels, items)


def test_a_session_that_cannot_begin_leaves_the_model_alone():
    """Gemma 2 is no decoder whose attention can be read; after the error it must still give all logits."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=40, **sizes, **heads)).train()
    method, ids = kr.sft.SsToken(), torch.arange(6)[None]
    for attempt in (
        lambda: method(model).__enter__(),
        lambda: kr.sft.weigh(method, model, {"input_ids": ids}),
    ):
        with pytest.raises(ValueError, match="Gemma2ForCausalLM must hold exactly one decoder"):
            attempt()
        assert model.training and model(ids).logits.shape[1] == 6


def test_columns_that_the_trainer_removed_are_missed(llama, data, tmp_path):
    method = kr.sft.Rho1()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    cut = Trainer(
        llama,
        arguments,
        train_dataset=datasets.Dataset.from_list(data),
        data_collator=Collator(pad=0),
        compute_loss_func=method,
    )
    with pytest.raises(ValueError, match="unknown column 'reference'"):
        cut.train()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_plain_loop_follows_the_trainer(llama, data, tmp_path, accumulate):
    """Step by step, on batches in the same order."""
    method = kr.sft.Rho1(keep=0.5, scope="sequence")
    one, two = copy.deepcopy(llama), copy.deepcopy(llama)
    found = kr.sft.train(
        one, data, method, steps=8, batch_size=4, accumulate=accumulate, lr=3e-3, warmup=0.25, seed=1, every=1
    )
    order = kr.sft.train.__globals__["_order"](len(data), 4, 1)
    sequence = [data[i] for _ in range(8 * accumulate) for i in next(order)[1]]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    prepared = trainer(two, sequence, method, tmp_path, accumulate=accumulate, warmup_steps=2)
    prepared.__class__ = InOrder
    prepared.train()
    assert np.allclose(found["loss"], curve(prepared), rtol=1e-4)
    assert np.allclose(found["kept"], curve(prepared, "kept"))
    assert found["step"].tolist() == list(range(1, 9))


def test_the_plain_loop_learns_repeats_and_restores(llama, data):
    one, two = copy.deepcopy(llama), copy.deepcopy(llama)

    def evaluate(model):
        assert not model.training
        ids = torch.tensor([data[0]["input_ids"]])
        assert model(ids).logits.shape[1] == ids.shape[1], "all logits, whether or not it says torch.no_grad()"
        return {"held out": float(np.mean([x.sum() for x in kr.sft.score(model, data[:4]).nll]))}

    options = {"steps": 30, "batch_size": 8, "lr": 1e-2, "evaluate": evaluate, "every": 10, "groups": GROUPS}
    found = kr.sft.train(one, data, kr.sft.SFT(), **options)
    assert found["step"].tolist() == [0, 10, 20, 30] and math.isnan(found["loss"][0])
    assert found["held out"].iloc[-1] < 0.7 * found["held out"].iloc[0]
    assert not one.training
    again = kr.sft.train(two, datasets.Dataset.from_list(data), kr.sft.SFT(), **options)
    assert found.equals(again), "the same seed gives the same curve, whatever holds the data"
    other = kr.sft.train(copy.deepcopy(llama), data, kr.sft.SFT(), **{**options, "seed": 1})
    assert not found["loss"].equals(other["loss"])
    for bad, told in (({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"accumulate": 0}, "accumulate")):
        with pytest.raises(ValueError, match=told):
            kr.sft.train(llama, data, kr.sft.SFT(), **{"steps": 1, **bad})
    with pytest.raises(ValueError, match="at least one row"):
        kr.sft.train(llama, [], kr.sft.SFT(), steps=1)


def test_two_models_of_one_method_are_not_mixed_up(llama, data):
    method, other = kr.sft.DFT(), copy.deepcopy(llama)
    made = Collator(pad=0)(data[:2])
    labels = made.pop("labels")
    with method(llama), method(other):
        alone = method(llama(**made), labels)
        assert torch.equal(alone, method(other(**made), labels))
        outputs = llama(**made)
        other(**made)
        with pytest.raises(ValueError, match="2 models are trained with DFT"):
            method(outputs, labels)


def test_a_model_that_changes_its_logits_is_found_out(llama, data):
    made = Collator(pad=0)(data[:2])
    labels = made.pop("labels")
    method = kr.sft.SFT()
    llama.register_forward_hook(lambda module, args, outputs: setattr(outputs, "logits", 0.5 * outputs.logits))
    with (
        method(llama),
        pytest.raises(ValueError, match=r"changes its logits after the head; use method\(model, logits=True\)"),
    ):
        method(llama(**made), labels)
    with method(llama, logits=True):
        assert torch.isfinite(method(llama(**made), labels))


def test_under_autocast_the_loss_is_that_of_the_model(llama, data):
    made = Collator(pad=0)(data[:4])
    labels = made.pop("labels")
    method = kr.sft.SFT()
    with torch.autocast("cpu", torch.bfloat16):
        plain = llama(**made, labels=labels.as_subclass(torch.Tensor)).loss
        with method(llama):
            outputs = llama(**made)
            inside = method(outputs, labels)
    assert float(inside.detach()) == pytest.approx(float(plain.detach()), rel=1e-3)


def test_the_trainer_trains_on_packed_rows(llama, data, tmp_path):
    """Eight sequences in three or four rows: the same loss as in eight."""
    method, runs = kr.sft.SsToken(), []
    for pack in (None, 40):
        done = trainer(copy.deepcopy(llama), data, method, tmp_path, size=8, steps=4)
        done.data_collator = Collator(pad=0, pack=pack)
        done.train()
        runs.append(done)
    for name in ("loss", "kept", "grad_norm"):
        assert np.allclose(curve(runs[0], name), curve(runs[1], name), rtol=1e-4), name


@pytest.mark.parametrize("method", [kr.sft.SsToken(), kr.sft.Focal()], ids=lambda method: method.name)
def test_gradient_checkpointing_changes_nothing(llama, data, method):
    made = Collator(pad=0)(data[:4])
    labels, found = made.pop("labels"), []
    llama.train()
    for checkpointed in (False, True):
        if checkpointed:
            getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)()  # before 5.23
        llama.zero_grad()
        with method(llama):
            loss = method(llama(**made, use_cache=False), labels)
            loss.backward()
        found.append((float(loss.detach()), [p.grad.clone() for p in llama.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1], strict=True))
