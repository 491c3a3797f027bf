"""The command line: train, preflight, doctor, generate, inspect, export, compare, push.

Every setting is a field of the config dataclasses; every error of ours is one sentence and exit code 2.
The notebooks use the functions behind this, not the command line.
"""

import argparse
import dataclasses
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from lora_nb import config, env, flags
from lora_nb.collector import without_collector
from lora_nb.errors import ConfigError, LoraNbError

HELP_WIDTH = 120


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=40, width=HELP_WIDTH)


class _Parser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args,
            allow_abbrev=False,
            formatter_class=_formatter,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]} (see {self.prog} --help).")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 well, 1 problems found, 2 wrong input, 130 and 143 stopped."""
    parser, commands = _parsers()
    plain, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        args, rest = parser.parse_known_args(argv)
        if rest:
            _refuse(rest, commands[args.command])
        return args.run(args)
    except LoraNbError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        warnings.formatwarning = plain


def _format_warning(message: Warning | str, *_: Any) -> str:
    return f"warning: {message}\n"


def _refuse(rest: list[str], parser: argparse.ArgumentParser) -> NoReturn:
    """Name the first argument that nobody took, and the flag it resembles most."""
    stray = next((word for word in rest if word.startswith("-")), rest[0]).split("=")[0]
    near = difflib.get_close_matches(stray, parser._option_string_actions, n=1)
    hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help."
    raise ConfigError(
        f"There is no {'flag' if stray.startswith('-') else 'argument'} {stray}; {hint}"
    )


def _parsers() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="lora-nb", description="Train LoRA adapters for image models, and look into them."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    train = commands.add_parser(
        "train", help="train an adapter", usage="lora-nb train [FLAGS]", description=_TRAIN
    )
    train.add_argument(
        "--log_every", type=int, default=10, metavar="N", help="steps between two lines [10]"
    )
    flags.add_flags(train)
    train.set_defaults(run=_train)

    preflight = commands.add_parser(
        "preflight",
        help="say what a training would cost",
        usage="lora-nb preflight [FLAGS OF TRAIN]",
        description=_PREFLIGHT,
    )
    flags.add_flags(preflight)
    preflight.set_defaults(run=_preflight)

    doctor = commands.add_parser(
        "doctor", help="look at this machine and at a folder of pictures", description=_DOCTOR
    )
    doctor.add_argument(
        "folder", nargs="?", help="folder of pictures with metadata.jsonl or .txt captions"
    )
    doctor.add_argument(
        "--caption_column", default="text", metavar="TEXT", help="column of the captions [text]"
    )
    doctor.add_argument(
        "--resolution", type=int, default=512, metavar="N", help="planned side in pixels [512]"
    )
    doctor.set_defaults(run=_doctor)

    generate = commands.add_parser("generate", help="draw pictures", description=_GENERATE)
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument(
        "--lora",
        metavar="FILE",
        help="LoRA file, or a run's folder; none draws with the base model",
    )
    generate.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="strength of the LoRA [1.0]"
    )
    generate.add_argument(
        "--model", metavar="TEXT", help="diffusers folder or Hub name [the embedded base model]"
    )
    generate.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="one picture each [0]"
    )
    generate.add_argument(
        "--output_dir", default="pictures", metavar="FOLDER", help="where the PNGs go [pictures]"
    )
    generate.add_argument(
        "--resolution", type=int, metavar="N", help="side in pixels [the model's own]"
    )
    for name, kind, default in _SAMPLING:
        generate.add_argument(
            f"--{name}",
            type=kind,
            metavar="N" if kind is int else "X",
            help=f"[the preset's, or {default}]",
        )
    generate.set_defaults(run=_generate)

    inspect = commands.add_parser(
        "inspect", help="say what a LoRA file holds", description=_INSPECT
    )
    inspect.add_argument("file", metavar="FILE", help="a .safetensors file, or a run's folder")
    inspect.add_argument("--modules", action="store_true", help="also a line for each layer")
    inspect.set_defaults(run=_inspect)

    bench = commands.add_parser(
        "bench", help="measure speed and memory against the reference script", description=_BENCH
    )
    for flag, kind, default, text in _BENCH_FLAGS:
        bench.add_argument(f"--{flag}", type=kind, default=default, metavar="X", help=text)
    bench.add_argument("--only", nargs="+", default=(), metavar="PART", help=_BENCH_PARTS)
    bench.add_argument("--full", action="store_true", help="measure 10 epochs, not only 3")
    bench.add_argument("--gpu", action="store_true", help="large shapes on the GPU that is here")
    bench.add_argument("--gpu_cases", nargs="+", default=(), metavar="CASE", help=_BENCH_CASES)
    bench.add_argument("--gpu_loops", nargs="+", default=(), metavar="LOOP", help=_BENCH_LOOPS)
    bench.set_defaults(run=_bench)

    export = commands.add_parser(
        "export", help="write a LoRA file for other programs, with proof", description=_EXPORT
    )
    export.add_argument("file", metavar="FILE", help="a .safetensors file, or a run's folder")
    export.add_argument(
        "--format", default="kohya", metavar="TEXT", help="kohya or diffusers [kohya]"
    )
    export.add_argument("--output", required=True, metavar="FILE", help="the .safetensors to write")
    export.add_argument(
        "--model", metavar="TEXT", help="its base model [what the file or its run says]"
    )
    export.add_argument("--dtype", default="fp32", metavar="TEXT", help="fp32, fp16 or bf16 [fp32]")
    export.set_defaults(run=_export)

    compare = commands.add_parser(
        "compare", help="say what sets two runs apart", description=_COMPARE
    )
    compare.add_argument("a", metavar="RUN", help="a run's folder")
    compare.add_argument("b", metavar="RUN", help="another one")
    compare.add_argument("--output", metavar="FILE", help="also write it as one HTML page")
    compare.set_defaults(run=_compare)

    push = commands.add_parser("push", help="upload a run to the Hub", description=_PUSH)
    push.add_argument("folder", metavar="RUN", help="a run's folder")
    push.add_argument("--repo_id", metavar="TEXT", help="user/name [the folder's name]")
    push.add_argument(
        "--public", action="store_true", help="make a new repository public [private]"
    )
    push.add_argument("--dry_run", action="store_true", help="list the files and send nothing")
    push.set_defaults(run=_push)
    return parser, commands.choices


_TRAIN = """Train LoRA adapters. Names, meaning and defaults are those of the reference text-to-image LoRA
script where it has the flag. Without --pretrained_model_name_or_path the embedded base model and its
settings are used."""
_PREFLIGHT = """Say what `train` with the same flags would cost on this machine in time and memory, and what to change
if it does not fit. A few steps are made in a scratch folder; the run's own is not touched."""
_DOCTOR = "Compare this machine with what the tests ran on and, given a folder, report on its pictures and captions."
_GENERATE = (
    "Draw one PNG for each prompt and seed. A picture depends on its own prompt and seed only."
)
_BENCH = """Train ours and the reference script on the same work, made from a seed, and write the ratios into a file.
Without --reference a plain loop of the same work is the other side. About a quarter of an hour; parts measured before
are kept."""
_BENCH_PARTS = "of training switches whole validation startup scaling forecast [all]"
_BENCH_CASES = "with --gpu, in this order: SHAPE:BATCH or SHAPE:BATCH:PRECISION [all there are]"
_BENCH_LOOPS = "with --gpu, of plain ours eager contiguous checkpointing int8 nf4 [all]"
_BENCH_FLAGS = (
    ("reference", str, None, "folder of a diffusers checkout"),
    ("rounds", int, 3, "how often the sides take turns [3]"),
    ("steps", int, 30, "timed steps of a round [30]"),
    ("threads", int, 1, "threads of each process [1]"),
    ("gpu_cap", float, None, "with --gpu, GiB of memory that may be used, such as 15 for a T4"),
    ("work", str, None, "folder of inputs and results [in the cache folder]"),
    ("out", str, "BENCHMARKS.md", "the file with the tables [BENCHMARKS.md]"),
)
_INSPECT = (
    "Describe a LoRA file: format, parts, ranks, alphas, metadata, and what is wrong with it."
)
_EXPORT = (
    "Convert a LoRA file to the form of ComfyUI and A1111 (kohya) or of diffusers, read it back into a "
    "fresh base model by two readers, and keep what they found beside it as .certificate.json."
)
_COMPARE = (
    "Settings that differ, losses pair by pair where both runs saw the same noise, sizes and times."
)
_PUSH = (
    "Upload adapter, certificates, card, report and samples of a run as one commit; nothing else of it. "
    "The same again uploads what has changed since. The token is that of `hf auth login` or HF_TOKEN."
)
_SAMPLING = (
    ("num_inference_steps", int, 30),
    ("guidance_scale", float, 7.5),
    ("guidance_rescale", float, 0.0),
)


# Commands


def _train(args: argparse.Namespace) -> int:
    with without_collector():
        from lora_nb.inference import with_samples
        from lora_nb.trainer import train

    _warn_of_a_lonely_process()
    settings = _settings_of(args)
    repo_id = _destination(args, settings)
    if settings.with_prior_preservation:
        _class_pictures(settings)
    training = train(settings)
    _say(
        f"{training.parameters:,} weights, {len(training.pictures)} pictures, run in {training.folder}"
    )
    with closing(with_samples(training)) as steps:
        for step in steps:
            if (
                step.step % args.log_every == 0
                or step.step == training.max_train_steps
                or step.probe
            ):
                _say(_line(step, training.max_train_steps))
    if training.interrupted:
        _say(f"Stopped at step {training.start_step}; the same command continues from there.")
        return 128 + (training.stopped_by or signal.SIGINT)
    folder = training.folder
    del training, steps  # what follows loads the base model anew
    if _main_process():
        _share(args, settings, folder, repo_id)
    return 0


def _destination(args: argparse.Namespace, settings: config.TrainConfig) -> str | None:
    """Where --push_to_hub will upload to, asked before the first step, so that no training is lost to a wrong token."""
    given = vars(args)
    if "push_to_hub" not in given or not _main_process():
        return None
    from lora_nb.hub import destination

    name = given.get("hub_model_id") or Path(settings.output_dir).resolve().name
    return destination(name, given.get("hub_token"))


def _share(
    args: argparse.Namespace, settings: config.TrainConfig, folder: Path, repo_id: str | None
) -> None:
    """What people take away: files for other programs, report and card, and the upload."""
    from lora_nb.formats import KOHYA_FILE
    from lora_nb.hub import push_to_hub
    from lora_nb.inference import export
    from lora_nb.report import write_card, write_report

    if settings.output_kohya_format:
        _say(export(folder, folder / KOHYA_FILE).table())
    report = write_report(folder)
    write_card(folder)
    _say(f"Adapter, samples and {report.name} are in {folder}.")
    if repo_id:
        _say(push_to_hub(folder, repo_id, token=vars(args).get("hub_token")).table())


def _settings_of(args: argparse.Namespace) -> config.TrainConfig:
    """The config of the flags; without a base model or a config file, that of the embedded base."""
    given = vars(args)
    base = None
    if "pretrained_model_name_or_path" not in given and args.config is None:
        base = _embedded()
        if "dataset_name" in given:
            base["data"]["train_data_dir"] = None
        pictures = (
            "" if {"train_data_dir", "dataset_name"} & set(given) else " and its pictures data/ink"
        )
        _say(f"No base model is named, so the embedded one{pictures} is used (preset tiny).")
    return flags.from_flags(args, base)


def _preflight(args: argparse.Namespace) -> int:
    with without_collector():
        from lora_nb.forecast import preflight

    forecast = preflight(_settings_of(args))
    print(forecast)
    return 0 if forecast.fits else 1


def _warn_of_a_lonely_process() -> None:
    """Say so if accelerate started one process where several were asked for: it then names a port, but no peers."""
    peers = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    asked = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if asked and not any(name in os.environ for name in peers):
        warnings.warn(
            "accelerate launch was asked for several processes and started only this one, which trains alone on "
            "smaller batches; add --multi_gpu, which starts and connects all of them, without GPUs too.",
            stacklevel=2,
        )


def _class_pictures(settings: config.TrainConfig) -> None:
    """The first process draws the class pictures that are missing, the others wait for it."""
    from accelerate import PartialState

    from lora_nb.inference import make_class_pictures

    with PartialState(cpu=env.pick_device().name == "cpu").main_process_first():
        if made := make_class_pictures(settings):
            _say(f"Drew {len(made)} pictures of {settings.class_prompt!r} into {made[0].parent}.")


def _embedded() -> dict[str, Any]:
    """The settings of the preset for the embedded base, with the output folder of the flags."""
    chosen = env.preset("tiny").config("cli", seed=None).to_dict()
    return chosen | {"output_dir": config.TrainConfig.output_dir, "seed": None}


def _line(step: Any, last: int) -> str:
    rates = ", ".join(f"{value:.3g}" for value in sorted(set(step.lr.values())))
    text = f"step {step.step}/{last}  loss {step.loss:.4f}  lr {rates}  {step.seconds:.2f} s"
    if step.probe:
        probe = step.probe
        text += f"  probe {probe.loss:.4f} ({probe.difference:+.4f} +- {probe.standard_error:.4f} to the base)"
    return text


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _main_process():
        print(text, flush=True)


def _doctor(args: argparse.Namespace) -> int:
    checks = env.doctor()
    for check in checks:
        print(
            f"{'ok' if check.ok else 'LOOK':<5}{check.name:<16} {check.found}{'' if check.ok else ': ' + check.fix}"
        )
    errors = 0
    if args.folder:
        from lora_nb.data import scan

        spec = config.DataSpec(
            args.folder, caption_column=args.caption_column, resolution=args.resolution
        )
        report = scan(spec)
        print(report.table())
        errors = len(report.errors)
    if errors:
        return 2
    return 0 if all(check.ok for check in checks) else 1


def _generate(args: argparse.Namespace) -> int:
    with without_collector():
        from lora_nb.inference import generate, load_pipeline

    sampling = {name: default for name, _, default in _SAMPLING}
    model = args.model
    if model is None:
        tiny = env.preset("tiny")
        model, sampling = tiny.model, tiny.sampling
    sampling |= {name: getattr(args, name) for name in sampling if getattr(args, name) is not None}
    pipeline = load_pipeline(model, args.lora, args.scale, device=env.pick_device().name)
    pairs = [(p, s) for p in range(len(args.prompts)) for s in args.seeds]
    pictures = generate(
        pipeline,
        [args.prompts[p] for p, _ in pairs],
        [s for _, s in pairs],
        resolution=args.resolution,
        **sampling,
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for (prompt, seed), picture in zip(pairs, pictures, strict=True):
        file = folder / f"p{prompt}-s{seed}.png"
        picture.save(file)
        print(file)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from lora_nb.formats import inspect

    report = inspect(args.file)
    print(report.table(args.modules))
    return 1 if report.problems else 0


def _bench(args: argparse.Namespace) -> int:
    from lora_nb.bench.command import Wanted, run

    asked = {f.name: getattr(args, f.name) for f in dataclasses.fields(Wanted)}
    _say(f"Wrote {run(Wanted(**asked), _say)}.")
    return 0


def _export(args: argparse.Namespace) -> int:
    with without_collector():
        from lora_nb.inference import export

    print(export(args.file, args.output, args.format, args.model, args.dtype).table())
    return 0


def _compare(args: argparse.Namespace) -> int:
    from lora_nb.files import write_atomically
    from lora_nb.report import compare

    compared = compare(args.a, args.b)
    print(compared.table())
    if args.output:
        print(write_atomically(Path(args.output), compared.page()))
    return 0


def _push(args: argparse.Namespace) -> int:
    from lora_nb.hub import push_to_hub

    name = args.repo_id or Path(args.folder).resolve().name
    print(push_to_hub(args.folder, name, not args.public, dry_run=args.dry_run).table())
    return 0
