"""--log-to: show what a run writes to log.jsonl in TensorBoard or Weights & Biases as well, live.

    log = also_to("tensorboard", log, "runs/ab", options, done=0)      tensorboard --logdir runs
    log("step", 1, loss=0.7)                                           log.jsonl, and step/loss there

Each through its own library, imported here and nowhere else; config.py has already refused a library that is
not installed. A resumed run goes on in TensorBoard (what came after the checkpoint is hidden); in Weights &
Biases it is a new run of the same name. What it does not do: replace log.jsonl, which alone is read back.
"""

from collections.abc import Callable

from minarena.runtime.console import first_line


def also_to(library: str, log: Callable, out: str, options: dict, done: int) -> Callable:
    """`log`, which also sends its numbers to the library; ValueError where the library refuses."""
    try:
        send = {"tensorboard": to_tensorboard, "wandb": to_wandb}[library](out, options, done)
    except Exception as error:  # theirs: no login, no network, another version
        raise ValueError(f"--log-to {library}: {first_line(error)}") from error

    def both(event: str, step: int, **values) -> None:
        log(event, step, **values)
        send(numbers(event, values), step)

    return both


def to_tensorboard(out: str, options: dict, done: int) -> Callable:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out, purge_step=done + 1 if done else None)
    writer.add_text("options", "  \n".join(f"{name}: {value}" for name, value in options.items()))

    def send(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a run that dies has then shown its last step

    return send


def to_wandb(out: str, options: dict, done: int) -> Callable:
    import wandb

    begun = wandb.init(project="minarena", name=out, dir=out, config=options)
    return lambda figures, step: begun.log(figures, step=step)


def numbers(name: str, value) -> dict[str, float]:
    """A nested event as {"eval/ab/accuracy": 0.8, ...}, without values that are None."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in numbers(f"{name}/{key}", inner).items()}
    return {} if value is None else {name: value}
