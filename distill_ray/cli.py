"""distill-ray STAGE CONFIG [key=value ...]: the command line. Imports nothing heavy before it knows what to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from distill_ray.errors import DistillRayError, Interrupted, RunError, UserError
from distill_ray.interrupts import Interrupts

if TYPE_CHECKING:
    from distill_ray.console import Reporter
    from distill_ray.stages.context import Context

_STARTED = time.perf_counter()

app = typer.Typer(
    name="distill-ray", add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil a large PyTorch model into the best small one for a budget, on a laptop or a Ray cluster.",
)  # fmt: skip

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as student.loss.temperature=4.")
]
OutOption = Annotated[str, typer.Option("--out", help="Folder or URI that runs and artifacts go to.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The last line of stdout is one JSON object.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show stack traces and Ray's own log.")]
ProfileOption = Annotated[bool, typer.Option("--profile", help="End with a table of where the time went.")]
SearchOption = Annotated[
    Path | None, typer.Option("--search", metavar="FILE", help="A search to lay over CONFIG: tune, and student.")
]
AllowImportOption = Annotated[
    bool, typer.Option("--allow-import", help="Permit code that the config names by import path.")
]


@dataclass
class _Options:
    out: str
    quiet: bool
    json: bool
    debug: bool
    profile: bool


def _command(name: str, text: str, work: Callable[[Context], dict[str, Any]]) -> None:
    """Register a command that works on a config; all of them share their flags."""

    def command(
        config: ConfigArgument,
        overrides: OverridesArgument = None,
        out: OutOption = "runs",
        quiet: QuietOption = False,
        json_output: JsonOption = False,
        debug: DebugOption = False,
        allow_import: AllowImportOption = False,
        profile: ProfileOption = False,
    ) -> None:
        options = _options(out, quiet, json_output, debug, profile)
        _carry_out(config, overrides or [], options, allow_import, work)

    command.__doc__ = text
    app.command(name, help=text)(command)


def _options(out: str, quiet: bool, json_output: bool, debug: bool, profile: bool = False) -> _Options:
    os.environ["DISTILL_RAY_DEBUG"] = "1" if debug else ""  # runtime.DEBUG_VARIABLE; not imported yet
    return _Options(out, quiet, json_output, debug, profile)


def _carry_out(
    config: Path,
    overrides: list[str],
    options: _Options,
    allow_import: bool,
    work: Callable[[Context], dict[str, Any]],
    search: Path | None = None,
) -> None:
    from distill_ray.stages.entry import opened

    try:
        with opened(
            config, overrides, out=options.out, quiet=options.quiet, allow_import=allow_import, debug=options.debug,
            in_command=True, search=search,
        ) as context:  # fmt: skip
            answer = work(context)
            over = time.perf_counter()
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what is finished is kept, the same command continues") from None
    if options.profile:
        context.profile.add_stage("end of Ray", time.perf_counter() - over)
        answer["profile"] = [*context.profile.rows, context.profile.total(time.perf_counter() - _STARTED)]
    # Ray is gone by now: nothing of it can follow the last line.
    _show(answer, options)


def _run(context: Context) -> dict[str, Any]:
    from distill_ray.stages import pipeline, report

    answer = pipeline.run(context)
    shown = {"table": f"{context.config.name}: test split", "verdict": report.verdict_in_short(answer["rows"])}
    return answer | shown


def _stage(name: str) -> Callable[[Context], dict[str, Any]]:
    def work(context: Context) -> dict[str, Any]:
        from importlib import import_module

        extra = import_module(f"distill_ray.stages.{name}").run(context)
        stages = [outcome.to_json() for outcome in context.outcomes.values()]
        return {"name": context.config.name, "stages": stages, **(extra if isinstance(extra, dict) else {})}

    return work


def _show(answer: dict[str, Any], options: _Options) -> None:
    from distill_ray.console import profile_table, results_table, search_table

    title, verdict = answer.pop("table", None), answer.pop("verdict", None)
    if not options.quiet and options.profile:
        profile_table(answer["profile"])
    if not options.quiet:
        if title is not None:
            results_table(title, answer["rows"])
            print(verdict)
        elif not options.json:
            for stage in answer.get("stages", []):
                print(f"{stage['name']}: {stage['folder']} ({stage['status']})")
            for key in ("report", "export"):
                if key in answer:
                    print(f"{key}: {answer[key]}")
            if "tune" in answer:
                search_table(answer["name"], answer["tune"])
    if options.json:
        print(json.dumps(answer), flush=True)


_command("run", "Every stage that is not finished yet; ends with a results table.", _run)
_command("prepare", "Source to data store.", _stage("prepare"))
_command("teacher", "Train the teacher, after what it needs.", _stage("teacher"))
_command("label", "Store the teacher's logits for every row, after what that needs.", _stage("label"))
_command("student", "Train the students and their CE-only controls, after what they need.", _stage("student"))
_command("report", "Write report.html of the run, after every stage it shows.", _stage("report"))


@app.command("init", help="Look at data of your own and write the config of a first run.")
def _init(
    path: Annotated[str, typer.Argument(metavar="DATA", help="File, folder, pattern or URI.", show_default=False)],
    source: Annotated[
        str | None, typer.Option("--source", metavar="NAME", help="parquet, images, huggingface or idx.")
    ] = None,
    input_columns: Annotated[
        list[str] | None, typer.Option("--input", metavar="COLUMN", help="The input; of a table once for each column.")
    ] = None,
    label: Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="The classes.")] = None,
    identity: Annotated[str | None, typer.Option("--id", metavar="COLUMN", help="Your own ids.")] = None,
    no_id: Annotated[bool, typer.Option("--no-id", help="No column holds ids, whatever it is called.")] = False,
    split: Annotated[str | None, typer.Option("--split", metavar="COLUMN", help="Each row's split.")] = None,
    no_split: Annotated[bool, typer.Option("--no-split", help="No column holds the splits.")] = False,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Of the run; else as the data.")] = None,
    to: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Where to write it; else NAME.yaml.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    from distill_ray import starting

    named = name or re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(path.rstrip("/").split("?")[0]).stem).strip("_.") or "first"
    target = to or Path(f"{named}.yaml")
    if target.exists():
        raise UserError(f"init: {target} is there already: name another with --config, or remove it")
    if source not in (None, *get_args(starting.SourceName)):
        raise UserError(f"init: --source {source!r} is not known: {', '.join(get_args(starting.SourceName))}")
    for key, column, left_out in (("id", identity, no_id), ("split", split, no_split)):
        if column is not None and left_out:
            raise UserError(f"init: --{key} {column} and --no-{key} contradict each other: give one")
    wishes = starting.Wishes(cast("Any", source), tuple(input_columns or ()), label, identity, split, no_id, no_split)
    target.write_text(starting.first_config(path, named, wishes), encoding="utf-8")
    print(f"{target}: written; look through it, then: distill-ray run {target}")


@app.command("export", help="Write the student in portable forms, after what it needs.")
def _export(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    trial: Annotated[
        int | None, typer.Option("--trial", metavar="N", min=0, help="A finalist of the search, by its trial's number.")
    ] = None,
    search: SearchOption = None,
    out: OutOption = "runs",
    quiet: QuietOption = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
    allow_import: AllowImportOption = False,
    profile: ProfileOption = False,
) -> None:
    def work(context: Context) -> dict[str, Any]:
        from distill_ray.stages import export

        if trial is None:
            return _stage("export")(context)
        exported = export.run_trial(context, trial)
        stages = [outcome.to_json() for outcome in context.outcomes.values()]
        return {"name": context.config.name, "stages": stages, **exported}

    if search is not None and trial is None:
        raise UserError("export: --search goes with --trial N: which finalist of the search?")
    _carry_out(config, overrides or [], _options(out, quiet, json_output, debug, profile), allow_import, work, search)


@app.command("tune", help="Search student sizes and temperatures over one label store, after what that needs.")
def _tune(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    search: SearchOption = None,
    out: OutOption = "runs",
    quiet: QuietOption = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
    allow_import: AllowImportOption = False,
    profile: ProfileOption = False,
) -> None:
    options = _options(out, quiet, json_output, debug, profile)
    _carry_out(config, overrides or [], options, allow_import, _stage("tune"), search)


@app.command("import-labels", help="Logits that you have already, as the label store of a run, instead of a teacher.")
def _import_labels(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    logits: Annotated[
        str | None, typer.Option("--logits", metavar="PATH", help="Parquet file or folder, or .npy; as labels.from.")
    ] = None,
    ids: Annotated[
        str | None, typer.Option("--ids", metavar="PATH", help=".npy with the ids of a .npy's rows; as labels.ids.")
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="KEY", help="source_id (yours) or row_id; as labels.by.")
    ] = None,
    out: OutOption = "runs",
    quiet: QuietOption = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
    allow_import: AllowImportOption = False,
) -> None:
    given = {"from": logits, "ids": ids, "by": by}
    said = [f"labels.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]

    def work(context: Context) -> dict[str, Any]:
        if context.config.labels.from_ is None:
            raise UserError("import-labels: no file of logits is named: --logits PATH, or labels.from in the config")
        answer = _stage("label")(context)
        more = ["--allow-import"] if allow_import else []
        again = shlex.join(["distill-ray", "run", str(config), *(overrides or []), *said, "--out", out, *more])
        context.reporter.line(f"import-labels: next: {again}")
        return answer

    _carry_out(config, [*(overrides or []), *said], _options(out, quiet, json_output, debug), allow_import, work)


@app.command("verify", help="Check a data or label store: checksums, ids, coverage, finite logits, a sample replayed.")
def _verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder or URI of the store.", show_default=False)],
    sample: Annotated[
        int, typer.Option("--sample", metavar="ROWS", min=0, help="Rows of a label store to run the teacher on again.")
    ] = 256,
    quiet: QuietOption = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
    allow_import: AllowImportOption = False,
) -> None:
    from distill_ray.console import Reporter
    from distill_ray.storage import Folder
    from distill_ray.store.verify import verify

    reporter = Reporter(quiet=quiet)
    answer = verify(Folder.at(path), reporter)
    if answer["kind"] == "labels":
        answer["replay"] = _replayed(answer, sample, reporter, allow_import)
    if json_output:
        print(json.dumps(answer), flush=True)
    elif not quiet:
        held = f"{answer['rows']} rows in {answer['shards']} shards"
        if answer.get("accuracy") is not None:
            held += f", teacher accuracy {answer['accuracy']:.4f}"
        if replayed := answer.get("replay"):
            held += (
                f", {replayed['rows']} rows run through the teacher again (largest difference "
                f"{replayed['max_abs_difference']:.2g})"
            )
        elif answer["kind"] == "labels":
            held += ", no row run through the teacher again"
        print(f"{answer['folder']}: {answer['kind'].removesuffix('s')} store, {held}: no fault found")


def _replayed(answer: dict[str, Any], rows: int, reporter: Reporter, allow_import: bool) -> dict[str, Any] | None:
    """What running the teacher again on a sample gave; None where that was not possible, and why was told."""
    if not rows or answer["data"] is None:
        return None
    if answer["teacher"] is None:
        reporter.line(f"verify: there is no teacher-{answer['teacher_digest']} beside it: no row was run again")
        return None
    if answer["imported"] is not None:
        reporter.line(
            f"verify: these logits were imported from {answer['imported']}: there is no teacher to run again, so that "
            "only what is stored was checked"
        )
        return None
    if not answer["same_weights"]:  # verify has said so
        return None
    from distill_ray.replay import replay
    from distill_ray.storage import Folder
    from distill_ray.store import open_store

    labels, data, teacher = open_store(answer["folder"]), open_store(answer["data"]), Folder.at(answer["teacher"])
    return replay(labels, data, teacher, rows, allow_import=allow_import)


def main() -> None:
    """Entry point: exit codes as in the README, one line an error."""
    interrupts = Interrupts()
    interrupts.install()
    code = _guarded(sys.argv[1:])
    interrupts.leaving()
    if code and threading.active_count() > 1:
        # A thread that an interrupted stage left waiting for Ray crashes the interpreter on its way out, now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _guarded(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = arguments or ["--help"]
    try:
        code = app(args=arguments, prog_name="distill-ray", standalone_mode=False)
        return int(code or 0)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _UsageError as error:
        return _fail(f"{_message_of(error)} (see distill-ray --help)", UserError.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", Interrupted.exit_code, debug)
    except DistillRayError as error:
        return _fail(str(error), error.exit_code, debug)
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", RunError.exit_code, debug)
    except Exception as error:
        reason = str(error).strip().splitlines()
        return _fail(
            f"{type(error).__name__}: {reason[-1] if reason else ''} (--debug shows where)", RunError.exit_code, debug
        )


# typer carries a click of its own since 0.29: the class is found by way of a class that typer exports.
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _message_of(error: Exception) -> str:
    return str(getattr(error, "message", "")) or str(error)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    if "--json" in sys.argv:
        print(json.dumps({"error": line, "exit_code": code}), flush=True)
    print(f"distill-ray: {line}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
